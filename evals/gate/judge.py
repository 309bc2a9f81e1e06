"""What the pairs say: the typical ratio of two times with its interval, and whether head is worse than base.

A ratio is head's time over base's, of the same rows, measured one right after the other. The typical one is the median:
a neighbour's burst of work moves a few pairs far and the median hardly. Its interval is a percentile bootstrap over the
pairs (B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log

import numpy as np

from evals.gate.cases import GateCase
from evals.gate.measure import Pair

PASSES, REGRESSION, FAILED, CANNOT_TELL = range(4)

RESAMPLES = 4000
SCHEDULED = ("low_confidence", "random", "sequential")
# The share by which the forwards of the other rules may rise: rounding may move a confidence over its bound. A schedule
# leaves nothing to round.
NFE_TOLERANCE = 0.01


@dataclass(frozen=True)
class Ratio:
    """head / base: the median of the pairs, and the ends of its 95 % interval."""

    typical: float
    low: float
    high: float

    def is_slower(self, margin: float) -> bool:
        """Whether even the interval's lower end is beyond 1 + margin."""
        return self.low > 1 + margin

    def can_tell(self, margin: float) -> bool:
        """Whether the interval, about the margin wide to each side, would show a slowdown of twice the margin."""
        return log(self.high / self.low) <= 2 * log(1 + margin)

    def __str__(self) -> str:
        return f"{self.typical:.3f} ({self.low:.3f}-{self.high:.3f})"


def typical_ratio(base: Sequence[float], head: Sequence[float]) -> Ratio:
    """Of the times of the pairs, in order. The same times give the same interval."""
    logs = np.log(np.asarray(head, dtype=float) / np.asarray(base, dtype=float))
    draws = np.random.default_rng(0).integers(len(logs), size=(RESAMPLES, len(logs)))
    low, high = np.percentile(np.median(logs[draws], axis=1), [2.5, 97.5])
    return Ratio(exp(np.median(logs)), exp(low), exp(high))


@dataclass
class Verdict:
    """One case: its figures, what is wrong with head, what could not be told, and what is merely worth knowing."""

    case: GateCase
    wall: Ratio
    cpu: Ratio
    nfe: tuple[int, int]
    tokens: tuple[int, int]
    answers: int
    differing: int
    regressions: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def judge(case: GateCase, pairs: Sequence[Pair], margin: float, accept_nfe: bool = False) -> Verdict:
    """margin is a share: 0.05. accept_nfe lets head take more forwards than base."""
    base, head = zip(*pairs, strict=True)
    verdict = Verdict(
        case,
        wall=typical_ratio([unit.wall for unit in base], [unit.wall for unit in head]),
        cpu=typical_ratio([unit.cpu for unit in base], [unit.cpu for unit in head]),
        nfe=(sum(unit.nfe for unit in base), sum(unit.nfe for unit in head)),
        tokens=(sum(unit.tokens for unit in base), sum(unit.tokens for unit in head)),
        answers=sum(len(unit.answers) for unit in base),
        differing=sum(a != b for x, y in pairs for a, b in zip(x.answers, y.answers, strict=True)),
    )
    _judge_times(verdict, margin)
    _judge_nfe(verdict, accept_nfe)
    if verdict.differing:
        tokens = "{} and {} tokens".format(*verdict.tokens)
        verdict.notes.append(f"{verdict.differing} of {verdict.answers} answers differ ({tokens}); this is not judged")
    return verdict


def _judge_times(verdict: Verdict, margin: float) -> None:
    """Either clock is enough to fail head. One that is too unsteady is passed over while the other can tell."""
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
    return f"{ratio.typical:.3f} times (95 % interval {ratio.low:.3f} to {ratio.high:.3f})"


def nfe_fault(unmasking: str, before: int, after: int) -> str | None:
    """What is wrong with `after` forwards where there were `before`; None where nothing is."""
    scheduled = unmasking in SCHEDULED
    if after <= (before if scheduled else before * (1 + NFE_TOLERANCE)):
        return None
    allowed = "none more is allowed" if scheduled else f"{NFE_TOLERANCE:.0%} more is allowed"
    return f"{after} forwards where there were {before} ({after / before - 1:+.1%}), and {allowed}"


def _judge_nfe(verdict: Verdict, accepted: bool) -> None:
    fault = nfe_fault(verdict.case.unmasking, *verdict.nfe)
    if accepted:
        verdict.notes.append(f"{fault}: accepted" if fault else "its forwards did not rise, so --accept was not needed")
    elif fault:
        verdict.regressions.append(f"{fault}; if that is intended: --accept nfe={verdict.case.id}")


def exit_code(verdicts: Sequence[Verdict]) -> int:
    if any(verdict.regressions for verdict in verdicts):
        return REGRESSION
    if not verdicts:
        return FAILED
    return CANNOT_TELL if any(verdict.unclear for verdict in verdicts) else PASSES
