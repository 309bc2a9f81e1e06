"""Configurations compared: baselines, frontier, earlier runs, and names that distinguish them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from evals.results.reader import StoredRun
from evals.results.schema import Configuration
from evals.runs.configurations import PLAIN, STANDARD, extras, total_steps

Baselines = Callable[[Configuration], tuple[Configuration | None, Configuration | None]]


def baselines(run: list[Configuration]) -> Baselines:
    """The baselines of each configuration of the run, as in evals.results.comparison.baselines: vanilla_llada with as
    many steps in all, and `vanilla`; the first if there are several."""
    standard: dict[tuple, Configuration] = {}
    semi: dict[tuple, Configuration] = {}
    for c in run:
        if c.mode == STANDARD and _knows_steps(c):
            standard.setdefault((c.unmasking, total_steps(c)), c)
        if c.mode == "vanilla":
            semi.setdefault(_semi(c), c)

    def of(c: Configuration) -> tuple[Configuration | None, Configuration | None]:
        steps = (c.unmasking, total_steps(c))
        return standard.get(steps) if _knows_steps(c) else None, semi.get(_semi(c))

    return of


def _semi(c: Configuration) -> tuple:
    """What `vanilla` shares with a configuration compared with it: suffix and commit do not apply to it."""
    return c.unmasking, c.asked_block_length, c.block_add_threshold, c.decoded_token_threshold


def _knows_steps(c: Configuration) -> bool:
    return {"denoising_steps", "max_tokens", "block_length"} <= c.model_fields_set


def speed_up(c: Configuration, baseline: Configuration | None) -> float | None:
    """Ratio of tokens/s."""
    if baseline is None or c.tokens_per_second is None or not baseline.tokens_per_second:
        return None
    return c.tokens_per_second / baseline.tokens_per_second


def on_frontier(run: list[Configuration]) -> list[bool]:
    """For each configuration, whether no other is as fast and as accurate, and better in one of the two.

    A configuration whose speed or accuracy is not known is not on the frontier and keeps no other off it.
    """
    best = -1.0
    frontier = set()
    # from the fastest on, among equals the most accurate first
    for point in sorted({(c.tokens_per_second, c.accuracy) for c in run if _is_drawn(c)}, reverse=True):
        if point[1] > best:
            frontier.add(point)
            best = point[1]
    return [(c.tokens_per_second, c.accuracy) in frontier for c in run]


def _is_drawn(c: Configuration) -> bool:
    return None not in (c.tokens_per_second, c.accuracy)


# What makes two figures the same configuration's, and what must agree for their speeds to be compared.
IDENTITY = ("mode", "block_length", "unmasking", "denoising_steps", "rule_value", *PLAIN)
CONDITIONS = (
    *("model", "weights", "dtype", "quantization", "device", "gpu", "cpu", "cpu_threads", "tensor_parallel_size", "n"),
    *(
        "rows",
        "dataset",
        "dataset_revisions",
        "prompts_version",
        "shards",
        "max_tokens",
        "batch_size",
        "temperature",
        "ignore_eos",
    ),
)


def differing(a: Configuration, b: Configuration, fields: tuple[str, ...]) -> list[str]:
    """The fields that both files have and that differ."""
    there = a.model_fields_set & b.model_fields_set
    return [field for field in fields if field in there and _value(a, field) != _value(b, field)]


def _value(c: Configuration, field: str) -> Any:
    """Of the rows only which they are, not how they were answered."""
    return [row[0] for row in c.rows] if field == "rows" and c.rows is not None else getattr(c, field)


def _reason(field: str, theirs: Configuration, mine: Configuration) -> str:
    if field == "rows":
        return "other rows"
    return f"{field}: {getattr(theirs, field)}, not {getattr(mine, field)}"


def timeline(run: StoredRun, history: list[StoredRun]) -> tuple[list[StoredRun], list[tuple[StoredRun, str]]]:
    """The runs that can be compared with `run`, including it, oldest first; and the others, each with the reason.

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
            others.append((other, "; ".join(_reason(field, theirs, mine) for field in fields)))
        else:
            comparable.append(other)
    return comparable, others


def series(run: list[Configuration], runs: list[StoredRun]) -> list[list[float | None]]:
    """For each configuration its tokens/s in each of the runs; None where a run lacks it."""
    by_run = [_same(run, other.configurations) for other in runs]
    return [[None if c is None else c.tokens_per_second for c in found] for found in zip(*by_run, strict=True)]


def _same(run: list[Configuration], others: list[Configuration]) -> list[Configuration | None]:
    """For each configuration the first of the others with the same identity, as far as both know theirs."""
    first: dict[tuple, int] = {}
    for number, other in enumerate(others):
        first.setdefault(_identity(other), number)
    # few have unknown fields, in files of older versions
    partial = [number for number, other in enumerate(others) if not _knows_itself(other)]
    found = []
    for c in run:
        numbers = range(len(others))
        if _knows_itself(c):
            numbers = sorted({*partial, *({first[_identity(c)]} if _identity(c) in first else ())})
        found.append(next((others[n] for n in numbers if not differing(c, others[n], IDENTITY)), None))
    return found


def _knows_itself(c: Configuration) -> bool:
    return c.model_fields_set.issuperset(IDENTITY)


def _identity(c: Configuration) -> tuple:
    return tuple(getattr(c, field) for field in IDENTITY)


def names(run: list[Configuration]) -> list[str]:
    """A short name for each configuration: its mode, and what distinguishes it from the others."""
    lengths = {c.block_length for c in run if c.mode != STANDARD}
    rules = {(c.unmasking, c.rule_value) for c in run}
    windows = {tuple(extras(c)) for c in run if c.mode != STANDARD}
    standards = Counter(c.unmasking for c in run if c.mode == STANDARD)
    result = []
    for c in run:
        parts = [c.mode]
        if len(lengths) > 1 and c.mode != STANDARD and c.block_length is not None:
            parts.append(str(c.block_length))
        if len(rules) > 1 and c.unmasking is not None:
            parts.append(c.unmasking)
        if c.mode == STANDARD and standards[c.unmasking] > 1 and c.denoising_steps is not None:
            parts.append(f"{c.denoising_steps} steps")
        if len(windows) > 1:
            parts += extras(c)
        result.append(" ".join(parts))
    number, times = Counter(result), Counter()
    for i, name in enumerate(result):
        times[name] += 1
        if number[name] > 1:
            result[i] = f"{name} ({times[name]})"
    return result
