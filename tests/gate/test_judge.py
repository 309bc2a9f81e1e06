"""The gate's statistics where the truth is known, and its rules."""

import numpy as np
import pytest

from evals.gate.exits import CANNOT_TELL, FAILED, PASSES, REGRESSION
from evals.gate.judge import Margins, Ratio, exit_code, judge, judge_case, memory_fault, typical_ratio
from evals.gate.measure import Measurement
from evals.results.forwards import nfe_fault
from tests.gate.figures import LIMIT, MARGINS, PEAKS, STATIC, STEADY, rounds_of


def verdict_of(head, margins=MARGINS, peaks=PEAKS, accept_nfe=False, **figures):
    return judge_case(STATIC, rounds_of(head, **figures), peaks, margins, accept_nfe)


def shared_cores(seed, slowdown):
    """Twelve rounds of five pairs, as on a machine that others use too: rows of different lengths, processes of
    one code that are up to 2 % apart, and bursts that make every tenth unit up to six times as long."""
    rng = np.random.default_rng(seed)
    rounds = []
    for _ in range(12):
        work = rng.uniform(0.04, 0.1, 5)
        sides = []
        for factor in (1.0, 1 + slowdown):
            burst = np.where(rng.random(5) < 0.1, rng.uniform(1, 6, 5), 1)
            sides.append(work * factor * rng.uniform(0.99, 1.01) * burst * np.exp(0.01 * rng.standard_t(2, 5)))
        rounds.append(sides)
    return rounds


