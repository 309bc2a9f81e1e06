"""How often a configuration is timed, when its rounds are steady, and how well a ratio of two is known."""

import math
import random
from types import SimpleNamespace

import pytest

from evals.results.comparison import SpeedUp
from evals.results.table import table
from evals.runs.rounds import Round, is_enough, ratio_factor, standard_error, steadiness


def rounds(*seconds, **counts):
    return [Round(one, 10, **counts) for one in seconds]


def test_a_configuration_that_fails_is_not_run_again_for_every_source(make_suite, chat_llm, monkeypatch):
    calls = []

    def fails(*args, **options):
        calls.append(1)
        raise FloatingPointError("broken")

    suite = make_suite(mode=["block"])
    (case,) = suite.settings.cases
    monkeypatch.setattr(chat_llm, "generate", fails)
    for run in (lambda: suite.measure(case, None), lambda: suite.result(case)):
        with pytest.raises(FloatingPointError, match="broken"):
            run()
    assert calls == [1]


@pytest.mark.parametrize(
    ("seconds", "budget", "error", "enough"),
    [
        ([1.0], 0.0, 0.01, True),
        ([1.0], 60.0, 0.01, False),
        ([1.0, 1.0], 60.0, 0.01, False),
        ([1.0, 1.0, 1.0], 60.0, 0.01, True),
        ([1.0, 1.2, 1.4], 60.0, 0.01, False),
        ([1.2, 1.0, 1.4], 60.0, 0.1, True),
        ([1.0, 1.2, 1.4], 4.0, 0.01, True),
        # the first is not steady and does not count
        ([9.0, 1.0, 1.0], 60.0, 0.01, False),
        ([9.0, 1.0, 1.0, 1.0], 60.0, 0.01, True),
    ],
)
def test_rounds_go_on_until_the_mean_is_known_or_the_time_is_over(seconds, budget, error, enough):
    assert is_enough(rounds(*seconds), budget, error) == enough


def test_the_standard_error_is_a_share_of_the_mean():
    assert standard_error([2.0]) is None
    assert standard_error([2.0, 4.0]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("timed", "steady", "fault", "left"),
    [
        (rounds(1.0), None, None, 1),
        (rounds(1.029, 1.0, 1.0), True, None, 3),
        (rounds(0.971, 1.0, 1.0), True, None, 3),
        (rounds(1.04, 1.0, 0.9, 1.1), False, "the first round took +4.0 % on the others' median", 3),
        (rounds(0.95, 1.0), False, "the first round took -5.0 % on the others' median", 1),
        # a later one is chance, not a warm-up
        (rounds(1.0, 1.0, 2.0, 1.0), True, None, 4),
        (
            rounds(1.0, graphs=2) + rounds(1.0) + rounds(1.0, compiled=3) + rounds(1.0),
            *(False, "captured 2 CUDA graphs and compiled 3 kernels in rounds 1, 3", 1),
        ),
        (
            rounds(1.0, compiled=1),
            *(False, "captured 0 CUDA graphs and compiled 1 kernels in round 1, and there is none after", 1),
        ),
    ],
)
def test_rounds_that_are_not_steady_are_told_and_left_out(timed, steady, fault, left):
    assert steadiness(timed) == (steady, fault, timed[-left:])


def test_the_ratio_of_single_rounds_is_not_known():
    assert ratio_factor(rounds(1.0), rounds(2.0)) is ratio_factor(rounds(1.0), rounds(2.0, 2.0)) is None


def test_the_ratio_of_rounds_has_the_error_of_both():
    # each has a standard error of 0.0577 of its mean, and Student's t of two degrees of freedom is 4.30
    assert ratio_factor(rounds(0.9, 1.0, 1.1), rounds(1.8, 2.0, 2.2)) == pytest.approx(
        math.exp(4.30 * 0.08165), rel=1e-3
    )


def side_by_side(draw, noise):
    """A round of two configurations whose true ratio is 4, part by part, on a machine whose speed wanders widely."""
    speed, parts = 1.0, []
    for part in range(128):
        speed *= math.exp(draw.gauss(0, 0.1))
        # some parts are all of one length, as where a block begins
        work = 1 + (part % 32 == 0)
        parts.append([work * share / speed * math.exp(draw.gauss(0, noise)) for share in (1, 4)])
    return [[Round(sum(one), 10, parts=one)] for one in zip(*parts, strict=True)]


def test_an_interval_of_parts_holds_the_ratio_as_often_as_it_says():
    draw, held, widths = random.Random(0), 0, []
    for _ in range(400):
        a, b = side_by_side(draw, noise=0.2)
        ratio, factor = b[0].seconds / a[0].seconds, ratio_factor(a, b)
        held += ratio / factor <= 4 <= ratio * factor
        widths.append(factor)
    assert 0.92 <= held / 400 <= 0.98 and max(widths) < 1.15


def test_the_table_says_what_is_known_of_a_ratio(make_suite):
    def lines(**options):
        suite = make_suite(**options)
        suite.timed = suite.settings.cases
        timer = SimpleNamespace(enabled=False, pedantic=lambda function, rounds: function())
        return table([suite.measure(case, timer) for case in suite.settings.cases])

    vanilla, block = lines(max_seconds=0.0)[1:]
    assert vanilla.endswith(" 1") and block.endswith(")") and block.count("(") == 2


def test_rounds_that_captured_are_told_and_do_not_count(make_suite, chat_llm, monkeypatch):
    generate, calls = chat_llm.generate, iter(range(9))

    def captures(*args, **options):
        # the warm-up is allowed to, the first timed round is not
        if next(calls) < 2:
            chat_llm.engine.runner.stats.graphs += 3
        return generate(*args, **options)

    monkeypatch.setattr(chat_llm, "generate", captures)
    timer = SimpleNamespace(enabled=True, stats=SimpleNamespace(stats=SimpleNamespace(data=[0.0])))
    timer.pedantic = lambda function, rounds: function()
    suite = make_suite(mode=["block"])
    run = suite.measure(suite.settings.cases[0], timer)
    info = suite.extra_info(run)
    assert info["steady"] is False and info["rounds"] == len(run.seconds) == 3
    assert info["unsteady"] == "captured 3 CUDA graphs and compiled 0 kernels in round 1"
    assert timer.stats.stats.data == run.seconds and next(calls) == 5
    assert table([run])[-1] == f"block 8 is not steady: {info['unsteady']}"
    assert info["first_seconds"] > 0 and info["graphs"] == 0, "when it was loaded"


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (SpeedUp(3.456, (3.0, 9.999)), "3.46 (3.00-10.00)"),
        (SpeedUp(17.04, (12.34, 123.5)), "17.0 (12.3-124)"),
        (SpeedUp(0.361, None), "0.36 one round"),
    ],
)
def test_a_ratio_is_short_enough_for_its_column(ratio, text):
    assert str(ratio) == text and len(text) < 18


def test_what_was_timed_alone_in_one_round_has_no_interval(make_suite):
    suite = make_suite()
    runs = [suite.result(case) for case in suite.settings.cases]
    block = table(runs)[2]
    assert block.endswith(" one round")
