"""--benchmark-compare and --benchmark-compare-fail: cases that pytest-benchmark ignores silently or fails on."""

import os
from typing import Any

import pytest
from pytest_benchmark.session import BenchmarkSession

from evals.files.outputs import add_failure
from evals.results.reader import BadFile, check_content, read_file
from evals.runs.configurations import is_configuration

# Those of the other run's statistics that pytest-benchmark's tables need.
_STATS = ("min", "max", "mean", "stddev", "median", "iqr", "outliers", "ops", "rounds", "iterations")


def check_option(compared: Any) -> None:
    """Raises pytest.UsageError for a file that does not exist or is not of --benchmark-json; pytest-benchmark only
    warns of these. A number, or the beginning of one, names a run of the history."""
    if not isinstance(compared, str):
        return
    if os.path.isfile(compared):
        try:
            read_file(compared)
        except BadFile as error:
            raise pytest.UsageError(f"--benchmark-compare: {error}") from error
        return
    # pytest-benchmark's history finds no deeper paths, and ends in a traceback
    if compared.endswith(".json") or compared.count("/") > 1:
        raise pytest.UsageError(f"--benchmark-compare: there is no file {compared!r}")


def check_compared(config: pytest.Config, content: dict[str, Any]) -> None:
    """Checks a file to compare with. Raises pytest.UsageError that names the field which is wrong."""
    about = f"--benchmark-compare: {config.getoption('benchmark_compare')}"
    try:
        file = check_content(content, about)
    except BadFile as error:
        raise pytest.UsageError(str(error)) from error
    for raw, benchmark in zip(content["benchmarks"], file.benchmarks, strict=True):
        lacks = [key for key in _STATS if benchmark.stats is None or getattr(benchmark.stats, key) is None]
        lacks = [f"stats: {key}" for key in lacks] + ["fullname"] * (raw.get("fullname") is None)
        if lacks:
            raise pytest.UsageError(f"{about}: {benchmark.name!r:.80}: {lacks[0]}: a value is required, there is none")


def check_collected(session: pytest.Session, benchmarks: BenchmarkSession) -> None:
    """Ends a session of --benchmark-compare-fail before it runs, if the other run has none of its tests."""
    known = _known(benchmarks)
    if benchmarks.compare_fail and not any(item.nodeid in known for item in session.items):
        names = ", ".join(sorted(known)[:3]) or "no test that can be compared here"
        message = f"--benchmark-compare-fail: there is nothing to compare: the other run has {names}"
        pytest.exit(f"{message}, and none of the {len(session.items)} tests chosen", pytest.ExitCode.USAGE_ERROR)


def tell_compared(config: pytest.Config, reporter: pytest.TerminalReporter, benchmarks: BenchmarkSession) -> None:
    """After the run: lists what --benchmark-compare-fail has not judged. If that is everything, the session fails."""
    if not benchmarks.compare_fail:
        return
    known = _known(benchmarks)
    others = [b for b in benchmarks.benchmarks if b and b.fullname not in known]
    if len(others) == len([b for b in benchmarks.benchmarks if b]):
        add_failure(config, "--benchmark-compare-fail: nothing was compared, so nothing is known to be as fast")
        return
    names = ", ".join(b.name for b in others if is_configuration(b.extra_info))
    if names:
        reporter.write_line(f"--benchmark-compare-fail: not compared, since the other run has it not: {names}")


def _known(benchmarks: BenchmarkSession) -> set[str]:
    return {name for mapping in (benchmarks.compared_mapping or {}).values() for name in mapping}
