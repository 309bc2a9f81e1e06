"""pytest-benchmark's files as the suite writes them, read and checked: for the report, for compare and for merge."""

import dataclasses
import os
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from evals.configurations import is_configuration
from evals.files import StrPath, read_bytes
from evals.wilson import wilson_interval

# Neither a text nor a truth value is a number, whatever it says.
_MOST = 10**15
Text = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0, le=_MOST)]
Positive = Annotated[int, Field(strict=True, ge=1, le=_MOST)]
Number = Annotated[float, Field(strict=True, ge=0, le=_MOST)]  # not infinite either, nor NaN
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Change = Annotated[float, Field(strict=True, ge=-1, le=1)]
Interval = tuple[Share, Share]


def _not_tiny(value: float) -> float:
    # the inverse of one so small, or its logarithm beside another's, is no figure any more
    if 0 < value < 1 / _MOST:
        raise ValueError(f"must be 0 or at least {1 / _MOST:g}")
    return value


def _is_text(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("must be a text")
    return value


Moment = Annotated[datetime, BeforeValidator(_is_text)]
Speed = Annotated[Number, AfterValidator(_not_tiny)]
PositiveNumber = Annotated[float, Field(strict=True, ge=1 / _MOST, le=_MOST)]


class BadFile(ValueError):
    """A file that is not what it should be; the message is one line that begins with the file's name."""


class Loss(BaseModel):
    """Answers beside those of `vanilla` to the same rows (see evals/paired.py); the losses are shares of the rows."""

    model_config = ConfigDict(frozen=True)

    n: Positive
    lost: Count
    won: Count
    loss: Change
    loss_at_least: Change
    loss_at_most: Change
    mcnemar_p: Share


class Shard(BaseModel):
    """Which part of a run's rows was evaluated."""

    model_config = ConfigDict(frozen=True)

    index: Positive
    of: Positive
    positions: tuple[Count, ...] | None = None
    rows: Text | None = None


class Configuration(BaseModel):
    """What one configuration was and did: its `extra_info` (see evals/record.py). What a file lacks or left unknown is
    None; `model_fields_set` tells the two apart.

    asked_block_length is the test id's; block_length, in vanilla_llada, is all of max_tokens.
    """

    model_config = ConfigDict(frozen=True)

    mode: Annotated[Text, Field(min_length=1)]
    asked_block_length: Positive | None = None
    block_length: Positive | None = None
    unmasking: Text | None = None
    rule_value: Number | None = None
    denoising_steps: Positive | None = None

    tokens: Count | None = None
    tokens_per_second: Speed | None = None
    seconds: PositiveNumber | None = None
    relative_error: Share | None = None
    resumed: Count | None = None
    steps: Positive | None = None
    tokens_per_step: Number | None = None
    tokens_per_forward: Number | None = None
    nfe: Positive | None = None
    forwards: Positive | None = None
    ms_per_forward: Number | None = None
    latency_p50: Number | None = None
    latency_p95: Number | None = None
    accuracy: Share | None = None
    accuracy_interval: Interval | None = None
    accuracy_by_source: dict[str, Share] = {}
    score_by_source: dict[str, Share] = {}
    n_by_source: dict[str, Positive] = {}
    against_vanilla: Loss | None = None
    peak_memory_gib: PositiveNumber | None = None
    mean_prompt_tokens: Number | None = None
    mean_generated_tokens: Number | None = None
    stopped: Count | None = None

    model: Text | None = None
    load_format: Text | None = None
    weights: Literal["checkpoint", "random"] | None = None
    dtype: Text | None = None
    device: Text | None = None
    gpu: Text | None = None
    cpu: Text | None = None
    cpu_threads: Count | None = None
    torch: Text | None = None
    cuda: Text | None = None
    transformers: Text | None = None
    python: Text | None = None
    commit: Text | None = None
    dataset: Text | None = None
    dataset_revisions: tuple[Text, ...] | None = None
    rows: tuple[tuple[Text, Count, Count, Flag | None], ...] | None = None
    rows_sha256: Text | None = None
    shard: Shard | None = None
    shards: Positive = 1
    prompts_version: Count | None = None
    prompts_truncated: Count | None = None
    grader_versions: dict[str, Count] | None = None
    n: Positive | None = None
    max_tokens: Positive | None = None
    temperature: Number | None = None
    ignore_eos: Flag | None = None
    batch_size: Positive | None = None
    rounds: Count | None = None

    def interval_at(self, source: str) -> Interval | None:
        """The 95 % interval of the accuracy at a source."""
        accuracy, n = self.accuracy_by_source.get(source), self.n_by_source.get(source)
        return None if accuracy is None or n is None else wilson_interval(round(accuracy * n), n)

    @property
    def block_steps(self) -> int | None:
        """The steps a full block may take; None is no limit, or not known."""
        if self.denoising_steps is None or self.block_length is None:
            return None
        return min(self.denoising_steps, self.block_length)


class Stats(BaseModel):
    """Seconds of the rounds, as pytest-benchmark sums them up."""

    min: Number | None = None
    max: Number | None = None
    mean: Number | None = None
    stddev: Number | None = None
    median: Number | None = None
    iqr: Number | None = None
    q1: Number | None = None
    q3: Number | None = None
    ld15iqr: Number | None = None
    hd15iqr: Number | None = None
    ops: Number | None = None
    total: Number | None = None
    rounds: Count | None = None
    iterations: Count | None = None
    iqr_outliers: Count | None = None
    stddev_outliers: Count | None = None
    outliers: Text | None = None
    data: list[Number] | None = None


class Benchmark(BaseModel):
    name: Text
    fullname: Text | None = None
    group: Text | None = None
    params: dict[str, Any] | None = None
    extra_info: dict[str, Any]
    stats: Stats | None = None

    @property
    def is_configuration(self) -> bool:
        """Whether it is of test_throughput.py; one that failed before it had figures does not say."""
        return is_configuration(self.extra_info) and not {"mode", "nfe"}.isdisjoint(self.extra_info)


class _Content(BaseModel):
    datetime: Moment
    benchmarks: list[Benchmark]
    commit_info: dict[str, Any] = {}
    machine_info: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class File:
    """A checked file: its content as JSON has it, its benchmarks, and the configurations among them by their place."""

    content: dict[str, Any]
    when: datetime
    commit: str | None
    benchmarks: list[Benchmark]
    configurations: dict[int, Configuration]


@dataclasses.dataclass(frozen=True)
class Run:
    """One file: its name without the folder, when it was written, its configurations (at least one), and how many
    benchmarks of other tests it holds besides."""

    file: str
    when: datetime
    commit: str | None
    configurations: list[Configuration]
    others: int


def read_file(path: StrPath) -> File:
    """Raises BadFile where the file cannot be read, is none of pytest-benchmark's, or where a field is not what the
    suite writes; one that is missing may be that of an older file."""
    try:
        content = from_json(read_bytes(path).removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadFile(f"{path}: is no JSON of pytest-benchmark: Invalid JSON: {error}") from error
    return check_content(content, path)


def check_content(content: Any, path: StrPath) -> File:
    """The same of a file's content, read already."""
    try:
        checked = _Content.model_validate(content)
    except ValidationError as error:
        raise BadFile(f"{path}: is no JSON of pytest-benchmark: {_what(error)}") from error
    configurations = {}
    for number, benchmark in enumerate(checked.benchmarks):
        if benchmark.is_configuration:
            try:
                configurations[number] = Configuration.model_validate(_values(benchmark))
            except ValidationError as error:
                raise BadFile(f"{path}: {benchmark.name!r:.80}: extra_info: {_what(error)}") from error
    # what no field above is for
    bad = _bad_number(content)
    if bad:
        raise BadFile(f"{path}: {bad[0]}: must be a number below 1e300, got {bad[1]!r:.60}")
    when = checked.datetime if checked.datetime.tzinfo else checked.datetime.replace(tzinfo=UTC)
    commit = str(checked.commit_info.get("id") or "")[:12] or None
    return File(content, when, commit, checked.benchmarks, configurations)


def read_run(path: StrPath) -> Run:
    """For the report. Raises BadFile, also where a file holds no configuration."""
    file = read_file(path)
    configurations = list(file.configurations.values())
    if not configurations:
        raise BadFile(
            f"{path}: none of its {len(file.benchmarks)} benchmarks is a configuration of evals/test_throughput.py"
        )
    others = len(file.benchmarks) - len(configurations)
    return Run(os.path.basename(path), file.when, configurations[0].commit or file.commit, configurations, others)


def check_whole(file: File, path: StrPath, fields: tuple[str, ...]) -> None:
    """For who judges or adds: each configuration has these fields, null only where nothing was there to be known, and
    what the fields say of the rows' number fits together. Raises BadFile."""
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
    return field == "peak_memory_gib" and c.device != "cuda"


def _misfit(c: Configuration) -> str | None:
    """The first field that does not fit n, or those that it goes with."""
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
    loss = c.against_vanilla
    if loss is not None and (loss.n != n or loss.lost + loss.won > n):
        return f"against_vanilla: {loss.lost} lost and {loss.won} won of {loss.n}, and n is {n}"
    if c.shard is not None and c.shard.index > c.shard.of:
        return f"shard: {c.shard.index} of {c.shard.of}"
    if c.shard is not None and c.shard.positions is not None and len(c.shard.positions) != n:
        return f"shard.positions: there are {len(c.shard.positions)}, and n is {n}"
    return None


def _bad_number(content: Any) -> tuple[str, float] | None:
    """The first that no computing can use, and where it is."""
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
    """extra_info with the block length that the test's parameters name; null for a dict is a dict not known."""
    info = benchmark.extra_info
    asked = (benchmark.params or {}).get("block_length", info.get("block_length"))
    known = {key: value for key, value in info.items() if value is not None or not key.endswith("_by_source")}
    # a file that merges no shards, or is older than shards, does not say so
    return {"shards": 1} | known | {"asked_block_length": asked}


def _what(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    got = f", got {first['input']!r:.60}" if where and first["type"] != "missing" else ""
    return " ".join(f"{where + ': ' * bool(where)}{first['msg']}{got}".split())
