"""The suite's fixtures: the model, the session's measurements, and what is written when they are done."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.capture import CaptureManager
from pytest_benchmark.fixture import BenchmarkFixture

from blockinfer import LLM, RequestOutput
from evals.compare import differences
from evals.graders import grade, require
from evals.machine import device_name, slug
from evals.paired import against_vanilla, losses
from evals.record import Run, environment, extra_info, is_enough, question, table, write_comparison
from evals.reference_impl import ReferenceLLM
from evals.resume import Generations, fingerprint, settings_hash
from evals.rows import encode
from evals.settings import REFERENCE_IMPL, Case, Settings, read_settings

SETTINGS = pytest.StashKey[Settings]()
SUITE = pytest.StashKey["Suite"]()
COMPARED = pytest.StashKey[dict[str, list[dict[str, Any]]]]()  # extra_info by test, of --benchmark-compare
BENCHMARKS = "pytest-benchmark"  # the plugin's session


def settings_of(config: pytest.Config) -> Settings:
    if SETTINGS not in config.stash:
        config.stash[SETTINGS] = read_settings(config)
    return config.stash[SETTINGS]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-benchmark's own, which opens its storage and reads what --benchmark-compare names."""
    # here a usage error ends the session with one line; during collection it would be a traceback
    settings = settings_of(config)
    if config.getoption("benchmark_storage") == "file://./.benchmarks":
        config.option.benchmark_storage = f".benchmarks/{slug(device_name(settings.device))}"
    compared = config.getoption("benchmark_compare")
    if isinstance(compared, str) and compared.endswith(".json") and not Path(compared).is_file():
        raise pytest.UsageError(f"--benchmark-compare: there is no file {compared!r}")


