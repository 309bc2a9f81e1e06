"""What the rounds say: the typical ratio of two times with its interval, and whether head is worse than base.

A ratio is head's time over base's, of the same rows, measured one right after the other. A round's ratio is the median
of its pairs: a burst of other load moves a few pairs far but hardly the median. Rounds differ by more than their
pairs, as each has processes of its own, so the sample is the rounds: the typical ratio is the median of the means of
all pairs of rounds, and its interval that of Wilcoxon's signed ranks (M. Hollander, D. Wolfe, E. Chicken, Nonparametric
Statistical Methods, 3rd ed., 2014, sections 3.2 and 3.3), which one outlying round does not move far.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import exp

import numpy as np

from evals.gate.cases import GateCase
from evals.gate.exits import CANNOT_TELL, FAILED, PASSES, REGRESSION
from evals.gate.measure import Bytes, Measurement, Round
from evals.results.forwards import nfe_fault

# The probability that the truth lies below an interval, and that it lies above.
TAIL = 0.05


@dataclass(frozen=True)
class Ratio:
    """head / base: the typical one, and the ends of its 90 % interval."""

    typical: float
    low: float
    high: float

    def is_slower(self, margin: float) -> bool:
        """Whether even the interval's lower end is above 1 + margin."""
        return self.low > 1 + margin

    def can_tell(self, margin: float) -> bool:
        """Whether a slowdown of twice the margin is ruled out."""
        return self.high <= (1 + margin) ** 2

    def __str__(self) -> str:
        return f"{self.typical:.3f} ({self.low:.3f}-{self.high:.3f})"


def typical_ratio(rounds: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Ratio:
    """From the times of base and head, in order, in each round. With fewer than five rounds, which the command does not
    make, the interval is the whole range, and misses the truth more often than TAIL says."""
    logs = np.array([np.median(np.log(np.divide(head, base))) for base, head in rounds])
    first, second = np.triu_indices(len(logs))
    means = np.sort((logs[first] + logs[second]) / 2)
    outside = max(1, _outside(len(logs)))
    return Ratio(exp(np.median(means)), exp(means[outside - 1]), exp(means[-outside]))


def _outside(rounds: int) -> int:
    """Which of the sorted means of two rounds, counted from either end, bounds an interval of TAIL."""
    # ways[s]: how many of the 2**rounds choices of ranks sum to s
    ways = np.zeros(rounds * (rounds + 1) // 2 + 1)
    ways[0] = 1
    for rank in range(1, rounds + 1):
        ways[rank:] += ways[:-rank].copy()
    return int(np.sum(np.cumsum(ways / 2.0**rounds) <= TAIL))


@dataclass
class Verdict:
    """One case: its figures, what is wrong with head, what could not be decided, and notes."""

    case: GateCase
    wall: Ratio
    cpu: Ratio
    nfe: tuple[int, int]
    tokens: tuple[int, int]
    peaks: Bytes
    answers: int
    differing: int
    regressions: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Margins:
    """The shares by which head's times and memory may exceed base's."""

    time: float = 0.025
    memory: float = 0.03


def judge(found: Measurement, margins: Margins, accept_nfe: Collection[str] = ()) -> tuple[list[Verdict], str | None]:
    """-> a verdict on every case, and what is wrong with the memory that head holds, None if nothing is. accept_nfe:
    ids of cases that may take more forwards than with base."""
    verdicts = [
        judge_case(case, rounds, found.peaks[case], margins, case.id in accept_nfe)
        for case, rounds in found.rounds.items()
    ]
    return verdicts, memory_fault("the tensors that stay between units take", *found.held, margins.memory)


def judge_case(case: GateCase, rounds: Sequence[Round], peaks: Bytes, margins: Margins, accept_nfe: bool) -> Verdict:
    pairs = [pair for pairs in rounds for pair in pairs]
    base, head = zip(*pairs, strict=True)
    wall, cpu = (
        typical_ratio([[[getattr(unit, clock) for unit in side] for side in zip(*r, strict=True)] for r in rounds])
        for clock in ("wall", "cpu")
    )
    verdict = Verdict(
        case,
        wall=wall,
        cpu=cpu,
        nfe=(sum(unit.nfe for unit in base), sum(unit.nfe for unit in head)),
        tokens=(sum(unit.tokens for unit in base), sum(unit.tokens for unit in head)),
        peaks=peaks,
        answers=sum(len(unit.answers) for unit in base),
        differing=sum(a != b for x, y in pairs for a, b in zip(x.answers, y.answers, strict=True)),
    )
    _judge_times(verdict, margins.time)
    _judge_nfe(verdict, accept_nfe)
    _judge_tokens(verdict)
    fault = memory_fault("the tensors of a unit take", *peaks, margins.memory)
    verdict.regressions += [fault] if fault else []
    return verdict


def _judge_times(verdict: Verdict, margin: float) -> None:
    """Either clock is enough to fail head. One that is too unsteady is ignored if the other can tell."""
    clocks = {"wall time": verdict.wall, "CPU time": verdict.cpu}
    for name, ratio in clocks.items():
        if ratio.is_slower(margin):
            verdict.regressions.append(f"{name} is {_times(ratio)} base's, beyond {1 + margin:g}")
    blurred = [name for name, ratio in clocks.items() if not ratio.is_slower(margin) and not ratio.can_tell(margin)]
    if len(blurred) == len(clocks):
        verdict.unclear.append(
            "both clocks were too unsteady to tell; repeat it on a quieter machine or with more --pairs"
        )
    elif blurred:
        verdict.notes.append(f"{blurred[0]} was too unsteady to tell; the other clock decides")


def _times(ratio: Ratio) -> str:
    return f"{ratio.typical:.3f} times (90 % interval {ratio.low:.3f} to {ratio.high:.3f})"


def memory_fault(what: str, before: int, after: int, margin: float) -> str | None:
    """What is wrong with `after` bytes compared with `before`; None if nothing is."""
    if after <= before * (1 + margin):
        return None
    return f"{what} {megabytes(after)} MB, {after / before:.3f} times base's {megabytes(before)}, beyond {1 + margin:g}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _judge_tokens(verdict: Verdict) -> None:
    before, after = verdict.tokens
    if not after:
        verdict.regressions.append(f"it answers no token ({before} with base)")
    elif verdict.differing:
        verdict.notes.append(
            f"{verdict.differing} of {verdict.answers} answers differ ({before} and {after} tokens); this is not judged"
        )


def _judge_nfe(verdict: Verdict, accepted: bool) -> None:
    fault = nfe_fault(verdict.case.unmasking, *verdict.nfe)
    if accepted:
        verdict.notes.append(f"{fault}: accepted" if fault else "its forwards did not rise, so --accept was not needed")
    elif fault:
        verdict.regressions.append(f"{fault}; if that is intended: --accept nfe={verdict.case.id}")


def exit_code(verdicts: Sequence[Verdict], held: str | None = None) -> int:
    """held: what is wrong with the memory that head holds."""
    if not verdicts:
        return FAILED
    if held or any(verdict.regressions for verdict in verdicts):
        return REGRESSION
    return CANNOT_TELL if any(verdict.unclear for verdict in verdicts) else PASSES
