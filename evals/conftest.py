"""The suite's fixtures: the model, the session's measurements, and the files written at its end."""

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.session import PerformanceRegression

from blockinfer import LLM
from evals.files.outputs import add_failure, attempt, guard, tell_failures
from evals.questions.graders import require
from evals.results.benchmark_compare import check_collected, check_compared, check_option, tell_compared
from evals.results.compare import differences
from evals.results.comparison import intervals, write_comparison
from evals.results.likelihood import table as likelihood_table
from evals.results.paired import against_vanilla, losses
from evals.results.record import question
from evals.results.samples import Samples
from evals.results.table import (
    aup_lines,
    first_pass_line,
    loading_line,
    number_format,
    table,
    unextracted_lines,
)
from evals.runs.configurations import KERNEL, LIKELIHOOD, SERVING, STEP, has_figures, is_configuration, variant
from evals.runs.machine import slug
from evals.runs.resume import Generations
from evals.runs.settings import Case, Settings, read_settings
from evals.suite import Suite
from evals.timing.kernels import table as kernel_table
from evals.timing.serving import table as serving_table
from evals.timing.steps import table as step_table

SETTINGS = pytest.StashKey[Settings]()
SUITE = pytest.StashKey[Suite]()
WRITTEN = pytest.StashKey[bool]()  # the file of --output
COMPARED = pytest.StashKey[dict[str, list[dict[str, Any]]]]()  # extra_info by test, of --benchmark-compare
BENCHMARKS = "pytest-benchmark"  # the plugin's session
ENDING = pytest.StashKey[bool]()  # whether SIGTERM ended the session; set only at the end
# On a CPU they only show that all of this runs.
OF_A_GPU = ("test_steps.py", "test_kernels.py")
SERVER = "test_serving.py"


class Terminated(KeyboardInterrupt):
    """SIGTERM, from `timeout`, SLURM or a CI runner, ends the session as Ctrl-C does."""


def settings_of(config: pytest.Config) -> Settings:
    if SETTINGS not in config.stash:
        config.stash[SETTINGS] = read_settings(config)
    return config.stash[SETTINGS]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-benchmark's own, which opens its storage and reads the file of --benchmark-compare."""
    # here a usage error ends the session with one line; during collection it would be a traceback
    settings = settings_of(config)
    if config.getoption("benchmark_storage") == "file://./.benchmarks":
        config.option.benchmark_storage = f".benchmarks/{slug(settings.device_name)}"
    check_option(config.getoption("benchmark_compare"))
    # the parent process may have set it to be ignored
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, partial(_terminate, config))
        config.add_cleanup(partial(signal.signal, signal.SIGTERM, signal.SIG_DFL))


def _terminate(config: pytest.Config, number: int, frame: Any) -> None:
    # a write in progress is not interrupted
    if ENDING not in config.stash:
        config.stash[ENDING] = True
        raise Terminated("SIGTERM")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Checks what pytest-benchmark itself reports only after the whole run."""
    config = session.config
    guard(config, config.pluginmanager.getplugin(BENCHMARKS))
    if config.getoption("benchmark_compare_fail") and not config.pluginmanager.getplugin(BENCHMARKS).compared_mapping:
        storage = config.getoption("benchmark_storage")
        raise pytest.UsageError(f"--benchmark-compare-fail: there is nothing to compare with; the history is {storage}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Ids: mode-block_length, then the rule unless it is plain low_confidence, options not at their defaults, and tp2
    for two ranks; for the accuracy, the source comes before them."""
    if "case" not in metafunc.fixturenames:
        return
    settings = settings_of(metafunc.config)
    cases = settings.cases
    ranks = f"-tp{settings.tensor_parallel_size}" * (settings.tensor_parallel_size > 1)
    named = [_id(case, settings.several_rules) + ranks for case in cases]
    values = [(c.mode, c.block_length, c.unmasking) for c in cases]
    if "source" in metafunc.fixturenames:
        sources = list(dict.fromkeys(row["source"] for row in settings.rows))
        metafunc.parametrize("source", sources + ["all"] * (len(sources) > 1))
    metafunc.parametrize(("mode", "block_length", "unmasking"), values, ids=named)


