"""Accuracy of every configuration, source by source, on the generations that test_throughput.py timed."""

from math import comb

import pytest

from evals.record import by_source

# The least share of right answers, by source, that the small model may have on sample_200.jsonl, in any mode, at one
# token a step. Well below what it scores (its card has the figures): this catches a broken engine, not a bad day.
FLOORS = {"gsm8k": 0.0, "math500": 0.0, "mmlu": 0.25, "longbench_hotpotqa": 0.0}


def test_accuracy(suite, case, source):
    if suite.settings.is_dummy:
        pytest.skip("random weights answer at random")
    run = suite.result(case)
    grades = by_source(run, suite.settings)[source]
    accuracy = sum(g.correct for g in grades) / len(grades)
    if suite.settings.is_tiny and len(grades) >= 8 and case.params.max_tokens >= 128:
        assert accuracy >= FLOORS[source], f"{accuracy:.0%} of {len(grades)} right"
        return
    baseline = next((c for c in suite.runs if c.mode == "vanilla" and c.block_length == case.block_length), None)
    if baseline in (None, case):
        pytest.skip("no floor is known for this model, and there is no other run to compare with")
    before = by_source(suite.runs[baseline], suite.settings)[source]
    lost = sum(b.correct and not g.correct for b, g in zip(before, grades, strict=True))
    won = sum(g.correct and not b.correct for b, g in zip(before, grades, strict=True))
    assert sign_test(lost, won) >= 0.01, f"{lost} answers lost and {won} won against vanilla on {len(grades)} rows"


def sign_test(lost: int, won: int) -> float:
    """The chance of `lost` or more losses among the rows that changed, were loss and gain equally likely."""
    changed = lost + won
    return sum(comb(changed, k) for k in range(lost, changed + 1)) / 2**changed
