"""What a run stores: the figures of one configuration, the comparison file, and the table for a person."""

import dataclasses
import json
import platform
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from blockinfer import LLM, RequestOutput
from evals.configurations import REFERENCE_IMPL, STANDARD, is_baseline, total_steps
from evals.files import write_measured
from evals.git import git_environment
from evals.graders import GRADER_VERSIONS, Grade
from evals.machine import cpu_name, gpu_name
from evals.prompts import PROMPTS_VERSION
from evals.rounds import Round, ratio_factor, standard_error
from evals.rows import rows_hash
from evals.settings import Case, Settings
from evals.wilson import wilson_interval


@dataclass
class Run:
    """One configuration's timed rounds: each round's seconds; of the last its outputs, their grades, its forwards.

    forwards are the model's, each shared by several requests. grades is None with random weights. peak_memory_gib is
    the GPU's, None on a CPU. resumed is the number of outputs that an earlier run generated: where there are any,
    seconds is empty, and forwards and peak_memory_gib are None. rounds, steady and unsteady are evals.rounds.Steadiness
    of the rounds, first_seconds the time of the untimed run before them.
    """

    case: Case
    outputs: list[RequestOutput]
    grades: list[Grade] | None
    seconds: list[float]
    forwards: int | None
    peak_memory_gib: float | None
    resumed: int = 0
    rounds: list[Round] = dataclasses.field(default_factory=list)
    steady: bool | None = None
    unsteady: str | None = None
    first_seconds: float | None = None

    @property
    def tokens(self) -> int:
        """Generated positions before the first stop token."""
        return sum(len(output.outputs[0].token_ids) for output in self.outputs)

    @property
    def nfe(self) -> int:
        """Forwards that each request took part in, summed over the requests."""
        return sum(output.metrics.nfe for output in self.outputs)

    @property
    def median_seconds(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.median_seconds if self.seconds else None

    @property
    def ms_per_forward(self) -> float | None:
        return 1000 * self.median_seconds / self.forwards if self.seconds else None

    @property
    def accuracy(self) -> float | None:
        return statistics.fmean(g.correct for g in self.grades) if self.grades else None


def by_source(run: Run, settings: Settings) -> dict[str, list[Grade]]:
    """The grades, source by source; empty with random weights."""
    grades: dict[str, list[Grade]] = {}
    for row, one in zip(settings.rows, run.grades or [], strict=False):
        grades.setdefault(row["source"], []).append(one)
    return grades


def question(case: Case, settings: Settings, truncated: int, environment: dict[str, Any]) -> dict[str, Any]:
    """What a configuration's figures are figures of, as known before the run: rows, settings and environment."""
    params = case.params
    return environment | {
        "n": len(settings.rows),
        "rows_sha256": rows_hash(settings.rows),
        "shard": dataclasses.asdict(settings.shard) if settings.shard else None,
        "prompts_truncated": truncated,
        "mode": case.mode,
        "unmasking": params.unmasking,
        "block_length": params.block_length,
        "denoising_steps": params.denoising_steps,
        "rule_value": params.rule_value,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "ignore_eos": params.ignore_eos,
        "batch_size": 1 if case.mode == REFERENCE_IMPL else settings.batch_size,
    }


def loading(llm: LLM) -> dict[str, float | int]:
    """What was done before the first request: seconds until the model was ready, in them those in which CUDA graphs
    were captured, how many, and their memory."""
    stats = llm.stats
    return {
        "load_seconds": llm.load_seconds,
        "capture_seconds": stats.capture_seconds,
        "graphs": stats.graphs,
        "graph_bytes": stats.graph_bytes,
    }


def loading_line(info: dict[str, Any]) -> str:
    if not info["graphs"]:
        return f"loaded in {info['load_seconds']:.1f} s"
    return (
        f"loaded in {info['load_seconds']:.1f} s, of which {info['capture_seconds']:.1f} for capturing "
        f"{info['graphs']} CUDA graphs, which take {info['graph_bytes'] / 1e9:.2f} GB"
    )


def extra_info(run: Run, settings: Settings, truncated: int, environment: dict[str, Any]) -> dict[str, Any]:
    """One configuration's figures, as stored beside its timing. All numbers are finite; what is not known is None."""
    outputs = run.outputs
    latencies = sorted(output.metrics.total_seconds for output in outputs)
    sources = by_source(run, settings)
    steps = sum(output.metrics.denoising_steps for output in outputs)
    correct = sum(g.correct for g in run.grades) if run.grades else None
    return question(run.case, settings, truncated, environment) | {
        "rows": rows_info(run, settings),
        "tokens": run.tokens,
        "tokens_per_second": run.tokens_per_second,
        "steps": steps,
        "nfe": run.nfe,
        "tokens_per_step": run.tokens / steps,
        "tokens_per_forward": run.tokens / run.nfe,
        "forwards": run.forwards,
        "ms_per_forward": run.ms_per_forward,
        "seconds": run.median_seconds,
        "rounds": len(run.seconds),
        "relative_error": standard_error(run.seconds),
        "steady": run.steady,
        "unsteady": run.unsteady,
        "first_seconds": run.first_seconds,
        "resumed": run.resumed,
        "latency_p50": None if run.resumed else latencies[len(latencies) // 2],
        "latency_p95": None if run.resumed else latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))],
        "accuracy": run.accuracy,
        "accuracy_interval": wilson_interval(correct, len(outputs)) if run.grades else None,
        "n_by_source": {source: len(grades) for source, grades in sources.items()},
        "accuracy_by_source": {s: statistics.fmean(g.correct for g in grades) for s, grades in sources.items()},
        "score_by_source": {s: statistics.fmean(g.score for g in grades) for s, grades in sources.items()},
        # what LongBench reports for its own sets, of the whole output
        "longbench_f1_by_source": {
            s: statistics.fmean(g.longbench_f1 for g in grades)
            for s, grades in sources.items()
            if grades[0].longbench_f1 is not None
        },
        "peak_memory_gib": run.peak_memory_gib,
        "mean_prompt_tokens": statistics.fmean(len(output.prompt_token_ids) for output in outputs),
        "mean_generated_tokens": run.tokens / len(outputs),
        "stopped": sum(output.outputs[0].finish_reason == "stop" for output in outputs),
    }


