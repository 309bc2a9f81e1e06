"""Timed rounds: whether they are steady, whether they are enough, and how precisely they give a ratio of two times."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

# The share by which the first round may differ from the median of the others.
STEADY = 0.03
# Of Student's t, two-sided 95 %, by degrees of freedom from 1; beyond these the quantile is below 1.96 + 2.7 / degrees.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


class Round(NamedTuple):
    """One timed run over all rows: its seconds, the model's forwards, the CUDA graphs captured and kernels compiled in
    it. parts: its seconds, part by part, if other configurations ran between the parts."""

    seconds: float
    forwards: int
    graphs: int = 0
    compiled: int = 0
    parts: tuple[float, ...] = ()


class Steadiness(NamedTuple):
    """The steady rounds, and in words what was wrong with those before them (None if nothing).

    steady is None if a single round shows nothing wrong: there is nothing to compare it with.
    """

    steady: bool | None
    fault: str | None
    rounds: list[Round]


def steadiness(rounds: Sequence[Round]) -> Steadiness:
    """Drops the rounds up to the last one that captured or compiled anything, else a first one whose time differs from
    the others'. If none would be left, all are kept."""
    busy = [number for number, r in enumerate(rounds, 1) if r.graphs or r.compiled]
    if busy:
        graphs, compiled = sum(r.graphs for r in rounds), sum(r.compiled for r in rounds)
        numbers = f"round{'s' * (len(busy) > 1)} {', '.join(map(str, busy))}"
        fault = f"captured {graphs} CUDA graphs and compiled {compiled} kernels in {numbers}"
        left = list(rounds[busy[-1] :])
        return Steadiness(False, fault if left else f"{fault}, and there is none after", left or list(rounds))
    if len(rounds) < 2:
        return Steadiness(None, None, list(rounds))
    first, *others = rounds
    change = first.seconds / statistics.median(r.seconds for r in others) - 1
    if abs(change) <= STEADY:
        return Steadiness(True, None, list(rounds))
    return Steadiness(False, f"the first round took {100 * change:+.1f} % on the others' median", others)


def is_enough(rounds: Sequence[Round], max_seconds: float, relative_error: float, least: int = 3) -> bool:
    """Whether these are enough: another would exceed max_seconds, or there are at least the required number of steady
    ones, whose mean is known well enough."""
    seconds = [r.seconds for r in rounds]
    if sum(seconds) + statistics.fmean(seconds) > max_seconds:
        return True
    steady = [r.seconds for r in steadiness(rounds).rounds]
    return len(steady) >= least and standard_error(steady) <= relative_error


def standard_error(seconds: Sequence[float]) -> float | None:
    """The mean's standard error as a share of the mean; None for one round, from which it cannot be known."""
    if len(seconds) < 2:
        return None
    return statistics.stdev(seconds) / len(seconds) ** 0.5 / statistics.fmean(seconds)


def ratio_factor(a: Sequence[Round], b: Sequence[Round]) -> float | None:
    """The factor, to either side, within which the ratio of the two times is known with 95 % confidence; None if
    unknown.

    Rounds in parts were timed side by side, so what slowed the machine is in both and drops out of the ratio of the
    sums, whose error is that of a ratio estimator (W. G. Cochran, Sampling Techniques, 1977, chapter 6): parts of
    unequal work widen it, so it is rather too wide. Other rounds have errors of their own; a single one has none.
    """
    # from the end, since the first rounds of either may have been dropped
    pairs = list(zip(_parts(a)[::-1], _parts(b)[::-1], strict=False))
    if len(pairs) > 1:
        x, y = zip(*pairs, strict=True)
        differences = [one / sum(x) - other / sum(y) for one, other in pairs]
        error, degrees = statistics.stdev(differences) * len(pairs) ** 0.5, len(pairs) - 1
    elif len(a) > 1 < len(b):
        error = math.hypot(*(standard_error([r.seconds for r in rounds]) for rounds in (a, b)))
        degrees = min(len(a), len(b)) - 1
    else:
        return None
    return math.exp(error * (_STUDENT[degrees - 1] if degrees <= len(_STUDENT) else 1.96 + 2.7 / degrees))


def _parts(rounds: Sequence[Round]) -> list[float]:
    return [seconds for r in rounds for seconds in r.parts]


def record(benchmark: "BenchmarkFixture", measure: Callable[[], Sequence[float]]) -> None:
    """Runs `measure`; the seconds that it returns become the rounds of pytest-benchmark's record, whose own clock would
    count what runs between them."""
    seconds: list[float] = []
    benchmark.pedantic(lambda: seconds.extend(measure()), rounds=1)
    if benchmark.enabled:
        benchmark.stats.stats.data[:] = seconds
