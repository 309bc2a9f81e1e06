"""What a training stores while it runs: its log, and the state from which it continues after an interruption."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from evals.files import replacing, write_output
from evals.llada_tiny.data import Encoder
from evals.llada_tiny.evaluate import heldout_rows, letters, lookups
from evals.llada_tiny.model import TinyLLaDA
from evals.llada_tiny.problems import SOURCES

# Options that may change when a training continues: they change no step.
_FREE = {"workers"}


class Log:
    """Sums over the steps since the last line, and the lines of training.jsonl, of which the first has the options."""

    def __init__(self, encoder: Encoder, out: Path, device: str, started: float, options: dict) -> None:
        self.encoder, self.every, self.started = encoder, options["log_every"], started
        self.rows: dict[str, list[dict]] = {source: [] for source in SOURCES}
        for row in heldout_rows(options["eval_rows"], "validation"):
            self.rows[row["source"]].append(row)
        self.hits = torch.zeros(2, len(SOURCES) + 1, device=device)
        self.loss = torch.zeros((), device=device)
        self.path = out / "training.jsonl"
        write_output(self.path, json.dumps(options) + "\n")

    def go_on(self, sums: list[Tensor], lines: list[str]) -> None:
        """Continues from where a training stood, with the lines that its log had then."""
        write_output(self.path, "".join(lines))
        self.hits, self.loss = sums

    def add(self, loss: Tensor, right: Tensor, source: Tensor) -> None:
        """Adds one step's loss, and for each place whether it was right and its source (-1: none)."""
        place = source % (len(SOURCES) + 1)
        self.hits.index_add_(1, place, torch.stack([right.float(), torch.ones_like(place).float()]))
        self.loss += loss

    def write(self, step: int, model: TinyLLaDA) -> None:
        rates = (self.hits[0] / self.hits[1].clamp(min=1)).tolist()
        line = {
            "step": step,
            "seconds": round(time.time() - self.started, 1),
            "loss": round(self.loss.item() / self.every, 4),
            "content": {source: round(rate, 4) for source, rate in zip(SOURCES, rates, strict=False)},
            "lookups": [round(rate, 3) for rate in lookups(model, self.encoder, self.rows["longbench_hotpotqa"])],
            "letters": round(letters(model, self.encoder, self.rows["mmlu"]), 3),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        content = "  ".join(f"{source} {rate:.3f}" for source, rate in line["content"].items())
        print(
            f"step {step}  {line['seconds']:.0f} s  loss {line['loss']:.4f}  masked content right: {content}"
            f"  facts found: {line['lookups']}  letters: {line['letters']}",
            flush=True,
        )
        self.hits.zero_(), self.loss.zero_()


class State:
    """The file beside the weights from which a training continues. It is due every fixed number of seconds, and once
    more when `ends` has become true."""

    def __init__(self, out: Path, options: dict, every: float) -> None:
        self.path, self.every, self.ends = out / "state.pt", every, False
        self.options = {name: value for name, value in options.items() if name not in _FREE}

    def read(self, device: str) -> dict | None:
        """What `write` stored; None if there is nothing. Raises ValueError if its options differ."""
        if not self.path.exists():
            return None
        state = torch.load(self.path, map_location=device, weights_only=True)
        if state["options"] != self.options:
            other = [name for name in self.options if self.options[name] != state["options"].get(name)]
            raise ValueError(
                f"{self.path} is of a training with another {', '.join(other)}; remove it to begin anew, or give "
                "another --out"
            )
        return state

    def write(
        self,
        done: int,
        seconds: float,
        model: TinyLLaDA,
        average: list[Tensor],
        steppers: list[torch.optim.Optimizer],
        log: Log,
    ) -> None:
        """`done` steps took this many seconds, start included."""
        state = {
            "options": self.options,
            "done": done,
            "seconds": seconds,
            "weights": model.state_dict(),
            "average": average,
            "optimizers": [stepper.state_dict() for stepper in steppers],
            "sums": [log.hits, log.loss],
            "lines": log.path.read_text().splitlines(keepends=True),
        }
        # a kill during the write leaves the previous file
        with replacing(self.path) as part:
            torch.save(state, part)

    @contextmanager
    def sigterm(self) -> Iterator[None]:
        """Within it the signal ends nothing: it sets `ends`."""

        def handler(number: int, frame: FrameType | None) -> None:
            self.ends = True

        before = signal.signal(signal.SIGTERM, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
