"""Accuracy of every configuration, source by source, on the generations that test_throughput.py timed."""

from math import comb
from pathlib import Path

import pytest

from evals.record import by_source, is_baseline
from evals.settings import SAMPLE, Case, Settings, total_steps

# The least share of right answers, by source, that the small model may have on sample_200.jsonl, in any mode, at one
# token a step. Well below what it scores (its card has the figures): this catches a broken engine, not a bad day. At
# two-hop questions it guesses, which leaves nothing to fall below.
FLOORS = {"gsm8k": 0.375, "math500": 0.5, "mmlu": 0.5}


def test_accuracy(suite, case, source):
    if suite.settings.is_dummy:
        pytest.skip("random weights answer at random")
    run = suite.result(case)
    grades = by_source(run, suite.settings)[source]
    accuracy = sum(g.correct for g in grades) / len(grades)
    if source in FLOORS and has_floor(suite.settings, case) and len(grades) >= 8:
        assert accuracy >= FLOORS[source], f"{accuracy:.0%} of {len(grades)} right"
        return
    vanilla = next((c for c in suite.settings.cases if is_baseline(c, case)), None)
    if vanilla in (None, case):
        pytest.skip("no floor is known for this configuration, and vanilla, to compare with, is not measured beside it")
    before = by_source(suite.result(vanilla), suite.settings)[source]
    lost = sum(b.correct and not g.correct for b, g in zip(before, grades, strict=True))
    won = sum(g.correct and not b.correct for b, g in zip(before, grades, strict=True))
    assert sign_test(lost, won) >= 0.01, f"{lost} answers lost and {won} won against vanilla on {len(grades)} rows"


def has_floor(settings: Settings, case: Case) -> bool:
    """The floors hold for the small model on the project's own rows, answers not cut short, one token a step."""
    params = case.params
    one_a_step = params.unmasking == "low_confidence" and total_steps(params) >= params.max_tokens
    own_rows = Path(settings.dataset).resolve() == SAMPLE
    return settings.is_tiny and own_rows and one_a_step and params.max_tokens >= 128


def sign_test(lost: int, won: int) -> float:
    """The chance of `lost` or more losses among the rows that changed, were loss and gain equally likely."""
    changed = lost + won
    return sum(comb(changed, k) for k in range(lost, changed + 1)) / 2**changed
