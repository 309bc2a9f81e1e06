"""What the accuracy tests let pass, and what they catch."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from evals import test_accuracy
from evals.questions.graders import Grade
from evals.results.paired import losses
from evals.results.wilson import wilson_interval
from evals.runs.run import Run
from evals.runs.settings import SAMPLE
from evals.test_accuracy import FLOORS
from tests.test_rows import MMLU


def test_wilson_interval_meets_published_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, 15 of 148, 0 of 20
    for correct, number, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        assert wilson_interval(correct, number) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("source", FLOORS)
@pytest.mark.parametrize("mode", ["vanilla_llada", "dual_cache", "block"])
def test_the_floors_catch_an_engine_that_answers_wrongly(settings, source, mode):
    """Of 8 rows: the floor's share right passes, one row less fails."""
    s = settings(dataset=str(SAMPLE), num_samples=32)
    case = next(c for c in s.cases if c.mode == mode)
    enough = math.ceil(FLOORS[source] * 8)
    assert 4 < enough < 7

    def suite(right):
        correct = iter([True] * right + [False] * 8)
        grades = [Grade(row["source"] == source and next(correct), 0.0) for row in s.rows]
        run = Run(case, [], grades, [1.0], 1, None)
        return SimpleNamespace(settings=s, result=lambda _: run, runs={})

    test_accuracy.test_accuracy(suite(enough), case, source)
    with pytest.raises(AssertionError, match=f"{100 * (enough - 1) / 8:.0f}% of 8 right"):
        test_accuracy.test_accuracy(suite(enough - 1), case, source)


def test_the_floors_are_for_the_small_model_on_its_own_rows_at_one_token_a_step(settings, tmp_path):
    def floors(**changed):
        changed = {"dataset": str(SAMPLE), "num_samples": 32, "mode": ["block"]} | changed
        return {test_accuracy.has_floor(s, case) for s in [settings(**changed)] for case in s.cases}

    assert floors() == floors(mode=["all"]) == floors(block_length=[8, 32]) == {True}
    assert floors(model="other") == floors(max_tokens=64) == floors(denoising_steps=4) == {False}
    assert floors(unmasking=["threshold"]) == floors(block_add_threshold=0.5) == floors(suffix_window=8) == {False}
    other = tmp_path / SAMPLE.name
    other.write_bytes(SAMPLE.read_bytes())
    assert floors(dataset=str(other)) == {False}


@pytest.mark.parametrize(("mode", "why"), [("vanilla", "it is vanilla, what others"), ("block", "vanilla is not meas")])
def test_what_is_not_judged_says_why(settings, mode, why):
    (case,) = (s := settings(mode=[mode], unmasking=["threshold"])).cases
    run = Run(case, [], [Grade(True, 1.0)] * len(s.rows), [1.0], 1, None)
    with pytest.raises(pytest.skip.Exception, match=f"no floor is known for this configuration, and {why}"):
        test_accuracy.test_accuracy(SimpleNamespace(settings=s, result=lambda _: run, runs={}), case, "all")


@pytest.mark.parametrize(("lost", "fails"), [(0, False), (3, False), (4, True), (8, True)])
@pytest.mark.parametrize("source", ["mmlu", "all"])
def test_a_loss_against_vanilla_is_judged_on_the_same_rows(settings, source, lost, fails):
    """Of 8 rows, three lost may be chance at a true loss of 3 points; four are not."""
    dataset_rows = [MMLU | {"id": f"r{i}"} for i in range(8)]
    s = settings(mode=["vanilla", "block"], unmasking=["threshold"])
    s = dataclasses.replace(s, rows=dataset_rows)
    vanilla, block = s.cases
    grades = {vanilla: [Grade(True, 1.0)] * 8, block: [Grade(i >= lost, 0.0) for i in range(8)]}
    runs = {case: Run(case, [], grades[case], [1.0], 1, None) for case in s.cases}
    suite = SimpleNamespace(settings=s, result=runs.__getitem__, runs=runs)
    if not fails:
        test_accuracy.test_accuracy(suite, block, source)
    else:
        with pytest.raises(AssertionError, match=f"{lost} answers lost and 0 won of 8 against vanilla: with 95 %"):
            test_accuracy.test_accuracy(suite, block, source)
    lines = losses(list(runs.values()), s.max_accuracy_loss)
    assert len(lines) == 2 and lines[1].split()[:5] == ["block", "32", "threshold", str(lost), "0"]
    assert lines[1].endswith("rows to rule out 3")
