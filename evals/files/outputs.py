"""The files that a session of the suite leaves: tried before it begins, each written separately at its end.

Failures to write are reported after the tables, and then fail the session.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pytest_benchmark.session import BenchmarkSession
from pytest_benchmark.storage.file import FileStorage
from pytest_benchmark.utils import safe_dumps

from evals.files import BadOutput, check_folder, check_output, check_target, samples_name, write_measured

FAILURES = pytest.StashKey[list[str]]()


def check_outputs(option: Callable[[str], Any], inputs: list[str]) -> None:
    """Tries the outputs named on the command line. inputs: other files and folders that the session reads.

    Raises pytest.UsageError for a file that cannot be written, that is read, or that two options name.
    """
    if option("--collect-only"):
        return
    paths = {name: option(name) for name in ("--output", "--benchmark-json", "--resume")}
    for name, path in (paths | {"--samples": samples_path(option)}).items():
        if path is None or (name == "--output" and path == os.devnull):
            continue
        # parsed as a Path, the empty value of an unset shell variable is this
        if os.fspath(path) == ".":
            raise pytest.UsageError(f"{name} must name a file, got a folder, or nothing")
        try:
            if name == "--resume":
                check_target(path, inputs)
            else:
                check_output(path, inputs)
        except BadOutput as error:
            raise pytest.UsageError(f"{name}: {error}") from error
        inputs = [*inputs, path]


def samples_path(option: Callable[[str], Any]) -> str | None:
    """Where the answers are written: the file of --samples, else a file beside the results, with its own name for each
    shard. None (nowhere) for /dev/null, or if no results are written either."""
    given, results = option("--samples"), option("--benchmark-json") or option("--output")
    if (given or results) == os.devnull:
        return None
    if given:
        return given
    return os.path.join(os.path.dirname(results), samples_name(option("--shard")))


def guard(config: pytest.Config, session: BenchmarkSession) -> None:
    """pytest-benchmark stops at the first of its files that it cannot write, and its tables with it; here each of its
    steps becomes an `attempt`. Raises pytest.UsageError if a history is asked for that cannot be written."""
    storage, finish = session.storage, session.finish
    if (session.save or session.autosave) and isinstance(storage, FileStorage):
        try:
            check_folder(storage.get("run.json").parent)
        except BadOutput as error:
            raise pytest.UsageError(f"--benchmark-storage: {error}") from error

    def save_json(output_json: dict[str, Any]) -> None:
        with attempt(config, "--benchmark-json"):
            write_measured(session.json, safe_dumps(output_json, ensure_ascii=True, indent=4))
            session.logger.info(f"Wrote benchmark data in: {session.json}", purple=True)

    def save(output_json: dict[str, Any], name: str, save=storage.save) -> None:
        before = set(storage.query()) if isinstance(storage, FileStorage) else set()
        with attempt(config, "--benchmark-storage"):
            try:
                save(output_json, name)
            except OSError:
                for part in set(storage.query()) - before if isinstance(storage, FileStorage) else ():
                    part.unlink()
                raise

    def finish_all() -> None:
        with attempt(config, "pytest-benchmark", Exception):
            finish()

    session.save_json, storage.save, session.finish = save_json, save, finish_all


@contextmanager
def attempt(config: pytest.Config, name: str, kinds: type[Exception] = OSError) -> Iterator[None]:
    """Failures in the block are reported at the session's end; a BadOutput too."""
    try:
        yield
    except (BadOutput, kinds) as error:
        said = str(error) if isinstance(error, BadOutput) else f"{type(error).__name__}: {error}"
        add_failure(config, f"{name}: {said}")


def add_failure(config: pytest.Config, sentence: str) -> None:
    config.stash.setdefault(FAILURES, []).append(sentence)


def tell_failures(config: pytest.Config, reporter: pytest.TerminalReporter) -> None:
    """Shown after everything else. A session that had passed fails."""
    failures = config.stash.get(FAILURES, [])
    if not failures:
        return
    reporter.section("what was lost", red=True)
    for sentence in failures:
        reporter.write_line(" ".join(sentence.split()), red=True)
    session = config.pluginmanager.getplugin("session")
    session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
