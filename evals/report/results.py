"""pytest-benchmark's files as the suite writes them: read and checked, and their configurations compared."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

STANDARD = "vanilla_llada"

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(ge=0, le=1e15)]  # not infinite either, nor NaN
Share = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[Share, Share]


class BadFile(ValueError):
    """A file that is not what it should be; the message is one line that begins with the file's name."""


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
    tokens_per_forward: Number | None = None
    nfe: Count | None = None
    ms_per_forward: Number | None = None
    latency_p50: Number | None = None
    latency_p95: Number | None = None
    accuracy: Share | None = None
    accuracy_interval: Interval | None = None
    accuracy_by_source: dict[str, Share] = {}
    interval_by_source: dict[str, Interval] = {}
    n_by_source: dict[str, Positive] = {}

    model: str | None = None
    weights: str | None = None
    dtype: str | None = None
    device: str | None = None
    gpu: str | None = None
    cpu_threads: Count | None = None
    torch: str | None = None
    cuda: str | None = None
    transformers: str | None = None
    python: str | None = None
    commit: str | None = None
    dataset: str | None = None
    prompts_version: int | None = None
    prompts_truncated: Count | None = None
    n: Count | None = None
    max_tokens: Positive | None = None
    temperature: Number | None = None
    ignore_eos: bool | None = None
    batch_size: Positive | None = None
    rounds: Count | None = None

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
        if "mode" not in benchmark.extra_info:
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
    return known | {"asked_block_length": asked}


def _what(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    got = f", got {first['input']!r:.60}" if where and first["type"] != "missing" else ""
    return " ".join(f"{where + ': ' * bool(where)}{first['msg']}{got}".split())


def total_steps(c: Configuration) -> int | None:
    """The step limit of all blocks together, as evals.settings.total_steps; None is no limit."""
    if c.denoising_steps is None or c.max_tokens is None or c.block_length is None:
        return None
    full, rest = divmod(c.max_tokens, c.block_length)
    of_the_rest = min(rest, -(-c.denoising_steps * rest // c.block_length))
    return full * c.block_steps + of_the_rest


def baselines(c: Configuration, run: list[Configuration]) -> tuple[Configuration | None, Configuration | None]:
    """What `c` is compared with, as evals.record.baselines: vanilla_llada in as many steps in all, and `vanilla`."""
    same = [other for other in run if other.unmasking == c.unmasking]
    standard = [other for other in same if other.mode == STANDARD and _same_steps(c, other)]
    asked = c.asked_block_length
    semi = [other for other in same if other.mode == "vanilla" and other.asked_block_length == asked]
    return next(iter(standard), None), next(iter(semi), None)


def _same_steps(a: Configuration, b: Configuration) -> bool:
    known = {"denoising_steps", "max_tokens", "block_length"} <= a.model_fields_set & b.model_fields_set
    return known and total_steps(a) == total_steps(b)


def speed_up(c: Configuration, baseline: Configuration | None) -> float | None:
    """Ratio of tokens/s."""
    if baseline is None or c.tokens_per_second is None or not baseline.tokens_per_second:
        return None
    return c.tokens_per_second / baseline.tokens_per_second


def on_frontier(run: list[Configuration]) -> list[bool]:
    """For each configuration whether none other is as fast and as accurate, and better in one of the two.

    A configuration whose speed or accuracy is not known is not on the frontier and keeps none off it.
    """
    known = [(c.tokens_per_second, c.accuracy) for c in run]
    points = [p for p in known if None not in p]

    def dominated(speed: float, accuracy: float) -> bool:
        return any(s >= speed and a >= accuracy and (s, a) != (speed, accuracy) for s, a in points)

    return [None not in p and not dominated(*p) for p in known]


# What makes two figures the same configuration's, and what has to agree for their speeds to be compared.
IDENTITY = ("mode", "block_length", "unmasking", "denoising_steps", "rule_value")
CONDITIONS = (
    *("model", "weights", "dtype", "device", "gpu", "cpu_threads", "dataset", "prompts_version", "n"),
    *("max_tokens", "batch_size", "temperature", "ignore_eos"),
)


def differing(a: Configuration, b: Configuration, fields: tuple[str, ...]) -> list[str]:
    """Those of the fields that both files have and that differ."""
    there = a.model_fields_set & b.model_fields_set
    return [field for field in fields if field in there and getattr(a, field) != getattr(b, field)]


def timeline(run: Run, history: list[Run]) -> tuple[list[Run], list[tuple[Run, str]]]:
    """The runs that can be compared with `run`, itself among them, oldest first; and the others, each with the reason.

    A second copy of a run, such as `--benchmark-autosave` keeps, is dropped.
    """
    distinct = [run]
    for other in history:
        if all(other.configurations != r.configurations for r in distinct):
            distinct.append(other)
    comparable, others = [], []
    for other in sorted(distinct, key=lambda r: (r.when, r.file)):
        mine, theirs = run.configurations[0], other.configurations[0]
        fields = differing(mine, theirs, CONDITIONS)
        if fields:
            others.append((other, "; ".join(f"{f}: {getattr(theirs, f)}, not {getattr(mine, f)}" for f in fields)))
        else:
            comparable.append(other)
    return comparable, others


def series(c: Configuration, runs: list[Run]) -> list[float | None]:
    """The tokens/s of this configuration in each of the runs; None where a run has it not."""
    return [
        next((o.tokens_per_second for o in run.configurations if not differing(c, o, IDENTITY)), None) for run in runs
    ]


def names(run: list[Configuration]) -> list[str]:
    """A short name for each configuration: its mode, and what it takes to tell it from the others."""
    lengths = {c.block_length for c in run if c.mode != STANDARD}
    rules = {(c.unmasking, c.rule_value) for c in run}
    result = []
    for c in run:
        parts = [c.mode]
        if len(lengths) > 1 and c.mode != STANDARD and c.block_length is not None:
            parts.append(str(c.block_length))
        if len(rules) > 1 and c.unmasking is not None:
            parts.append(c.unmasking)
        twins = [o for o in run if (o.mode, o.unmasking) == (c.mode, c.unmasking) and c.mode == STANDARD]
        if len(twins) > 1 and c.denoising_steps is not None:
            parts.append(f"{c.denoising_steps} steps")
        result.append(" ".join(parts))
    return [
        f"{name} ({result[:i].count(name) + 1})" if result.count(name) > 1 else name for i, name in enumerate(result)
    ]