def _id(case: Case, several_rules: bool) -> str:
    parts = [case.mode, str(case.block_length), case.unmasking * several_rules, variant(case.params)]
    return "-".join(filter(None, parts))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    files = () if _wants_steps_and_kernels(config) else OF_A_GPU
    # it takes time, and the other figures do not need it
    files += () if settings_of(config).device == "cuda" or config.getoption("keyword") else (SERVER,)
    named = {Path(arg.partition("::")[0]).absolute() for arg in config.args}
    left_out = [item for item in items if item.path.name in files and item.path not in named]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    if config.getoption("--mmlu") != "likelihood":
        # without it there is nothing to show, so nothing is reported as left out
        items[:] = [item for item in items if item.path.name != "test_likelihood.py"]
    # the timed runs first, as they show what is wrong with model or rows; the accuracy tests read their generations;
    # the steps have a model of their own, and the kernels none
    order = {"test_accuracy.py": 1, "test_likelihood.py": 1, "test_steps.py": 2, "test_kernels.py": 3, SERVER: 4}
    # on a CPU the configurations of one rule run side by side: all finish before the next rule's begin
    rules = list(dict.fromkeys(case.unmasking for case in settings_of(config).cases))
    first = {item: rules.index(item.callspec.params["unmasking"]) for item in items if _is_throughput(item)}
    items.sort(key=lambda item: (order.get(item.path.name, 0), first.get(item, 0)))


def _is_throughput(item: pytest.Item) -> bool:
    return item.path.name == "test_throughput.py" and hasattr(item, "callspec")


def _wants_steps_and_kernels(config: pytest.Config) -> bool:
    """Whether files that are not named by their paths take part."""
    option = config.getoption
    return settings_of(config).device == "cuda" or option("--steps-and-kernels") or bool(option("keyword"))


def pytest_collection_finish(session: pytest.Session) -> None:
    check_collected(session, session.config.pluginmanager.getplugin(BENCHMARKS))


def close_suite(config: pytest.Config) -> None:
    """For tests that need the GPU memory which the suite's engine holds until its last test."""
    if SUITE in config.stash:
        config.stash[SUITE].close()
    gc.collect()
    if settings_of(config).device == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def case(request: pytest.FixtureRequest, mode: str, block_length: int, unmasking: str) -> Case:
    """The configuration that the test's parameters name."""
    cases = settings_of(request.config).cases
    return next(c for c in cases if (c.mode, c.block_length, c.unmasking) == (mode, block_length, unmasking))


@pytest.fixture(scope="session")
def session_suite(request: pytest.FixtureRequest) -> Iterator[Suite]:
    settings = settings_of(request.config)
    with ExitStack() as stack:
        try:
            kept = stack.enter_context(Generations(settings.resume)) if settings.resume else None
            samples = stack.enter_context(Samples(settings.samples)) if settings.samples else None
            if not settings.is_dummy:
                require(settings.rows)
            llm = LLM(
                settings.model,
                tokenizer=settings.tokenizer,
                max_num_seqs=settings.batch_size,
                **settings.engine_options,
            )
            stack.enter_context(llm)
            if llm.tokenizer is None:
                raise ValueError(f"{settings.model} has no tokenizer to ask the rows with; pass --tokenizer")
            suite = Suite(llm, settings, kept, _timed(request.session), samples)
        except (ValueError, ImportError, OSError) as error:
            # every test would fail alike
            pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
        request.config.stash[SUITE] = suite
        yield suite


