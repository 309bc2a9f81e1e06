"""The result of running a configuration."""

import dataclasses
import statistics
from dataclasses import dataclass

from blockinfer import RequestOutput
from evals.questions.graders import Grade
from evals.runs.rounds import Round
from evals.runs.settings import Case, Settings


@dataclass
class Run:
    """One configuration's timed rounds: each round's seconds; of the last its outputs, their grades, its forwards.

    forwards are the model's, each shared by several requests. grades is None with random weights. peak_memory_gib is
    the GPU's, None on a CPU. resumed is the number of outputs that an earlier run generated: if there are any, seconds
    is empty, and forwards and peak_memory_gib are None. rounds, steady and unsteady are the Steadiness
    (evals.runs.rounds) of the rounds, first_seconds the time of the untimed run before them.
    """

    case: Case
    outputs: list[RequestOutput]
    grades: list[Grade] | None
    seconds: list[float]
    forwards: int | None
    peak_memory_gib: float | None
    resumed: int = 0
    rounds: list[Round] = dataclasses.field(default_factory=list)
    steady: bool | None = None
    unsteady: str | None = None
    first_seconds: float | None = None

    @property
    def tokens(self) -> int:
        """Generated positions before the first stop token."""
        return sum(len(output.outputs[0].token_ids) for output in self.outputs)

    @property
    def nfe(self) -> int:
        """Forwards that each request took part in, summed over the requests."""
        return sum(output.metrics.nfe for output in self.outputs)

    @property
    def median_seconds(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.median_seconds if self.seconds else None

    @property
    def ms_per_forward(self) -> float | None:
        return 1000 * self.median_seconds / self.forwards if self.seconds else None

    @property
    def accuracy(self) -> float | None:
        return statistics.fmean(g.correct for g in self.grades) if self.grades else None


def by_source(run: Run, settings: Settings) -> dict[str, list[Grade]]:
    """The grades, source by source; empty with random weights."""
    grades: dict[str, list[Grade]] = {}
    for row, one in zip(settings.rows, run.grades or [], strict=False):
        grades.setdefault(row["source"], []).append(one)
    return grades


def unextracted(run: Run, settings: Settings) -> dict[str, int]:
    """The number of answers to each source in which the grader found nothing to judge; empty with random weights."""
    return {s: sum(g.extracted is None for g in grades) for s, grades in by_source(run, settings).items()}
