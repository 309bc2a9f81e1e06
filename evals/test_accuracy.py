"""Accuracy of every configuration, source by source, on the generations that test_throughput.py timed."""

from pathlib import Path

import pytest

from evals.questions.graders import Grade
from evals.results.paired import pair
from evals.runs.configurations import extras, is_baseline, total_steps
from evals.runs.run import Run, by_source
from evals.runs.settings import SAMPLE, Case, Settings

# The lowest share of right answers, by source, allowed for the small model on sample_200.jsonl, in any mode, at one
# token a step. Well below its scores (its card has the figures): this catches a broken engine, not a bad day.
FLOORS = {"gsm8k": 0.75, "math500": 0.75, "mmlu": 0.625, "longbench_hotpotqa": 0.75}


def test_accuracy(suite, case, source):
    """A floor if one is known, and no more lost against `vanilla` on the same rows than --max-accuracy-loss."""
    settings = suite.settings
    if settings.is_dummy:
        pytest.skip("random weights answer at random")
    grades = grades_of(suite.result(case), settings, source)
    floor = FLOORS.get(source) if has_floor(settings, case) and len(grades) >= 8 else None
    if floor is not None:
        accuracy = sum(g.correct for g in grades) / len(grades)
        assert accuracy >= floor, f"{accuracy:.0%} of {len(grades)} right"
    vanilla = next((c for c in settings.cases if is_baseline(c, case)), None)
    if vanilla not in (None, case):
        both = pair(grades_of(suite.result(vanilla), settings, source), grades)
        assert both.lower() <= settings.max_accuracy_loss, (
            f"{both.lost} answers lost and {both.won} won of {both.n} against vanilla: with 95 % confidence a loss of "
            f"{100 * both.lower():.1f} points or more, over --max-accuracy-loss {100 * settings.max_accuracy_loss:g}"
        )
    elif floor is None:
        beside = (
            "vanilla is not measured beside it" if vanilla is None else "it is vanilla, what others are compared with"
        )
        pytest.skip(f"no floor is known for this configuration, and {beside}")


def grades_of(run: Run, settings: Settings, source: str) -> list[Grade]:
    """The grades of one source's rows, or of all."""
    return run.grades if source == "all" else by_source(run, settings)[source]


def has_floor(settings: Settings, case: Case) -> bool:
    """The floors hold for the small model on the project's own rows, with uncut answers and one token a step."""
    params = case.params
    one_a_step = params.unmasking == "low_confidence" and total_steps(params) >= params.max_tokens
    one_a_step = one_a_step and not extras(params)
    own_rows = Path(settings.dataset).resolve() == SAMPLE
    return settings.is_tiny and own_rows and one_a_step and params.max_tokens >= 128
