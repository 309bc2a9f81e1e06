"""Base and head side by side: one process each in every round, running units of work in turn."""

import contextlib
import filecmp
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from evals.gate.cases import PAIRS_A_ROUND, GateCase, Worse
from evals.gate.checkout import RunFailed, base_checkout, short
from evals.gate.side import Unit, Worker
from evals.questions.prompts import messages
from evals.questions.rows import load_rows

MODEL = Path("evals", "llada_tiny")
CHECKPOINT = (".json", ".jinja", ".safetensors")
ROOT = Path(__file__).resolve().parents[2]

Pair = tuple[Unit, Unit]
Round = list[Pair]
Bytes = tuple[int, int]


@dataclass
class Measurement:
    """A run: the pairs of every case that both sides take, round by round, why base does not take the others, and how
    the small models differ. base and head are commits, head's with "+" if the checkout differs from it.

    peaks: the most bytes of tensors that base and head allocate in one unit of a case, beyond those from before it.
    held: the bytes that they hold at the end of a round.
    """

    base: str
    head: str
    rounds: dict[GateCase, list[Round]] = field(default_factory=dict)
    peaks: dict[GateCase, Bytes] = field(default_factory=dict)
    held: Bytes = (1, 1)
    not_in_base: dict[GateCase, str] = field(default_factory=dict)
    model_differs: list[str] = field(default_factory=list)
    seconds: float = 0.0


def measure(root: Path, ref: str, cases: Sequence[GateCase], pairs: int, worse: Worse) -> Measurement:
    """Runs base, the commit `ref`, and head, the checkout `root`, in turn: `pairs` units of each case on each side, in
    rounds of about PAIRS_A_ROUND. Raises RunFailed."""
    start = time.monotonic()
    try:
        conversations = [messages(row) for row in load_rows(root / "sample_200.jsonl")]
    except ValueError as error:
        raise RunFailed(f"head's rows cannot be read: {error}") from error
    with base_checkout(root, ref) as checkout:
        found = Measurement(short(checkout), short(root), model_differs=_differences(checkout, root))
        with tqdm(total=pairs, disable=None, unit="pair", desc="gate", leave=False) as bar:
            number_of_rounds = -(-pairs // PAIRS_A_ROUND)
            for number in range(number_of_rounds):
                numbers = range(pairs)[number::number_of_rounds]
                with _sides(checkout, root, conversations, max(case.rows for case in cases), number) as sides:
                    _warm_up(sides, cases, found)
                    for n in numbers:
                        for case, rounds in found.rounds.items():
                            rows = [(n * case.rows + j) % len(conversations) for j in range(case.rows)]
                            rounds[-1].append(_pair(sides, case, rows, worse, head_first=number % 2 == 1))
                        bar.update()
                    if number == number_of_rounds - 1:
                        _weigh(sides, found, worse)
    found.seconds = time.monotonic() - start
    return found


Sides = tuple[Worker, Worker]


@contextlib.contextmanager
def _sides(
    checkout: Path, root: Path, conversations: list[list[dict[str, str]]], batch_size: int, number: int
) -> Iterator[Sides]:
    """Processes of base and head, ready for requests. They take turns at being started first."""
    with contextlib.ExitStack() as stack:
        folders = [("base", checkout), ("head", root)]
        started = {
            side: stack.enter_context(Worker(side, folder)) for side, folder in folders[:: -1 if number % 2 else 1]
        }
        sides = started["base"], started["head"]
        for worker in started.values():
            worker.ask(conversations=conversations, batch_size=batch_size)
        for worker in sides:
            worker.reply()
        yield sides


def _warm_up(sides: Sides, cases: Sequence[GateCase], found: Measurement) -> None:
    """Begins a round: one unit of every case on both sides at once. Drops the cases that base does not take."""
    for case in cases:
        for worker in sides:
            worker.ask(call="unit", params=case.params, rows=list(range(case.rows)))
        before, after = (worker.reply() for worker in sides)
        if "unsupported" in after:
            raise RunFailed(f"head does not take the case {case.id}: {after['unsupported']}")
        if "unsupported" in before:
            found.not_in_base[case] = before["unsupported"]
        else:
            found.rounds.setdefault(case, []).append([])


def _pair(sides: Sides, case: GateCase, rows: list[int], worse: Worse, head_first: bool) -> Pair:
    """The sides take turns throughout a round, so that every unit follows one of the other side and never finds its
    caches warm. They also take turns at being first in a round, so that drift favours neither."""
    base, head = sides
    if head_first:
        second = head.unit(case, rows, worse.work(case))
        return base.unit(case, rows), second
    return base.unit(case, rows), head.unit(case, rows, worse.work(case))


def _weigh(sides: Sides, found: Measurement, worse: Worse) -> None:
    """Ends the last round: measures the tensors' memory, which hardly varies, so once is enough."""
    base, head = sides
    found.held = base.memory(call="held"), head.memory(call="held", more_memory=worse.memory)
    for case in found.rounds:
        request = {"call": "peak", "params": case.params, "rows": list(range(case.rows))}
        found.peaks[case] = base.memory(**request), head.memory(**request, more_memory=worse.memory)


def _differences(base: Path, head: Path) -> list[str]:
    """Files of the small model's checkpoint that one side lacks, or that differ."""
    folders = [base / MODEL, head / MODEL]
    names = {path.name for folder in folders for path in folder.glob("*") if path.suffix in CHECKPOINT}
    _, differing, missing = filecmp.cmpfiles(*folders, sorted(names), shallow=False)
    return differing + missing
