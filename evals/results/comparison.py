"""Runs of a session compared with each other: their ratios, and the file of `--output`."""

import json
import statistics
from typing import Any, NamedTuple

from evals.files import write_measured
from evals.runs.configurations import PLAIN, STANDARD, is_baseline, total_steps
from evals.runs.rounds import ratio_factor
from evals.runs.run import Run
from evals.runs.settings import Case, Settings


def write_comparison(path: str, runs: list[Run], settings: Settings, about: dict[str, Any]) -> None:
    """The file of `--output`: `block` at its first block length, the standard decoding, and the ratios between them.

    Raises BadOutput.
    """
    block = next((run for run in runs if run.case.mode == "block"), None)
    standard, semi = baselines((block or runs[0]).case, runs)
    result = {
        "blockinfer": _figures(block),
        "vanilla_llada": _figures(standard),
        "comparison": _ratios(block, standard),
        "vanilla": _figures(semi),
        "comparison_over_vanilla": _ratios(block, semi),
        "settings": {
            "num_samples": len(settings.rows),
            "max_tokens": settings.max_tokens,
            "block_length": block.case.block_length if block else None,
            "denoising_steps": block.case.params.denoising_steps if block else None,
            "unmasking": block.case.unmasking if block else None,
            **{name: getattr(block.case.params, name) if block else None for name in PLAIN},
            "batch_size": settings.batch_size,
        },
        "environment": about,
    }
    write_measured(path, json.dumps(result, indent=2, allow_nan=False) + "\n")


def baselines(case: Case, runs: list[Run]) -> tuple[Run | None, Run | None]:
    """The runs that `case` is compared with: standard decoding with as many steps in all, and `vanilla`."""
    same = [run for run in runs if run.case.unmasking == case.unmasking]
    steps = total_steps(case.params)
    standard = [run for run in same if run.case.mode == STANDARD and total_steps(run.case.params) == steps]
    semi = [run for run in same if is_baseline(run.case, case)]
    return next(iter(standard), None), next(iter(semi), None)


def _figures(run: Run | None) -> dict[str, Any] | None:
    if run is None:
        return None
    return {
        "total_time": run.median_seconds,
        "total_tokens": run.tokens,
        "throughput": run.tokens_per_second,
        "avg_latency": None if run.resumed else statistics.fmean(o.metrics.total_seconds for o in run.outputs),
        "accuracy": None if run.accuracy is None else 100 * run.accuracy,
    }


def _ratios(run: Run | None, baseline: Run | None) -> dict[str, Any] | None:
    ratio = speed_up(run, baseline)
    if ratio is None:
        return None
    return {
        "throughput_speedup": ratio.value,
        "throughput_speedup_interval": ratio.interval,
        "time_speedup": baseline.median_seconds / run.median_seconds,
    }


class SpeedUp(NamedTuple):
    """A ratio of tokens/s and its 95 % interval, which is not known if either was timed only once."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        known = "one round" if self.interval is None else "({}-{})".format(*map(_short, self.interval))
        return f"{_short(self.value)} {known}"


def _short(ratio: float) -> str:
    return f"{ratio:.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}"


def speed_up(run: Run | None, baseline: Run | None) -> SpeedUp | None:
    """None if either is missing, was resumed, or has no tokens."""
    if run is None or baseline is None or not baseline.tokens or not run.seconds or not baseline.seconds:
        return None
    value, factor = run.tokens_per_second / baseline.tokens_per_second, ratio_factor(run.rounds, baseline.rounds)
    return SpeedUp(value, None if factor is None else (value / factor, value * factor))


def intervals(run: Run, runs: list[Run]) -> dict[str, tuple[float, float] | None]:
    """The speed-ups' intervals, as stored beside the figures; a run's ratio to itself has none."""
    ratios = [None if baseline is run else speed_up(run, baseline) for baseline in baselines(run.case, runs)]
    standard, semi = [ratio and ratio.interval for ratio in ratios]
    return {"interval_over_standard": standard, "interval_over_vanilla": semi}