def _timed(session: pytest.Session) -> list[Case]:
    """The configurations whose throughput tests were not deselected."""
    tests = filter(_is_throughput, session.items)
    chosen = [tuple(item.callspec.params[k] for k in ("mode", "block_length", "unmasking")) for item in tests]
    cases = settings_of(session.config).cases
    return [case for case in cases if (case.mode, case.block_length, case.unmasking) in chosen]


@pytest.fixture
def suite(session_suite: Suite, capsys: pytest.CaptureFixture[str]) -> Suite:
    session_suite.uncaptured = capsys.disabled
    return session_suite


@pytest.fixture
def comparable(request: pytest.FixtureRequest, suite: Suite, case: Case) -> None:
    refuse_others(request, question(case, suite.settings, suite.truncated, suite.environment))


def refuse_others(request: pytest.FixtureRequest, asked: dict[str, Any]) -> None:
    """Ends the session if the run of --benchmark-compare has other rows or settings, since its times then differ
    too."""
    for there in request.config.stash.get(COMPARED, {}).get(request.node.nodeid, []):
        found = differences(there, asked)
        if found:
            message = f"--benchmark-compare: {request.node.name}: {'; '.join(found)}"
            pytest.exit(message, returncode=pytest.ExitCode.USAGE_ERROR)


def pytest_report_header(config: pytest.Config) -> list[str]:
    settings = settings_of(config)
    weights = "random weights" if settings.is_dummy else settings.model
    where = "the GPU" if settings.device == "cuda" else "the CPU"
    where += f", shared by {settings.tensor_parallel_size} ranks" * (settings.tensor_parallel_size > 1)
    small = " (the small model: pass --model for another)" if settings.is_tiny and not settings.is_dummy else ""
    part = f" (shard {settings.shard.index}/{settings.shard.of})" if settings.shard else ""
    number = f"{len(settings.rows)} rows{part}, {settings.batch_size} at once, up to {settings.max_tokens} tokens"
    lines = [f"blockinfer: {weights}{small} on {where}, {number}"]
    if not _wants_steps_and_kernels(config):
        lines.append("steps and kernels are for a GPU and left out here: name their files, or pass --steps-and-kernels")
        lines.append("a live server is timed where evals/test_serving.py is named")
    return lines


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    """After pytest-benchmark's tables, which are long, and after its verdict, which may have ended in a traceback."""
    try:
        yield
    except PerformanceRegression:
        config.pluginmanager.getplugin("session").exitstatus = pytest.ExitCode.TESTS_FAILED
    except Exception as error:
        # for example a damaged file to compare with: the suite's own tables do not depend on it
        add_failure(config, f"pytest-benchmark's tables: {type(error).__name__}: {error}")
    _write_tables(terminalreporter, config)
    suite = config.stash.get(SUITE, None)
    if suite is not None and suite.kept is not None and suite.kept.lost:
        add_failure(config, suite.kept.told_lost())
    if suite is not None and suite.samples is not None and suite.samples.lost:
        add_failure(config, suite.samples.told_lost())
    tell_compared(config, terminalreporter, config.pluginmanager.getplugin(BENCHMARKS))
    tell_failures(config, terminalreporter)