def rows_info(run: Run, settings: Settings) -> list[list[Any]]:
    """[id, tokens, nfe, correct] of every row, in their order; correct is None with random weights."""
    grades = run.grades or [None] * len(run.outputs)
    return [
        [row["id"], len(output.outputs[0].token_ids), output.metrics.nfe, grade.correct if grade else None]
        for row, output, grade in zip(settings.rows, run.outputs, grades, strict=True)
    ]


def environment(settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """What the figures depend on besides the configuration; no host name."""
    return {
        "model": "evals/llada_tiny" if settings.is_tiny else settings.model,
        "load_format": settings.load_format,
        "weights": "random" if settings.is_dummy else "checkpoint",
        "dtype": str(dtype).removeprefix("torch."),
        "device": settings.device,
        "gpu": gpu_name(settings.device),
        "cpu": cpu_name(settings.device),
        "cpu_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "dataset": Path(settings.dataset).name,
        "dataset_revisions": sorted({row["revision"] for row in settings.rows if "revision" in row}),
        "grader_versions": GRADER_VERSIONS,
        "prompts_version": PROMPTS_VERSION,
    }


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None where this is no git checkout."""
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
        folder = Path(__file__).parent
        options = dict(cwd=folder, env=git_environment(), capture_output=True, text=True, check=True)
        return subprocess.run(command, **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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
            "batch_size": settings.batch_size,
        },
        "environment": about,
    }
    write_measured(path, json.dumps(result, indent=2, allow_nan=False) + "\n")


def baselines(case: Case, runs: list[Run]) -> tuple[Run | None, Run | None]:
    """The runs that `case` is compared with: the standard decoding in as many steps in all, and `vanilla`."""
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
    """A ratio of tokens/s and its 95 % interval, which is not known where either was timed once."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        known = "one round" if self.interval is None else "({}-{})".format(*map(_short, self.interval))
        return f"{_short(self.value)} {known}"


def _short(ratio: float) -> str:
    return f"{ratio:.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}"


def speed_up(run: Run | None, baseline: Run | None) -> SpeedUp | None:
    """None where either is missing, was resumed, or has no tokens."""
    if run is None or baseline is None or not baseline.tokens or not run.seconds or not baseline.seconds:
        return None
    value, factor = run.tokens_per_second / baseline.tokens_per_second, ratio_factor(run.rounds, baseline.rounds)
    return SpeedUp(value, None if factor is None else (value / factor, value * factor))


def intervals(run: Run, runs: list[Run]) -> dict[str, tuple[float, float] | None]:
    """Of the speed-ups, as stored beside the figures; the run's own ratio to itself has none."""
    ratios = [None if baseline is run else speed_up(run, baseline) for baseline in baselines(run.case, runs)]
    standard, semi = [ratio and ratio.interval for ratio in ratios]
    return {"interval_over_standard": standard, "interval_over_vanilla": semi}


def table(runs: list[Run]) -> list[str]:
    """A row per configuration, as lines of text; speed-ups are ratios of tokens/s at the same rule."""
    head = f"{'mode':<14}{'block':>5}  {'rule':<14}{'tokens/s':>9}{'+-%':>5}{'tok/fwd':>8}{'NFE':>7}{'ms/fwd':>7}"
    lines = [head + f"{'accuracy':>15}{'x standard':>18}{'x vanilla':>18}"]
    for run in runs:
        case = run.case
        error = standard_error(run.seconds)
        speed, step = (f"{run.tokens_per_second:.1f}", f"{run.ms_per_forward:.1f}") if run.seconds else ("resumed", "-")
        line = f"{case.mode:<14}{case.block_length:>5}  {case.unmasking:<14}{speed:>9}"
        line += f"{'-' if error is None else f'{100 * error:.1f}':>5}"
        line += f"{run.tokens / run.nfe:>8.2f}{run.nfe:>7}{step:>7}{_accuracy(run):>15}"
        lines.append(line + "".join(f"{_times(run, baseline):>18}" for baseline in baselines(case, runs)))
    lines += [f"{run.case.mode} {run.case.block_length} is not steady: {run.unsteady}" for run in runs if run.unsteady]
    return lines


def first_pass_line(runs: list[Run]) -> str | None:
    """None where nothing was warmed up."""
    known = [f"{run.case.mode} {run.first_seconds:.2f}" for run in runs if run.first_seconds is not None]
    return f"first batch, untimed, a step a block, s: {', '.join(known)}" if known else None


def _accuracy(run: Run) -> str:
    if not run.grades:
        return "random weights"
    low, high = wilson_interval(sum(g.correct for g in run.grades), len(run.grades))
    return f"{100 * run.accuracy:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def _times(run: Run, baseline: Run | None) -> str:
    if run is baseline and run.seconds:
        return "1"
    ratio = speed_up(run, baseline)
    return str(ratio) if ratio else "-"
