"""The gate's statistics where the truth is known, and its rules."""

import numpy as np
import pytest

from evals.gate.judge import CANNOT_TELL, PASSES, REGRESSION, Ratio, exit_code, judge, nfe_fault, typical_ratio
from tests.gate.figures import LIMIT, STATIC, STEADY, pairs_of


def heavy_tailed(seed, slowdown, scale):
    """40 pairs of times, of rows of different lengths; a burst makes every fifth unit up to six times as long."""
    rng = np.random.default_rng(seed)
    work = rng.uniform(0.1, 0.4, 40)
    sides = []
    for factor in (1.0, 1 + slowdown):
        burst = np.where(rng.random(40) < 0.2, rng.uniform(1, 6, 40), 1)
        sides.append(work * factor * burst * np.exp(scale * rng.standard_t(2, 40)))
    return sides


def test_ratio_of_steady_pairs():
    ratio = typical_ratio([0.1, 0.2, 0.4] * 14, [0.11, 0.22, 0.44] * 14)
    assert (ratio.typical, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    assert ratio.is_slower(0.05) and not ratio.is_slower(0.11) and ratio.can_tell(0.05)
    assert str(ratio) == "1.100 (1.100-1.100)"


def test_interval_of_the_median_on_known_quantiles():
    # for ratios exp(1/100) .. exp(41/100) the binomial(41, 1/2) puts the median's 95 % interval at the 15th and 27th
    ratio = typical_ratio([1.0] * 41, np.exp(np.arange(1, 42) / 100))
    assert np.log([ratio.typical, ratio.low, ratio.high]) == pytest.approx([0.21, 0.15, 0.27], abs=0.0101)


def test_alarms_and_misses_under_heavy_tailed_noise():
    same, slow = ([typical_ratio(*heavy_tailed(seed, s, 0.02)) for seed in range(100)] for s in (0.0, 0.1))
    assert sum(ratio.is_slower(LIMIT) for ratio in same) <= 1
    assert sum(ratio.is_slower(LIMIT) for ratio in slow) >= 85
    assert sum(ratio.low <= 1 <= ratio.high for ratio in same) >= 90
    assert sum(ratio.low <= 1.1 <= ratio.high for ratio in slow) >= 90


def test_interval_too_wide_to_tell():
    assert Ratio(1.0, 0.96, 1.05).can_tell(0.05) and not Ratio(1.0, 0.95, 1.06).can_tell(0.05)
    assert not typical_ratio(*heavy_tailed(0, 0.1, 0.4)).can_tell(LIMIT)


WILD = [(1.0 + 9 * (i % 2), 1.0) for i in range(40)]


def test_either_clock_fails_head():
    for head, clock in (([(1.1, 1.0)] * 40, "wall time"), ([(1.0, 1.1)] * 40, "CPU time")):
        verdict = judge(STATIC, pairs_of(head), LIMIT)
        assert [text.partition(" is ")[0] for text in verdict.regressions] == [clock]
        assert verdict.regressions[0].endswith("1.100 times (95 % interval 1.100 to 1.100) base's, beyond 1.05")
        assert not judge(STATIC, pairs_of(head), 0.11).regressions
    assert exit_code([judge(STATIC, pairs_of([(0.5, 0.5)] * 40), LIMIT)]) == PASSES


def test_an_unsteady_clock_leaves_it_to_the_other():
    verdict = judge(STATIC, pairs_of(WILD), LIMIT)
    assert verdict.notes == ["wall time was too unsteady to tell; the other clock decides"]
    assert exit_code([verdict]) == PASSES
    slow = judge(STATIC, pairs_of([(wall, 1.1) for wall, _ in WILD]), LIMIT)
    assert exit_code([slow]) == REGRESSION


def test_two_unsteady_clocks_cannot_tell():
    verdict = judge(STATIC, pairs_of([(wall, wall) for wall, _ in WILD]), LIMIT)
    assert exit_code([verdict]) == CANNOT_TELL and "both clocks" in verdict.unclear[0]
    regression = judge(STATIC, pairs_of([(1.1, 1.1)] * 40), LIMIT)
    assert exit_code([verdict, regression]) == REGRESSION


@pytest.mark.parametrize("rule", ["low_confidence", "random", "sequential"])
def test_forwards_of_a_schedule_may_not_rise_at_all(rule):
    assert nfe_fault(rule, 1000, 1000) is None and nfe_fault(rule, 1000, 900) is None
    assert nfe_fault(rule, 1000, 1001) == "1001 forwards where there were 1000 (+0.1%), and none more is allowed"


@pytest.mark.parametrize("rule", ["threshold", "factor", "entropy"])
def test_forwards_of_the_other_rules_may_rise_by_a_hundredth(rule):
    assert nfe_fault(rule, 1000, 1010) is None
    assert nfe_fault(rule, 1000, 1011) == "1011 forwards where there were 1000 (+1.1%), and 1% more is allowed"


def test_a_rise_of_forwards_is_accepted_where_it_is_named():
    assert judge(STATIC, pairs_of(STEADY, nfe=101), LIMIT).regressions == [
        "4040 forwards where there were 4000 (+1.0%), and none more is allowed; if that is intended: "
        "--accept nfe=block-32-low_confidence"
    ]
    accepted = judge(STATIC, pairs_of(STEADY, nfe=101), LIMIT, accept_nfe=True)
    assert not accepted.regressions and accepted.notes[0].endswith("none more is allowed: accepted")
    unneeded = judge(STATIC, pairs_of(STEADY), LIMIT, accept_nfe=True)
    assert unneeded.notes == ["its forwards did not rise, so --accept was not needed"]
    # forwards alone are accepted, not time
    assert judge(STATIC, pairs_of([(1.1, 1.0)] * 40), LIMIT, accept_nfe=True).regressions


def test_other_tokens_are_told_and_not_judged():
    verdict = judge(STATIC, pairs_of(STEADY, answers=("a", "c")), LIMIT)
    assert verdict.notes == ["40 of 80 answers differ (2000 and 2000 tokens); this is not judged"]
    assert exit_code([verdict]) == PASSES
