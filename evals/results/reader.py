"""The files of --benchmark-json, read and checked: for the report, for compare and for merge."""

import dataclasses
import os
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from evals.files import StrPath, read_bytes
from evals.results.schema import Benchmark, Configuration, Content
from evals.runs.configurations import ALONE, PLAIN


class BadFile(ValueError):
    """A file that is not as expected; the message is one line that begins with the file's name."""


@dataclasses.dataclass(frozen=True)
class File:
    """A checked file: its content as JSON has it, its benchmarks, and the configurations among them by their place."""

    content: dict[str, Any]
    when: datetime
    commit: str | None
    benchmarks: list[Benchmark]
    configurations: dict[int, Configuration]


@dataclasses.dataclass(frozen=True)
class StoredRun:
    """One file: its name without the folder, when it was written, its configurations (at least one), and its number of
    benchmarks of other tests."""

    file: str
    when: datetime
    commit: str | None
    configurations: list[Configuration]
    others: int


def read_file(path: StrPath) -> File:
    """Raises BadFile if the file cannot be read, is not pytest-benchmark's, or has a field that differs from what the
    suite writes; a missing field may mean an older file."""
    try:
        content = from_json(read_bytes(path).removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadFile(f"{path}: is not a JSON file of pytest-benchmark: Invalid JSON: {error}") from error
    return check_content(content, path)


def check_content(content: Any, path: StrPath) -> File:
    """`read_file` for content that has been read already."""
    if not isinstance(content, dict):
        raise BadFile(f"{path}: is not a JSON file of pytest-benchmark: an object is expected, got {content!r:.60}")
    try:
        checked = Content.model_validate(content)
    except ValidationError as error:
        raise BadFile(f"{path}: is not a JSON file of pytest-benchmark: {_what(error)}") from error
    configurations = {}
    for number, benchmark in enumerate(checked.benchmarks):
        if benchmark.is_configuration:
            try:
                configurations[number] = Configuration.model_validate(_values(benchmark))
            except ValidationError as error:
                raise BadFile(f"{path}: {benchmark.name!r:.80}: extra_info: {_what(error)}") from error
    # for numbers in no field above
    bad = _bad_number(content)
    if bad:
        raise BadFile(f"{path}: {bad[0]}: must be a number below 1e300, got {bad[1]!r:.60}")
    when = checked.datetime if checked.datetime.tzinfo else checked.datetime.replace(tzinfo=UTC)
    commit = str(checked.commit_info.get("id") or "")[:12] or None
    return File(content, when, commit, checked.benchmarks, configurations)


def read_run(path: StrPath) -> StoredRun:
    """For the report. Raises BadFile, also if a file holds no configuration."""
    file = read_file(path)
    configurations = list(file.configurations.values())
    if not configurations:
        raise BadFile(
            f"{path}: none of its {len(file.benchmarks)} benchmarks is a configuration of evals/test_throughput.py"
        )
    others = len(file.benchmarks) - len(configurations)
    return StoredRun(os.path.basename(path), file.when, configurations[0].commit or file.commit, configurations, others)


def check_whole(file: File, path: StrPath, fields: tuple[str, ...]) -> None:
    """For code that judges or adds: each configuration has these fields, null only if there was nothing to know, and
    the fields agree on the number of rows. Raises BadFile."""
    for number, c in file.configurations.items():
        where = f"{path}: {file.benchmarks[number].name!r:.80}: extra_info"
        for field in fields:
            if field not in c.model_fields_set or (getattr(c, field) is None and not _may_be_null(c, field)):
                raise BadFile(f"{where}: {field}: a value is required, there is {_there(c, field)}")
        fault = _misfit(c)
        if fault:
            raise BadFile(f"{where}: {fault}")


def _there(c: Configuration, field: str) -> str:
    return "null" if field in c.model_fields_set else "none"


def _may_be_null(c: Configuration, field: str) -> bool:
    if field in ("tokens_per_second", "seconds", "forwards"):
        return c.resumed != 0
    if field == "accuracy":
        return c.weights != "checkpoint"
    return field == "peak_memory_gib"


def _misfit(c: Configuration) -> str | None:
    """The first field that does not agree with n, or with the fields that it goes with."""
    n = c.n
    if c.rows is not None and len(c.rows) != n:
        return f"rows: there are {len(c.rows)}, and n is {n}"
    if c.rows is not None and c.accuracy is not None and any(row[3] is None for row in c.rows):
        return "rows: one has no grade, and accuracy is known"
    if c.n_by_source and sum(c.n_by_source.values()) != n:
        return f"n_by_source: the sum is {sum(c.n_by_source.values())}, and n is {n}"
    for field in ("accuracy_by_source", "score_by_source"):
        if field in c.model_fields_set and getattr(c, field).keys() != c.n_by_source.keys():
            return f"{field}: other sources than in n_by_source"
    if not c.longbench_f1_by_source.keys() <= c.n_by_source.keys():
        return "longbench_f1_by_source: other sources than in n_by_source"
    if c.n_by_source and any(
        number > c.n_by_source.get(source, 0) for source, number in c.unextracted_by_source.items()
    ):
        return "unextracted_by_source: more than n_by_source says that there are"
    loss = c.against_vanilla
    if loss is not None and (loss.n != n or loss.lost + loss.won > n):
        return f"against_vanilla: {loss.lost} lost and {loss.won} won of {loss.n}, and n is {n}"
    if c.shard is not None and c.shard.index > c.shard.of:
        return f"shard: {c.shard.index} of {c.shard.of}"
    if c.shard is not None and c.shard.positions is not None and len(c.shard.positions) != n:
        return f"shard.positions: there are {len(c.shard.positions)}, and n is {n}"
    return None


def _bad_number(content: Any) -> tuple[str, float] | None:
    """The first number that cannot be computed with, and where it is."""
    left = [((), content)]
    while left:
        where, value = left.pop()
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            left += [((where, key), inner) for key, inner in items if not isinstance(inner, str | None)]
        elif not abs(value) <= 1e300:
            keys = []
            while where:
                where, key = where
                keys.append(str(key))
            return ".".join(reversed(keys)), value
    return None


def _values(benchmark: Benchmark) -> dict[str, Any]:
    """extra_info with the block length from the test's parameters; null in place of a dict means that it is not
    known."""
    info = benchmark.extra_info
    asked = (benchmark.params or {}).get("block_length", info.get("block_length"))
    known = {key: value for key, value in info.items() if value is not None or not key.endswith("_by_source")}
    return ALONE | PLAIN | known | {"asked_block_length": asked}


def _what(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    got = f", got {first['input']!r:.60}" if where and first["type"] != "missing" else ""
    return " ".join(f"{where + ': ' * bool(where)}{first['msg']}{got}".split())