def pytest_sessionstart(session: pytest.Session) -> None:
    """What pytest-benchmark itself says only after the whole run."""
    config = session.config
    if config.getoption("benchmark_compare_fail") and not config.pluginmanager.getplugin(BENCHMARKS).compared_mapping:
        storage = config.getoption("benchmark_storage")
        raise pytest.UsageError(f"--benchmark-compare-fail: there is nothing to compare with; the history is {storage}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """mode-block_length, and the rule where it is not low_confidence alone; source before them for the accuracy."""
    if "case" not in metafunc.fixturenames:
        return
    settings = settings_of(metafunc.config)
    cases = settings.cases
    named = [f"{c.mode}-{c.block_length}" + f"-{c.unmasking}" * settings.several_rules for c in cases]
    values = [(c.mode, c.block_length, c.unmasking) for c in cases]
    if "source" in metafunc.fixturenames:
        sources = list(dict.fromkeys(row["source"] for row in settings.rows))
        metafunc.parametrize("source", sources + ["all"] * (len(sources) > 1))
    metafunc.parametrize(("mode", "block_length", "unmasking"), values, ids=named)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the timed runs first: the accuracy tests read their generations
    items.sort(key=lambda item: item.path.name == "test_accuracy.py")


@pytest.fixture
def case(request: pytest.FixtureRequest, mode: str, block_length: int, unmasking: str) -> Case:
    """The configuration that the test's parameters name."""
    cases = settings_of(request.config).cases
    return next(c for c in cases if (c.mode, c.block_length, c.unmasking) == (mode, block_length, unmasking))


class Suite:
    """The session's model and measurements: each configuration is run once, and graded from the same generations."""

    def __init__(self, llm: LLM, settings: Settings, capture: CaptureManager, kept: Generations | None = None) -> None:
        self.llm = llm
        self.reference = None
        if any(case.mode == REFERENCE_IMPL for case in settings.cases):
            self.reference = ReferenceLLM(llm)
        self.capture = capture
        self.settings = settings
        self.environment = environment(settings, llm.config.dtype)
        self.runs: dict[Case, Run] = {}
        self.failed: dict[Case, Exception] = {}
        limit = llm.config.max_model_len - settings.max_tokens
        if limit < 1:
            raise ValueError(f"--max-tokens {settings.max_tokens} leaves no room for a prompt: {_room(llm)}")
        try:
            encoded = [encode(row, llm.tokenizer, limit) for row in settings.rows]
        except ValueError as error:
            raise ValueError(f"{error}: {_room(llm)}, --max-tokens asks for {settings.max_tokens} of it") from error
        self.prompts = [{"prompt_token_ids": token_ids} for token_ids, _ in encoded]
        self.truncated = sum(was_cut for _, was_cut in encoded)
        self.kept = kept
        self.found: dict[Case, list[RequestOutput | None]] = {}
        self.hashes: dict[Case, bytes] = {}
        if kept is not None:
            model = fingerprint(llm)
            # the reference's generations are not the engine's, though their params are those of vanilla
            names = {c: model + REFERENCE_IMPL * (c.mode == REFERENCE_IMPL) for c in settings.cases}
            self.hashes = {c: settings_hash(names[c], c.params) for c in settings.cases}
            self.found = {c: [kept.take(h, token_ids) for token_ids, _ in encoded] for c, h in self.hashes.items()}

    def measure(self, case: Case, benchmark: BenchmarkFixture | None) -> Run:
        """Runs a configuration, timed by `benchmark`: again and again until the mean is known or the time is over.

        Without a benchmark it is run once. Raises what the engine or a grader raises.
        """
        try:
            self.runs[case] = self._measure(case, benchmark)
        except Exception as error:
            self.failed[case] = error
            raise
        return self.runs[case]

    def _measure(self, case: Case, benchmark: BenchmarkFixture | None) -> Run:
        seconds: list[float] = []
        forwards: list[int] = []
        outputs = list(self.found.get(case, [None] * len(self.prompts)))
        resumed = len(outputs) - outputs.count(None)
        on_gpu = self.settings.device == "cuda"
        llm = self.reference if case.mode == REFERENCE_IMPL else self.llm

        def warm_up() -> None:
            if resumed:
                return
            outputs[:] = [None] * len(outputs)
            # one step a block: every shape but the schedule's length is the timed run's
            params = dataclasses.replace(case.params, denoising_steps=1)
            llm.generate(self.prompts[: self.settings.batch_size], params, use_tqdm=False)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()

        def generate() -> None:
            missing = [i for i, output in enumerate(outputs) if output is None]
            prompts = [self.prompts[i] for i in missing]
            keep = self.kept is not None and not seconds
            on_finish = partial(self.kept.append, self.hashes[case]) if keep else None
            before = llm.stats.forwards
            start = time.perf_counter()
            # ends with the token ids on the host, so the device is done
            made = llm.generate(prompts, case.params, use_tqdm=sys.stderr.isatty(), on_finish=on_finish)
            seconds.append(time.perf_counter() - start)
            forwards.append(llm.stats.forwards - before)
            for i, output in zip(missing, made, strict=True):
                outputs[i] = output

        # outside pytest's capture, where a terminal shows the progress
        with self.capture.global_and_fixture_disabled():
            if benchmark is None:
                warm_up()
                generate()
            else:
                benchmark.pedantic(generate, setup=warm_up, rounds=1)
                while not resumed and not is_enough(seconds, self.settings.max_seconds, self.settings.relative_error):
                    warm_up()
                    generate()
                    if benchmark.enabled:
                        benchmark.stats.update(seconds[-1])
        grades = None
        if not self.settings.is_dummy:
            pairs = zip(self.settings.rows, outputs, strict=True)
            grades = [grade(row, output.outputs[0].text) for row, output in pairs]
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        if resumed:
            return Run(case, outputs, grades, [], None, None, resumed)
        return Run(case, outputs, grades, seconds, forwards[-1], peak)

    def extra_info(self, run: Run) -> dict[str, Any]:
        return extra_info(run, self.settings, self.truncated, self.environment)

    def resume_line(self) -> str:
        found = [output for outputs in self.found.values() for output in outputs]
        others = f"; {self.kept.num_left} there are of other settings" if self.kept.num_left else ""
        number = len(found) - found.count(None)
        return f"blockinfer: {number} of {len(found)} generations found in {self.settings.resume}{others}"

    def result(self, case: Case) -> Run:
        """The configuration's run, made now, untimed by pytest-benchmark, where the throughput test has not made it.

        Raises what making it raised, then too: it is not tried again for every source.
        """
        if case in self.failed:
            raise self.failed[case]
        if case in self.runs:
            return self.runs[case]
        return self.measure(case, None)


def _room(llm: LLM) -> str:
    return f"{llm.config.model} takes {llm.config.max_model_len} tokens in all"


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Iterator[Suite]:
    settings = settings_of(request.config)
    options = dict(dtype=settings.dtype, device=settings.device, load_format=settings.load_format)
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with ExitStack() as stack:
        try:
            kept = stack.enter_context(Generations(settings.resume)) if settings.resume else None
            if not settings.is_dummy:
                require(dict.fromkeys(row["source"] for row in settings.rows))
            llm = LLM(settings.model, tokenizer=settings.tokenizer, max_num_seqs=settings.batch_size, **options)
            stack.enter_context(llm)
            if llm.tokenizer is None:
                raise ValueError(f"{settings.model} has no tokenizer to ask the rows with; pass --tokenizer")
            suite = Suite(llm, settings, capture, kept)
        except (ValueError, ImportError) as error:
            # every test would fail alike
            pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
        if kept is not None:
            with capture.global_and_fixture_disabled():
                print(f"\n{suite.resume_line()}")
        request.config.stash[SUITE] = suite
        yield suite


@pytest.fixture
def comparable(request: pytest.FixtureRequest, suite: Suite, case: Case) -> None:
    """Ends the session where the run of --benchmark-compare is of other rows or settings, for its times are, too."""
    for there in request.config.stash.get(COMPARED, {}).get(request.node.nodeid, []):
        found = differences(there, question(case, suite.settings, suite.truncated, suite.environment))
        if found:
            message = f"--benchmark-compare: {request.node.name}: {'; '.join(found)}"
            pytest.exit(message, returncode=pytest.ExitCode.USAGE_ERROR)


def pytest_report_header(config: pytest.Config) -> str:
    settings = settings_of(config)
    weights = "random weights" if settings.is_dummy else settings.model
    where = "the GPU" if settings.device == "cuda" else "the CPU"
    small = " (the small model: pass --model for another)" if settings.is_tiny and not settings.is_dummy else ""
    part = f" (shard {settings.shard.index}/{settings.shard.of})" if settings.shard else ""
    number = f"{len(settings.rows)} rows{part}, {settings.batch_size} at once, up to {settings.max_tokens} tokens"
    return f"blockinfer: {weights}{small} on {where}, {number}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    suite = config.stash.get(SUITE, None)
    if suite is None or not suite.runs:
        return
    about = suite.environment
    place = device_name(about["device"])
    terminalreporter.section("blockinfer")
    terminalreporter.write_line(f"{about['model']} ({about['weights']} weights), {about['dtype']}, {place}")
    terminalreporter.write_line(
        f"{len(suite.prompts)} rows of {about['dataset']}, {suite.settings.batch_size} at once, "
        f"up to {suite.settings.max_tokens} tokens"
    )
    if suite.truncated:
        terminalreporter.write_line(f"{suite.truncated} prompts were cut in the middle of their context to fit")
    for line in table(list(suite.runs.values())):
        terminalreporter.write_line(line)
    terminalreporter.write_line(
        "standard: vanilla_llada; accuracy with its 95 % interval; NFE: forwards summed over requests"
    )
    for line in losses(list(suite.runs.values()), suite.settings.max_accuracy_loss):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"written to {suite.settings.output}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    suite = session.config.stash.get(SUITE, None)
    if suite is not None and suite.runs:
        write_comparison(suite.settings.output, list(suite.runs.values()), suite.settings, suite.environment)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    """Adds what needs all configurations: each one's paired loss against `vanilla`."""
    suite = config.stash.get(SUITE, None)
    for benchmark in output_json["benchmarks"] if suite else []:
        info = benchmark["extra_info"]
        for run in suite.runs.values():
            case = run.case
            if (case.mode, case.block_length, case.unmasking) == tuple(benchmark["params"].values()):
                info["against_vanilla"] = against_vanilla(run, list(suite.runs.values()))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """What decides whether two runs can be compared; no host name."""
    device = settings_of(config).device
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(config, benchmarksession, machine_info, compared_benchmark) -> None:
    there = compared_benchmark["machine_info"].get("device", "a device that its file does not name")
    if there != machine_info["device"]:
        raise pytest.UsageError(
            f"--benchmark-compare: this run is on {machine_info['device']}, the other was on {there}"
        )
    compared = config.stash.setdefault(COMPARED, {})
    for other in compared_benchmark["benchmarks"]:
        compared.setdefault(other["fullname"], []).append(other["extra_info"])
