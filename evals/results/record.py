"""What is stored of a run: its figures, and what they depend on."""

import dataclasses
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers

from blockinfer import LLM
from evals.questions.rows import rows_hash
from evals.results.wilson import wilson_interval
from evals.runs.configurations import PLAIN, REFERENCE_IMPL
from evals.runs.git import commit
from evals.runs.machine import cpu_name, gpu_name
from evals.runs.rounds import standard_error
from evals.runs.run import Run, by_source, unextracted
from evals.runs.settings import Case, Settings


def question(case: Case, settings: Settings, truncated: int, environment: dict[str, Any]) -> dict[str, Any]:
    """What a configuration's figures depend on, as known before the run: rows, settings and environment."""
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
        **{name: getattr(params, name) for name in PLAIN},
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "ignore_eos": params.ignore_eos,
        "batch_size": 1 if case.mode == REFERENCE_IMPL else settings.batch_size,
    }


def loading(llm: LLM) -> dict[str, float | int]:
    """The time before the first request: seconds until the model was ready, including those spent capturing CUDA
    graphs, the number of graphs, and their memory."""
    stats = llm.stats
    return {
        "load_seconds": llm.load_seconds,
        "capture_seconds": stats.capture_seconds,
        "graphs": stats.graphs,
        "graph_bytes": stats.graph_bytes,
    }


def extra_info(run: Run, settings: Settings, truncated: int, environment: dict[str, Any]) -> dict[str, Any]:
    """One configuration's figures, as stored beside its timing. All numbers are finite; unknown ones are None."""
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
        "unextracted_by_source": unextracted(run, settings),
        # LongBench reports this of the whole output for its own sets
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


def environment(settings: Settings, dtype: torch.dtype, quantization: str | None = None) -> dict[str, Any]:
    """What the figures depend on besides the configuration; no host name."""
    return {
        "model": "evals/llada_tiny" if settings.is_tiny else settings.model,
        "load_format": settings.load_format,
        "weights": "random" if settings.is_dummy else "checkpoint",
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": quantization,
        "device": settings.device,
        "gpu": gpu_name(settings.device),
        "cpu": cpu_name(settings.device),
        "cpu_threads": torch.get_num_threads(),
        "tensor_parallel_size": settings.tensor_parallel_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "dataset": Path(settings.dataset).name,
        "dataset_revisions": sorted({row["revision"] for row in settings.rows if "revision" in row}),
        "grader_versions": settings.grader_versions,
        "prompts_version": settings.prompts_version,
    }
