"""pytest-benchmark's files as the suite writes them, read and checked."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evals.configurations import is_configuration
from evals.wilson import wilson_interval

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(ge=0, le=1e15)]  # not infinite either, nor NaN
Share = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[Share, Share]
Change = Annotated[float, Field(ge=-1, le=1)]


class BadFile(ValueError):
    """A file that is not what it should be; the message is one line that begins with the file's name."""


class Loss(BaseModel):
    """Answers beside those of `vanilla` to the same rows (see evals/paired.py); the losses are shares of the rows."""

    model_config = ConfigDict(frozen=True)

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


class Configuration(BaseModel):
    """What one configuration was and did: its `extra_info` (see evals/record.py). What a file lacks or left unknown is
    None; `model_fields_set` tells the two apart.

    asked_block_length is the test id's; block_length, in vanilla_llada, is all of max_tokens.
    """

    model_config = ConfigDict(frozen=True)

    mode: Annotated[str, Field(min_length=1)]
    asked_block_length: Positive | None = None
    block_length: Positive | None = None
    unmasking: str | None = None
    rule_value: Number | None = None
    denoising_steps: Positive | None = None

    tokens_per_second: Number | None = None
    relative_error: Number | None = None
    interval_over_standard: tuple[Number, Number] | None = None
    interval_over_vanilla: tuple[Number, Number] | None = None
    resumed: Count | None = None
    tokens_per_forward: Number | None = None
    nfe: Count | None = None
    ms_per_forward: Number | None = None
    latency_p50: Number | None = None
    latency_p95: Number | None = None
    accuracy: Share | None = None
    accuracy_interval: Interval | None = None
    accuracy_by_source: dict[str, Share] = {}
    n_by_source: dict[str, Positive] = {}
    against_vanilla: Loss | None = None

    model: str | None = None
    weights: str | None = None
    dtype: str | None = None
    device: str | None = None
    gpu: str | None = None
    cpu: str | None = None
    cpu_threads: Count | None = None
    torch: str | None = None
    cuda: str | None = None
    transformers: str | None = None
    python: str | None = None
    commit: str | None = None
    dataset: str | None = None
    dataset_revisions: tuple[str, ...] | None = None
    rows: tuple[tuple[str, Any, Any, Any], ...] | None = None
    shard: Shard | None = None
    shards: Positive = 1
    prompts_version: int | None = None
    prompts_truncated: Count | None = None
    n: Count | None = None
    max_tokens: Positive | None = None
    temperature: Number | None = None
    ignore_eos: bool | None = None
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


class _Benchmark(BaseModel):
    name: str
    params: dict[str, Any] | None = None
    extra_info: dict[str, Any] = {}


class _File(BaseModel):
    datetime: datetime
    benchmarks: list[_Benchmark]
    commit_info: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Run:
    """One file: its name without the folder, when it was written, its configurations (at least one), and how many
    benchmarks of other tests it holds besides."""

    file: str
    when: datetime
    commit: str | None
    configurations: list[Configuration]
    others: int


def read_run(path: Path) -> Run:
    """Raises BadFile where the file cannot be read, is none of pytest-benchmark's, or holds no configuration."""
    try:
        file = _File.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise BadFile(f"{path}: is no JSON of pytest-benchmark: {_what(error)}") from error
    configurations = []
    for benchmark in file.benchmarks:
        if "mode" not in benchmark.extra_info or not is_configuration(benchmark.extra_info):
            continue
        try:
            configurations.append(Configuration.model_validate(_values(benchmark)))
        except ValidationError as error:
            raise BadFile(f"{path}: {benchmark.name!r:.80}: extra_info: {_what(error)}") from error
    if not configurations:
        raise BadFile(
            f"{path}: none of its {len(file.benchmarks)} benchmarks is a configuration of evals/test_throughput.py"
        )
    commit = configurations[0].commit or str(file.commit_info.get("id") or "")[:12] or None
    when = file.datetime if file.datetime.tzinfo else file.datetime.replace(tzinfo=UTC)
    return Run(path.name, when, commit, configurations, len(file.benchmarks) - len(configurations))


def _values(benchmark: _Benchmark) -> dict[str, Any]:
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
