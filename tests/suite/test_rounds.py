"""How often a configuration is timed."""

from types import SimpleNamespace

import pytest
import torch

from evals.record import is_enough, standard_error
from evals.suite import Suite


def test_a_configuration_that_fails_is_not_run_again_for_every_source(settings):
    calls = []

    def fails(*args, **options):
        calls.append(1)
        raise FloatingPointError("broken")

    s = settings(mode=["block"])
    engine = SimpleNamespace(config=SimpleNamespace(max_model_len=512, dtype=torch.float32), tokenizer=None)
    suite = object.__new__(Suite)
    suite.llm, suite.settings, suite.runs, suite.failed, suite.found, suite.prompts = engine, s, {}, {}, {}, [{}]
    suite.kept = None
    for run in (lambda: suite.measure(s.cases[0], SimpleNamespace(pedantic=fails)), lambda: suite.result(s.cases[0])):
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
        ([1.0, 1.2, 1.4], 60.0, 0.1, True),
        ([1.0, 1.2, 1.4], 4.0, 0.01, True),
    ],
)
def test_rounds_go_on_until_the_mean_is_known_or_the_time_is_over(seconds, budget, error, enough):
    assert is_enough(seconds, budget, error) == enough


def test_the_standard_error_is_a_share_of_the_mean():
    assert standard_error([2.0]) is None
    assert standard_error([2.0, 4.0]) == pytest.approx(1 / 3)
