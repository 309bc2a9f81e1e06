"""The fields of pytest-benchmark's files as the suite writes them: the one schema for all code that reads them."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from evals.results.wilson import wilson_interval
from evals.runs.configurations import is_configuration

# Neither a string nor a boolean is a number, whatever it says.
_MOST = 10**15
Text = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0, le=_MOST)]
Positive = Annotated[int, Field(strict=True, ge=1, le=_MOST)]
Number = Annotated[float, Field(strict=True, ge=0, le=_MOST)]  # also not infinite or NaN
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Change = Annotated[float, Field(strict=True, ge=-1, le=1)]
Interval = tuple[Share, Share]


def _not_tiny(value: float) -> float:
    # for one this small, the inverse, or the logarithm beside another's, is no longer usable
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


class Loss(BaseModel):
    """Answers beside those of `vanilla` to the same rows (see evals/results/paired.py); losses are shares of rows."""

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
    """What one configuration was and did: its `extra_info` (see evals/results/record.py). A value that a file lacks or
    left unknown is None; `model_fields_set` tells the two apart.

    asked_block_length is that of the test's id; block_length, in vanilla_llada, is all of max_tokens.
    """

    model_config = ConfigDict(frozen=True)

    mode: Annotated[Text, Field(min_length=1)]
    asked_block_length: Positive | None = None
    block_length: Positive | None = None
    unmasking: Text | None = None
    rule_value: Number | None = None
    block_add_threshold: Share | None = None
    decoded_token_threshold: Share | None = None
    suffix_window: Count | None = None
    commit_delay: Count | None = None
    editing_threshold: Share | None = None
    max_post_steps: Count | None = None
    denoising_steps: Positive | None = None

    tokens: Count | None = None
    tokens_per_second: Speed | None = None
    seconds: PositiveNumber | None = None
    relative_error: Share | None = None
    interval_over_standard: tuple[Number, Number] | None = None
    interval_over_vanilla: tuple[Number, Number] | None = None
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
    longbench_f1_by_source: dict[str, Share] = {}
    n_by_source: dict[str, Positive] = {}
    unextracted_by_source: dict[str, Count] = {}
    against_vanilla: Loss | None = None
    peak_memory_gib: PositiveNumber | None = None
    mean_prompt_tokens: Number | None = None
    mean_generated_tokens: Number | None = None
    stopped: Count | None = None

    model: Text | None = None
    load_format: Text | None = None
    weights: Literal["checkpoint", "random"] | None = None
    dtype: Text | None = None
    quantization: Text | None = None
    device: Text | None = None
    gpu: Text | None = None
    cpu: Text | None = None
    cpu_threads: Count | None = None
    tensor_parallel_size: Positive = 1
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
    prompts_version: Count | Text | None = None
    prompts_truncated: Count | None = None
    grader_versions: dict[str, Count | Text] | None = None
    n: Positive | None = None
    max_tokens: Positive | None = None
    temperature: Number | None = None
    ignore_eos: Flag | None = None
    batch_size: Positive | None = None
    rounds: Count | None = None

    steady: Flag | None = None
    unsteady: Text | None = None
    first_seconds: Number | None = None
    load_seconds: Number | None = None
    capture_seconds: Number | None = None
    graphs: Count | None = None
    graph_bytes: Count | None = None

    def interval_at(self, source: str) -> Interval | None:
        """The 95 % interval of the accuracy at a source."""
        accuracy, n = self.accuracy_by_source.get(source), self.n_by_source.get(source)
        return None if accuracy is None or n is None else wilson_interval(round(accuracy * n), n)

    def often_unextracted(self) -> list[tuple[str, int, int]]:
        """The sources with more than a tenth of answers in which nothing was found to judge: name, such answers,
        answers."""
        found = [(s, k, self.n_by_source.get(s, 0)) for s, k in self.unextracted_by_source.items()]
        return [one for one in found if is_often(*one[1:])]

    @property
    def block_steps(self) -> int | None:
        """The steps a full block may take; None means no limit, or not known."""
        if self.denoising_steps is None or self.block_length is None:
            return None
        return min(self.denoising_steps, self.block_length)


def is_often(unextracted: int, n: int) -> bool:
    """Whether this many of n answers without anything to judge should be reported."""
    return 10 * unextracted > n


class Stats(BaseModel):
    """Seconds of the rounds, as pytest-benchmark summarizes them."""

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


class Content(BaseModel):
    datetime: Moment
    benchmarks: list[Benchmark]
    commit_info: dict[str, Any] = {}
    machine_info: dict[str, Any] = {}
