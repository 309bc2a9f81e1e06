"""What a denoising step is timed on, and what is stored of it."""

import dataclasses
import random
import statistics
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton

from blockinfer import LLM, RequestOutput, SamplingParams
from blockinfer.config import ModelConfig
from blockinfer.engine.block_causal import check_block_causal
from evals.results.record import environment
from evals.results.table import loading_line, number_format
from evals.runs.configurations import PLAIN, STEP
from evals.runs.rounds import Round, standard_error, steadiness
from evals.runs.settings import Settings
from evals.timing.kernels import Ceilings

# Fields of evals.results.record.environment; its others are of the rows, which steps do not have.
_ENVIRONMENT = (
    *("model", "load_format", "weights", "dtype", "quantization", "device", "gpu", "cpu", "cpu_threads"),
    *("torch", "cuda", "python", "tensor_parallel_size", "commit"),
)


class Case(NamedTuple):
    """Requests that arrive at once, and how they are decoded: one token a step if the rule has a schedule.

    lengths: of each request the prompt's tokens and the new ones. No stop token ends one. others: of SamplingParams.
    """

    mode: str
    lengths: list[tuple[int, int]]
    block_length: int
    unmasking: str = "low_confidence"
    others: Mapping[str, Any] = MappingProxyType({})

    @property
    def params(self) -> list[SamplingParams]:
        options = dict(mode=self.mode, block_length=self.block_length, unmasking=self.unmasking, ignore_eos=True)
        options |= self.others
        return [SamplingParams(max_tokens=new, **options) for _, new in self.lengths]


class Timed(NamedTuple):
    """A run: its wall time, the increase of the engine's counts, the new tokens, how often pages were taken, and what
    else the engine did meanwhile."""

    seconds: float
    forwards: int
    rows: int
    lm_head_rows: int
    keys: int
    tokens: int
    preemptions: int
    graphs: int = 0
    compiled: int = 0

    @property
    def round(self) -> Round:
        return Round(self.seconds, self.forwards, self.graphs, self.compiled)

    @property
    def ms_per_step(self) -> float:
        return 1000 * self.seconds / self.forwards


def refusal(llm: LLM, case: Case) -> str | None:
    """Why a block-causal model does not decode like this; None if the model does."""
    try:
        if llm.model_config.block_length is not None:
            check_block_causal(case.params[0])
    except ValueError as error:
        return f"{llm.config.model}: {error}"
    return None


def ragged_lengths(number: int, prompts: tuple[int, int], new: tuple[int, int]) -> list[tuple[int, int]]:
    """Lengths of `number` requests, each uniform within its range, the same in every run."""
    # random() is the one method whose numbers no version of Python changes
    draw = random.Random(0).random

    def within(low: int, high: int) -> int:
        return low + int(draw() * (high - low + 1))

    return [(within(*prompts), within(*new)) for _ in range(number)]