def test_ratio_of_steady_pairs():
    ratio = typical_ratio([([0.1, 0.2, 0.4], [0.11, 0.22, 0.44])] * 8)
    assert (ratio.typical, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    assert ratio.is_slower(0.05) and not ratio.is_slower(0.11) and ratio.can_tell(0.05)
    assert str(ratio) == "1.100 (1.100-1.100)"


def test_interval_of_known_ranks():
    # Wilcoxon's signed ranks of ten: they sum to at most 10 with a chance of .042, so that the interval begins at the
    # 11th of the 55 means, which of 1, 2, 4 ... 512 is that of 1 and 16, and ends at the 11th from above, 256
    ratio = typical_ratio([([1.0], [float(np.exp(2**i / 1000))]) for i in range(10)])
    assert np.log(ratio.low) * 1000 == pytest.approx(8.5) and np.log(ratio.high) * 1000 == pytest.approx(256)


def test_alarms_and_misses_on_shared_cores():
    same, small, large = ([typical_ratio(shared_cores(seed, s)) for seed in range(200)] for s in (0.0, 0.05, 0.1))
    assert sum(ratio.is_slower(0.025) for ratio in same) == 0
    assert sum(ratio.is_slower(0.025) for ratio in small) >= 150
    assert sum(ratio.is_slower(0.025) for ratio in large) >= 198
    # of the size of the margin: an alarm as often as the interval's end says
    assert sum(typical_ratio(shared_cores(seed, 0.025)).is_slower(0.025) for seed in range(200)) <= 20
    assert sum(ratio.low <= 1 <= ratio.high for ratio in same) >= 170


def test_interval_too_wide_to_tell():
    assert Ratio(1.0, 0.9, 1.1).can_tell(0.05) and not Ratio(1.0, 0.9, 1.11).can_tell(0.05)
    # wide, and yet it is certain that head is not slower
    assert Ratio(0.99, 0.8, 1.0).can_tell(0.05)
    # narrow, and it is neither certain that head is slower nor that it is not
    assert not Ratio(1.08, 1.04, 1.12).can_tell(0.05) and not Ratio(1.08, 1.04, 1.12).is_slower(0.05)


WILD = [(1.0 + 9 * (i // 5 % 2), 1.0) for i in range(40)]


def test_either_clock_fails_head():
    for head, clock in (([(1.1, 1.0)] * 40, "wall time"), ([(1.0, 1.1)] * 40, "CPU time")):
        verdict = verdict_of(head)
        assert [text.partition(" is ")[0] for text in verdict.regressions] == [clock]
        assert verdict.regressions[0].endswith("1.100 times (90 % interval 1.100 to 1.100) base's, beyond 1.05")
        assert not verdict_of(head, Margins(0.11)).regressions
    assert exit_code([verdict_of([(0.5, 0.5)] * 40)]) == PASSES


def test_an_unsteady_clock_leaves_it_to_the_other():
    verdict = verdict_of(WILD)
    assert verdict.notes == ["wall time was too unsteady to tell; the other clock decides"]
    assert exit_code([verdict]) == PASSES
    assert exit_code([verdict_of([(wall, 1.1) for wall, _ in WILD])]) == REGRESSION


def test_two_unsteady_clocks_cannot_tell():
    verdict = verdict_of([(wall, wall) for wall, _ in WILD])
    assert exit_code([verdict]) == CANNOT_TELL and "both clocks" in verdict.unclear[0]
    assert exit_code([verdict, verdict_of([(1.1, 1.1)] * 40)]) == REGRESSION


@pytest.mark.parametrize("rule", ["low_confidence", "random", "sequential"])
def test_forwards_of_a_schedule_may_not_rise_at_all(rule):
    assert nfe_fault(rule, 1000, 1000) is None and nfe_fault(rule, 1000, 900) is None
    assert nfe_fault(rule, 1000, 1001) == "1001 forwards where there were 1000 (+0.1%), and none more is allowed"


@pytest.mark.parametrize("rule", ["threshold", "factor", "entropy"])
def test_forwards_of_the_other_rules_may_rise_by_a_hundredth(rule):
    assert nfe_fault(rule, 1000, 1010) is None
    assert nfe_fault(rule, 1000, 1011) == "1011 forwards where there were 1000 (+1.1%), and 1% more is allowed"


def test_a_rise_of_forwards_is_accepted_where_it_is_named():
    assert verdict_of(STEADY, nfe=101).regressions == [
        "4040 forwards where there were 4000 (+1.0%), and none more is allowed; if that is intended: "
        "--accept nfe=block-32-low_confidence"
    ]
    accepted = verdict_of(STEADY, nfe=101, accept_nfe=True)
    assert not accepted.regressions and accepted.notes[0].endswith("none more is allowed: accepted")
    unneeded = verdict_of(STEADY, accept_nfe=True)
    assert unneeded.notes == ["its forwards did not rise, so --accept was not needed"]
    # forwards alone are accepted, not time
    assert verdict_of([(1.1, 1.0)] * 40, accept_nfe=True).regressions


def test_other_tokens_are_told_and_not_judged():
    verdict = verdict_of(STEADY, answers=("a", "c"))
    assert verdict.notes == ["40 of 80 answers differ (2000 and 2000 tokens); this is not judged"]
    assert exit_code([verdict]) == PASSES


def test_a_head_that_answers_nothing_fails():
    verdict = verdict_of([(0.1, 0.1)] * 40, answers=("", ""), tokens=0)
    assert verdict.regressions == ["it answers no token (2000 with base)"] and exit_code([verdict]) == REGRESSION


def test_memory_is_judged_by_its_own_margin():
    assert memory_fault("x take", 1000, 1050, 0.05) is None and memory_fault("x take", 1000, 900, 0.05) is None
    assert verdict_of(STEADY, peaks=(2_000_000, 2_200_000)).regressions == [
        "the tensors of a unit take 2.20 MB, 1.100 times base's 2.00, beyond 1.05"
    ]
    assert not verdict_of(STEADY, Margins(LIMIT, 0.2), (2_000_000, 2_200_000)).regressions
    found = Measurement("a", "b", {STATIC: rounds_of(STEADY)}, {STATIC: PEAKS}, held=(60_000_000, 66_000_000))
    verdicts, held = judge(found, MARGINS)
    assert held == "the tensors that stay between units take 66.00 MB, 1.100 times base's 60.00, beyond 1.05"
    assert exit_code(verdicts) == PASSES and exit_code(verdicts, held) == REGRESSION
    assert exit_code([], held) == FAILED
