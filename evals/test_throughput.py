"""Speed of every configuration, and what it generated: the timed runs, whose grades test_accuracy.py reads."""

import math

import pytest

from evals.runs.configurations import RESUMED


@pytest.mark.benchmark(group="throughput")
@pytest.mark.usefixtures("comparable")
def test_throughput(benchmark, suite, case):
    run = suite.measure(case, benchmark)
    benchmark.extra_info.update(suite.extra_info(run))
    if run.resumed and benchmark.enabled:
        # only the rest was timed: under a name that no history and no gate compares
        benchmark.stats.name += RESUMED
        benchmark.stats.fullname += RESUMED
        benchmark.stats.group = "resumed: the time of the rest alone"
    assert run.tokens > 0, "every answer is empty"
    assert run.resumed or math.isfinite(run.tokens_per_second)