def random_prompts(llm: LLM, lengths: list[tuple[int, int]], seed: int = 0) -> list[list[int]]:
    """Token ids, none of them special, the same in every run."""
    special = {llm.config.mask_token_id, *llm.model_config.eos_token_ids}
    if llm.tokenizer is not None:
        special |= set(llm.tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(llm.model_config.vocab_size) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    return [ordinary[torch.randint(len(ordinary), (prompt,), generator=generator)].tolist() for prompt, _ in lengths]


def timed_run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> tuple[Timed, list[RequestOutput]]:
    before = llm.stats
    start = time.perf_counter()
    # ends with the token ids on the host, so the device is done
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    after = llm.stats
    counted = ("forwards", "rows", "lm_head_rows", "keys", "graphs", "compiled")
    counts = {name: getattr(after, name) - getattr(before, name) for name in counted}
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return Timed(seconds, **counts, tokens=tokens, preemptions=sum(o.metrics.preemptions for o in outputs)), outputs


def about(name: str, case: Case, llm: LLM, environment: dict[str, Any]) -> dict[str, Any]:
    """What a case's figures depend on, as known before the run."""
    params = case.params[0]
    prompts, new = zip(*case.lengths, strict=True)
    return environment | {
        STEP: name,
        "mode": case.mode,
        "unmasking": case.unmasking,
        "rule_value": params.rule_value,
        "block_length": case.block_length,
        "denoising_steps": params.denoising_steps,
        **{name: getattr(params, name) for name in PLAIN},
        "requests": len(case.lengths),
        "max_num_seqs": llm.config.max_num_seqs,
        "prompt_tokens": [min(prompts), max(prompts)],
        "mean_prompt_tokens": statistics.fmean(prompts),
        "new_tokens": [min(new), max(new)],
        "mean_new_tokens": statistics.fmean(new),
    }


def environment_of(settings: Settings, llm: LLM) -> dict[str, Any]:
    """What the figures depend on besides the case; no host name."""
    known = environment(settings, llm.config.dtype, llm.config.quantization)
    return {key: known[key] for key in _ENVIRONMENT} | {"triton": triton.__version__}


def least_ms(
    run: Timed,
    config: ModelConfig,
    itemsize: int,
    ceilings: Ceilings,
    quantization: str | None = None,
    ranks: int = 1,
) -> dict[str, float]:
    """The least ms of a step with these counts on each rank's device, by the ceilings stored beside it: ms to read the
    weights that a forward needs and the keys and values that it attends to, and ms for its matrix products, without
    attention's own. Of a mixture's experts, only those of one row are counted as read; a step may read more. Quantised
    layers take a byte a value, and half the time for their products."""
    kv_width, width = config.n_kv_heads * config.head_dim, config.d_model
    qkv, after = width * (width + 2 * kv_width), width * width + config.mlp_elements
    head = width * config.embedding_size
    value, pace = (1, 2) if quantization else (itemsize, 1)
    # after its attention the last layer, like the LM head, computes only the masked rows
    flops = 2 * config.n_layers * qkv * run.rows + 2 * after * ((config.n_layers - 1) * run.rows + run.lm_head_rows)
    flops = flops / pace + 2 * head * run.lm_head_rows
    read = (config.n_layers * (qkv + after) * value + head * itemsize) * run.forwards
    read += 2 * config.n_layers * kv_width * run.keys * itemsize
    return {
        "least_read_ms": 1000 * read / ceilings.read / run.forwards / ranks,
        "least_products_ms": 1000 * flops / ceilings.sustained_matmul / run.forwards / ranks,
        "read_tb_per_s": ceilings.read / 1e12,
        "sustained_matmul_tflop_per_s": ceilings.sustained_matmul / 1e12,
    }


def warmed_up(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> float:
    """Seconds of an untimed run of as many requests as run at once, with one step a block."""
    number = llm.config.max_num_seqs
    quick = [dataclasses.replace(one, denoising_steps=1) for one in params[:number]]
    return timed_run(llm, prompts[:number], quick)[0].seconds


def figures(first_seconds: float, runs: list[Timed]) -> dict[str, Any]:
    """What is stored of a case: the medians of its steady rounds. first_seconds: of the untimed run before them."""
    steady, unsteady, left = steadiness([run.round for run in runs])
    rounds = runs[-len(left) :]
    last = rounds[-1]
    return {
        "ms_per_step": statistics.median(run.ms_per_step for run in rounds),
        "tokens_per_second": statistics.median(run.tokens / run.seconds for run in rounds),
        "seconds": statistics.median(run.seconds for run in rounds),
        "first_seconds": first_seconds,
        "rounds": len(rounds),
        "relative_error": standard_error([run.seconds for run in rounds]),
        "steady": steady,
        "unsteady": unsteady,
        "forwards": last.forwards,
        "model_rows": last.rows,
        "lm_head_rows": last.lm_head_rows,
        "keys": last.keys,
        "tokens": last.tokens,
        "preemptions": last.preemptions,
    }


def memory(llm: LLM) -> dict[str, float | None]:
    """GB of weights, of the KV cache, and of all else at the peak since its reset, which is known only on a GPU."""
    runner = llm.engine.runner
    weights, pool = sum(weight.nbytes for weight in runner.model.parameters()), runner.kv_pages.nbytes
    other = torch.cuda.max_memory_allocated() - weights - pool if llm.config.device.type == "cuda" else None
    sizes = {"weights_gb": weights, "kv_cache_gb": pool, "other_gb": other}
    return {name: None if size is None else size / 1e9 for name, size in sizes.items()}


def beside_uniform(info: dict[str, Any], case: Case, run: Timed) -> dict[str, Any]:
    """What ragged requests' figures are compared with: a run of requests of one length."""
    (prompt, new), speed = case.lengths[0], run.tokens / run.seconds
    return {
        "uniform_requests": len(case.lengths),
        "uniform_prompt_tokens": prompt,
        "uniform_new_tokens": new,
        "uniform_ms_per_step": run.ms_per_step,
        "uniform_tokens_per_second": speed,
        "times_uniform": info["tokens_per_second"] / speed,
    }


def agreement(alone: list[RequestOutput], together: list[RequestOutput]) -> dict[str, float]:
    """The shares of tokens and of sequences that are equal, over the first requests, which were also sent alone; all
    have the length that their params say."""
    pairs = [(a.outputs[0].token_ids, b.outputs[0].token_ids) for a, b in zip(alone, together, strict=False)]
    equal = [one == other for a, b in pairs for one, other in zip(a, b, strict=True)]
    return {
        "sequences_compared": len(pairs),
        "share_of_tokens_equal": statistics.fmean(equal),
        "share_of_sequences_equal": statistics.fmean(a == b for a, b in pairs),
    }


def table(infos: list[dict[str, Any]]) -> list[str]:
    """A row for each case, below what all of them share; as lines of text."""
    first = infos[0]
    lines = [
        f"{first['model']} ({first['weights']} weights) in {number_format(first)}, {first['gpu'] or first['cpu']}",
        f"{'case':<28}{'requests':>9}{'forwards':>10}{'ms/step':>10}{'tokens/s':>10}"
        f"{'of the minimum':>22}{'first s':>9}{'other GB':>10}",
    ]
    for info in infos:
        other = "-" if info["other_gb"] is None else f"{info['other_gb']:.2f}"
        least, what = max((info["least_read_ms"], "reading"), (info["least_products_ms"], "products"))
        reached = f"{100 * least / info['ms_per_step']:.0f} %, {what}"
        line = f"{info[STEP]:<28}{info['requests']:>9}{info['forwards']:>10}{info['ms_per_step']:>10.2f}"
        line += f"{info['tokens_per_second']:>10.1f}{reached:>22}"
        lines.append(f"{line}{info['first_seconds']:>9.2f}{other:>10}")
    for info in infos:
        if "times_uniform" in info:
            lines.append(
                f"{info[STEP]}: {info['times_uniform']:.2f} times the tokens/s of requests that are all as long as the "
                f"middle of its ranges, {info['uniform_tokens_per_second']:.1f}"
            )
        if "share_of_tokens_equal" in info:
            tokens, sequences = info["share_of_tokens_equal"], info["share_of_sequences_equal"]
            lines.append(
                f"{info[STEP]}: {100 * tokens:.1f} % of the tokens and {100 * sequences:.1f} % of the first "
                f"{info['sequences_compared']} sequences are those of requests sent one at a time"
            )
    lines += [f"{info[STEP]} is not steady: {info['unsteady']}" for info in infos if info["unsteady"]]
    lines.append(loading_line(first))
    lines.append(
        "ms/step: wall time over forwards, the prompt's included; first s: an untimed run before, one step per block"
    )
    lines.append(
        "of the minimum: the share of ms/step that the device needs to read weights, keys and values at "
        f"{first['read_tb_per_s']:.3g} TB/s,"
    )
    lines.append(
        f"or for the products at {first['sustained_matmul_tflop_per_s']:.3g} TFLOP/s, as it was measured to sustain"
    )
    lines.append("other GB: the GPU's peak memory, besides weights and KV cache")
    return lines
