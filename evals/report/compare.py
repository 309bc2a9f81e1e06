"""Configurations beside each other: baselines, frontier, earlier runs, and the names that tell them apart."""

from typing import Any

from evals.configurations import STANDARD, total_steps
from evals.results import Configuration, Run


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
    *("model", "weights", "dtype", "device", "gpu", "cpu", "cpu_threads", "n", "rows", "dataset"),
    *("dataset_revisions", "prompts_version", "shards", "max_tokens", "batch_size", "temperature", "ignore_eos"),
)


def differing(a: Configuration, b: Configuration, fields: tuple[str, ...]) -> list[str]:
    """Those of the fields that both files have and that differ."""
    there = a.model_fields_set & b.model_fields_set
    return [field for field in fields if field in there and _value(a, field) != _value(b, field)]


def _value(c: Configuration, field: str) -> Any:
    """Of the rows only which they are, not how they were answered."""
    return [row[0] for row in c.rows] if field == "rows" and c.rows is not None else getattr(c, field)


def _reason(field: str, theirs: Configuration, mine: Configuration) -> str:
    if field == "rows":
        return "other rows"
    return f"{field}: {getattr(theirs, field)}, not {getattr(mine, field)}"


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
            others.append((other, "; ".join(_reason(field, theirs, mine) for field in fields)))
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