def _write_tables(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    benchmarks = config.pluginmanager.getplugin(BENCHMARKS).benchmarks
    # a test that failed while being timed has no figures
    tables = ("kernels", KERNEL, kernel_table), ("steps", STEP, step_table), ("mmlu", LIKELIHOOD, likelihood_table)
    tables += (("serving", SERVING, serving_table),)
    for title, marker, lines in tables:
        timed = [b.extra_info for b in benchmarks if marker in b.extra_info and has_figures(b.extra_info)]
        if timed:
            terminalreporter.section(title)
            for line in lines(timed):
                terminalreporter.write_line(line)
    suite = config.stash.get(SUITE, None)
    if suite is not None and not suite.runs and not suite.failed:
        kept = "the same command goes on" if suite.settings.resume else "with --resume FILE its answers would be kept"
        terminalreporter.write_line(f"blockinfer: stopped before a configuration was through; {kept}")
    if suite is None or not suite.runs:
        return
    about = suite.environment
    place = suite.settings.device_name
    terminalreporter.section("blockinfer")
    terminalreporter.write_line(f"{about['model']} ({about['weights']} weights), {number_format(about)}, {place}")
    terminalreporter.write_line(
        f"{len(suite.prompts)} rows of {about['dataset']}, {suite.settings.batch_size} at once, "
        f"up to {suite.settings.max_tokens} tokens"
    )
    if suite.truncated:
        terminalreporter.write_line(f"{suite.truncated} prompts were cut in the middle of their context to fit")
    for line in table(list(suite.runs.values())):
        terminalreporter.write_line(line)
    terminalreporter.write_line(
        "standard: vanilla_llada; accuracy and ratios with 95 % intervals; NFE: forwards summed over requests"
    )
    terminalreporter.write_line(loading_line(suite.loading))
    if first := first_pass_line(list(suite.runs.values())):
        terminalreporter.write_line(first)
    for line in losses(list(suite.runs.values()), suite.settings.max_accuracy_loss):
        terminalreporter.write_line(line)
    for line in aup_lines(list(suite.runs.values())):
        terminalreporter.write_line(line)
    for line in unextracted_lines(list(suite.runs.values()), suite.settings):
        terminalreporter.write_line(line)
    if config.stash.get(WRITTEN, False):
        terminalreporter.write_line(f"written to {suite.settings.output}")
    if suite.samples is not None and not suite.samples.lost:
        terminalreporter.write_line(f"answers: {suite.samples.path}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Before pytest-benchmark writes its file: removes benchmarks that Ctrl-C left without a round, which it cannot
    write, or without figures."""
    terminated = session.config.stash.setdefault(ENDING, False)
    benchmarks = session.config.pluginmanager.getplugin(BENCHMARKS).benchmarks
    benchmarks[:] = [benchmark for benchmark in benchmarks if benchmark and has_figures(benchmark.extra_info)]
    suite = session.config.stash.get(SUITE, None)
    if suite is not None and suite.runs and suite.settings.output != os.devnull:
        with attempt(session.config, "--output"):
            write_comparison(suite.settings.output, list(suite.runs.values()), suite.settings, suite.environment)
            session.config.stash[WRITTEN] = True
    yield
    if terminated:
        session.exitstatus = 128 + signal.SIGTERM


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    """Adds what needs all configurations: the paired loss of each against `vanilla`."""
    suite = config.stash.get(SUITE, None)
    for benchmark in output_json["benchmarks"] if suite else []:
        info = benchmark["extra_info"]
        for run in suite.runs.values():
            case = run.case
            if (case.mode, case.block_length, case.unmasking) == tuple((benchmark["params"] or {}).values()):
                runs = list(suite.runs.values())
                info |= {"against_vanilla": against_vanilla(run, runs)} | intervals(run, runs)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """What decides whether two runs can be compared; no host name."""
    return {
        "device": settings_of(config).device_name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(config, benchmarksession, machine_info, compared_benchmark) -> None:
    check_compared(config, compared_benchmark)
    there = compared_benchmark.get("machine_info", {}).get("device", "a device that its file does not name")
    if there != machine_info["device"]:
        raise pytest.UsageError(
            f"--benchmark-compare: this run is on {machine_info['device']}, the other was on {there}"
        )
    if settings_of(config).device == "cpu":
        # microseconds of the kernels' twins are no bound, nor are the few steps of a small model
        others = compared_benchmark["benchmarks"]
        compared_benchmark["benchmarks"] = [other for other in others if is_configuration(other["extra_info"])]
    compared = config.stash.setdefault(COMPARED, {})
    for other in compared_benchmark["benchmarks"]:
        compared.setdefault(other["fullname"], []).append(other["extra_info"])
