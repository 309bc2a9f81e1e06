"""The accuracy that a decoding mode loses against `vanilla`, from the answers to the same rows.

Two modes answer most rows alike, so the rows on which they differ say far more than two separate accuracies would.
"""

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

from evals.questions.graders import Grade
from evals.runs.configurations import is_baseline, rule_name

if TYPE_CHECKING:
    from evals.runs.run import Run

CONFIDENCE = 0.95
_POWER = 0.8
_Z = NormalDist().inv_cdf(CONFIDENCE)


class Paired(NamedTuple):
    """n rows answered twice; `lost` of them correctly by vanilla alone, `won` correctly by the other mode alone."""

    n: int
    lost: int
    won: int

    @property
    def loss(self) -> float:
        """The share of correct answers lost; negative if more are won."""
        return (self.lost - self.won) / self.n

    def lower(self) -> float:
        """With 95 % confidence the loss is at least this."""
        return self._bound(+1)

    def upper(self) -> float:
        """With 95 % confidence the loss is at most this."""
        return self._bound(-1)

    def mcnemar(self) -> float:
        """Two-sided p that lost and won rows are equally likely, exact (McNemar, Psychometrika 12, 1947)."""
        changed = self.lost + self.won
        tail = sum(math.comb(changed, k) for k in range(min(self.lost, self.won) + 1))
        return min(1.0, 2 * tail / 2**changed)

    def rows_needed(self, margin: float) -> int:
        """Rows on which `upper` would fall below `margin` with 80 % power, if nothing were lost and as many rows
        changed.

        A normal approximation; half a changed row is added, so that zero changed rows are not taken for "never".
        """
        z = _Z + NormalDist().inv_cdf(_POWER)
        changed = (self.lost + self.won + 0.5) / (self.n + 1)
        return math.ceil(z * z * changed / margin**2)

    def _bound(self, sign: int) -> float:
        """Where Tango's score statistic, which falls as the loss rises, is sign * z (Statistics in Medicine 17, 1998,
        p. 891)."""
        low, high = -1.0, 1.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if self._score(middle) > sign * _Z else (low, middle)
        return (low + high) / 2

    def _score(self, loss: float) -> float:
        """(lost - won - n * loss) over its deviation, for the likeliest shares of lost and won rows of that loss."""
        n, lost, won = self
        b = (2 * n - lost + won) * loss - lost - won
        share_won = (math.sqrt(b * b + 8 * n * won * loss * (1 - loss)) - b) / (4 * n)
        difference = lost - won - n * loss
        variance = n * (2 * share_won + loss * (1 - loss))
        if variance <= 0:
            return math.copysign(math.inf, difference) if difference else 0.0
        return difference / math.sqrt(variance)


def paired(run: "Run", runs: list["Run"]) -> Paired | None:
    """The run's answers beside those of `vanilla` to the same rows; None if there is no such run, or no grades."""
    vanilla = next((other for other in runs if is_baseline(other.case, run.case)), None)
    if vanilla is None or vanilla is run or not run.grades or not vanilla.grades:
        return None
    return pair(vanilla.grades, run.grades)


def pair(before: list[Grade], after: list[Grade]) -> Paired:
    lost = sum(b.correct and not a.correct for b, a in zip(before, after, strict=True))
    won = sum(a.correct and not b.correct for b, a in zip(before, after, strict=True))
    return Paired(len(before), lost, won)


def against_vanilla(run: "Run", runs: list["Run"]) -> dict[str, Any] | None:
    """The pair as a benchmark's record stores it; None if there is no such pair."""
    both = paired(run, runs)
    return stored(both) if both is not None else None


def stored(both: Paired) -> dict[str, Any]:
    """The loss and its one-sided 95 % bounds are shares."""
    bounds = {"loss": both.loss, "loss_at_least": both.lower(), "loss_at_most": both.upper()}
    return both._asdict() | bounds | {"mcnemar_p": both.mcnemar()}


def rule_width(runs: list["Run"]) -> int:
    """The width of a table's column of rules."""
    return max([14, *(len(rule_name(run.case.params)) + 1 for run in runs)])


def losses(runs: list["Run"], margin: float) -> list[str]:
    """A line per configuration: rows lost and won against `vanilla`, and the loss that these rows are too few to
    detect."""
    lines, width = [], rule_width(runs)
    for run in runs:
        both = paired(run, runs)
        if both is None:
            continue
        rule = rule_name(run.case.params)
        line = f"{run.case.mode:<14}{run.case.block_length:>5}  {rule:<{width}}{both.lost:>5}{both.won:>5}"
        line += f"{100 * both.loss:>+8.1f}{100 * both.lower():>+8.1f}{100 * both.upper():>+8.1f}{both.mcnemar():>12.2f}"
        seen = both.upper() <= margin
        lines.append(line + ("" if seen else f"   {both.rows_needed(margin)} rows to rule out {100 * margin:g}"))
    if lines:
        head = f"{'against vanilla':<{21 + width}}{'lost':>5}{'won':>5}{'loss':>8}{'from':>8}{'to':>8}{'McNemar p':>12}"
        lines = [f"{head}   points, one-sided 95 % bounds", *lines]
    return lines
