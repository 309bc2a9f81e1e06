"""Speed of every configuration, and what it generated: the timed runs, whose grades test_accuracy.py reads."""

import math

import pytest


@pytest.mark.benchmark(group="throughput")
def test_throughput(benchmark, suite, case):
    run = suite.measure(case, benchmark)
    benchmark.extra_info.update(suite.extra_info(run))
    assert run.tokens > 0, "every answer is empty"
    assert math.isfinite(run.tokens_per_second)
