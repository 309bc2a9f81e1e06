"""One configuration over a study's problems, by the engine."""

import argparse
import statistics
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from blockinfer import LLM, RequestOutput, SamplingParams
from blockinfer.decoding.modes import MODES
from evals.files import number_argument, path_argument
from evals.llada_tiny.evaluate import final_answer
from evals.questions.prompts import messages
from evals.results.paired import Paired

BLOCK_LENGTH = SamplingParams().block_length
ONE_BLOCK = "one block"


@dataclass(frozen=True)
class Result:
    """One configuration over all rows: for each source's rows, in their order, whether the answer was right.

    tokens_per_forward: of all rows. long_tokens_per_forward: of gsm8k and math500, whose answers are long. forwards:
    summed over the rows. window: which blocks are open, and what is seen and computed beside them.
    """

    mode: str
    rule: str
    right: dict[str, list[bool]]
    tokens_per_forward: float
    long_tokens_per_forward: float
    forwards: int
    block_length: int = BLOCK_LENGTH
    window: str = ONE_BLOCK

    def share(self, source: str) -> float:
        return statistics.fmean(self.right[source])

    @property
    def accuracy(self) -> float:
        return statistics.fmean(chain(*self.right.values()))

    @property
    def configuration(self) -> tuple[str, int, str, str]:
        return self.mode, self.block_length, self.rule, self.window

    def against(self, other: "Result") -> Paired:
        """The paired loss on the same rows."""
        pairs = list(zip(chain(*self.right.values()), chain(*other.right.values()), strict=True))
        return Paired(len(pairs), lost=pairs.count((False, True)), won=pairs.count((True, False)))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that measure modes: the checkpoint, the problems, the modes, and how many requests at a
    time."""
    parser.add_argument("folder", type=path_argument, help="the checkpoint")
    parser.add_argument("--rows", type=number_argument(1), default=250, help="problems a source (250)")
    parser.add_argument("--seed", type=int, default=7, help="of the problems (7)")
    parser.add_argument("--mode", default=",".join(MODES), help="decoding modes, a comma list (all)")
    parser.add_argument("--max-num-seqs", type=number_argument(1), default=32, help="problems at a time (32)")


def chosen_modes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The modes of --mode; an unknown one ends the command."""
    modes = args.mode.split(",")
    if unknown := set(modes) - set(MODES):
        parser.error(f"--mode: {', '.join(sorted(unknown))} is none of {', '.join(MODES)}")
    return modes


def loaded(parser: argparse.ArgumentParser, folder: Path, **options: int | str | None) -> LLM:
    """The checkpoint, in float32; errors in it or in the options end the command."""
    try:
        return LLM(str(folder), dtype="float32", **options)
    except ValueError as error:
        parser.error(str(error))


def label(rule: dict) -> str:
    name, *values = rule.values()
    unit = " steps" if "denoising_steps" in rule else ""
    return " ".join([name, *(f"{value:g}{unit}" for value in values)])


def window_label(window: dict) -> str:
    """Without decoded_token_threshold, which equals block_add_threshold if that is given."""
    names = {"block_add_threshold": "add", "suffix_window": "suffix", "commit_delay": "delay"}
    return ", ".join(f"{names[name]} {value:g}" for name, value in window.items() if name in names) or ONE_BLOCK


def measure(llm: LLM, rows: list[dict], mode: str, block_length: int, rule: dict, window: dict) -> Result:
    params = SamplingParams(mode=mode, block_length=block_length, **rule, **window)
    outputs = llm.chat([messages(row) for row in rows], params, use_tqdm=False)
    right: dict[str, list[bool]] = {}
    for row, output in zip(rows, outputs, strict=True):
        found = final_answer(row["source"], output.outputs[0].text or "")
        right.setdefault(row["source"], []).append(found == row["answer"])
    long = [output for row, output in zip(rows, outputs, strict=True) if row["source"] in ("gsm8k", "math500")]
    speeds = _tokens_per_forward(outputs), _tokens_per_forward(long)
    return Result(mode, label(rule), right, *speeds, _forwards(outputs), block_length, window_label(window))


def _tokens_per_forward(outputs: list[RequestOutput]) -> float:
    return sum(len(o.outputs[0].token_ids) for o in outputs) / _forwards(outputs)


def _forwards(outputs: list[RequestOutput]) -> int:
    return sum(o.metrics.nfe for o in outputs)


def table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
