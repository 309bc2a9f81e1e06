"""Where the milliseconds of a denoising step go on a GPU: `python -m evals stages --mode block --batch 1 --prompt 128`.

A warm run of `LLM.generate` is timed without a profiler, then run again under torch.profiler, whose times of the GPU's
kernels are summed by stage. idle is the first run's wall time minus the time in which the second had a kernel running:
it is below 0 if the profiler slows kernels down by more than they waited.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from blockinfer import LLM
from blockinfer.config import DTYPES
from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from blockinfer.models.registry import SHAPES
from blockinfer.quantization import QUANTIZATIONS
from evals.files import BadOutput, check_output, number_argument, path_argument, text_argument, write_measured
from evals.results.table import number_format
from evals.runs.git import commit
from evals.runs.machine import gpu_name
from evals.timing.steps import Case, Timed, random_prompts, timed_run, warmed_up

PRODUCTS, LM_HEAD, CONFIDENCE, OTHERS = "matrix products", "LM head product", "confidence", "unmasking and indices"
EXPERTS, ROUTER, RANKS = "products of experts", "router", "sums over ranks"
QUANTIZING = "quantising rows"
# The first one found in a kernel's name decides. The last are cuBLAS's, nccl is NCCL's, the others are those of
# blockinfer/kernels, where products may end with SiLU x up, and norms begin with the sum of a product's parts; those
# that begin with a sum over ranks are counted as such.
_STAGES = [
    ("_(skinny|fp8|hopper)_linear_kernel", PRODUCTS),
    ("_(paged|wide)_attention_kernel", "attention"),
    ("_sum_(parts|rms_norm)_kernel|nccl", RANKS),
    ("_rms_norm_kernel", "norms"),
    ("_rope_store_kv_kernel", "RoPE + K/V store"),
    ("_silu_mul_kernel", "SiLU x up"),
    ("_quantize_rows_kernel", QUANTIZING),
    ("_grouped_linear_kernel", EXPERTS),
    ("_route_kernel|_expert_(count|order)_kernel", ROUTER),
    ("_(tile|noise|merge|log_probability)_kernel", CONFIDENCE),
    (r"nvjet|xmma|cutlass|cublas|gemm|gemv|splitk", PRODUCTS),
]
STAGES = [PRODUCTS, EXPERTS, LM_HEAD, "attention", "norms", "RoPE + K/V store", "SiLU x up", QUANTIZING]
STAGES += [ROUTER, CONFIDENCE, RANKS, OTHERS]


class Kernel(NamedTuple):
    """Work on the GPU, copies and fills included. start, end: microseconds."""

    name: str
    start: float
    end: float


def stage_of(name: str) -> str | None:
    """None for the kernel that combines the results of the one before it: attention and confidence have one of that
    name."""
    if name.startswith("_combine_kernel"):
        return None
    found = (stage for pattern, stage in _STAGES if re.search(pattern, name, re.IGNORECASE))
    return next(found, OTHERS)


def stages_of(kernels: Sequence[Kernel]) -> list[str]:
    """The stage of each kernel, in the order in which they ran. The product right before the confidence is the LM
    head's."""
    stages: list[str] = []
    for kernel in kernels:
        stage = stage_of(kernel.name)
        stages.append(stage or (stages[-1] if stages else OTHERS))
        if stage == CONFIDENCE:
            at = len(stages) - 2
            while at >= 0 and stages[at] == PRODUCTS:
                stages[at] = LM_HEAD
                at -= 1
    return stages


def own_times(kernels: Iterable[Kernel]) -> list[float]:
    """Of each kernel, in the order of their starts, the microseconds in which none before it ran.

    A kernel launched early (programmatic dependent launch) waits for the one before it, and that wait is not its time.
    """
    times, until = [], float("-inf")
    for _, start, end in kernels:
        times.append(max(0.0, end - max(start, until)))
        until = max(until, end)
    return times


def figures(kernels: list[Kernel], run: Timed, profiled: Timed) -> dict[str, Any]:
    """ms a step by stage, and the number of kernels; run was timed without the profiler, profiled with it."""
    kernels = sorted(kernels, key=lambda kernel: kernel.start)
    milliseconds, launches = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
    times = own_times(kernels)
    for microseconds, stage in zip(times, stages_of(kernels), strict=True):
        milliseconds[stage] += microseconds / 1000 / profiled.forwards
        launches[stage] += 1 / profiled.forwards
    return {
        "ms_by_stage": milliseconds,
        "kernels_by_stage": launches,
        "idle_ms": run.ms_per_step - sum(times) / 1000 / profiled.forwards,
        "ms_per_step": run.ms_per_step,
        "profiled_ms_per_step": profiled.ms_per_step,
        "forwards": run.forwards,
        "tokens_per_second": run.tokens / run.seconds,
    }


def table(info: dict[str, Any]) -> list[str]:
    lines = [f"{'stage':<24}{'ms/step':>9}{'share':>9}{'kernels/step':>14}"]
    total = info["ms_per_step"]
    for stage, milliseconds in info["ms_by_stage"].items():
        share, number = f"{100 * milliseconds / total:.1f} %", info["kernels_by_stage"][stage]
        lines.append(f"{stage:<24}{milliseconds:>9.3f}{share:>9}{number:>14.1f}")
    for title, milliseconds in (("GPU idle", info["idle_ms"]), ("wall time", total)):
        share = f"{100 * milliseconds / total:.1f} %"
        lines.append(f"{title:<24}{milliseconds:>9.3f}{share:>9}")
    return lines


def measure(llm: LLM, case: Case) -> dict[str, Any]:
    prompts, params = random_prompts(llm, case.lengths), case.params
    warmed_up(llm, prompts, params)
    run, _ = timed_run(llm, prompts, params)
    # the profiler itself starts slowly, and events during its start can be lost
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True):
        timed_run(llm, prompts, params)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        profiled, _ = timed_run(llm, prompts, params)
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    times = [(event, event.time_range) for event in events if not event.is_user_annotation]
    return figures([Kernel(event.name, time.start, time.end) for event, time in times], run, profiled)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m evals stages", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        type=text_argument,
        default="llada-8b",
        help=f"a checkpoint, or a shape with random weights: {', '.join(SHAPES)}",
    )
    add("--dtype", default="bfloat16", choices=DTYPES)
    add("--quantization", choices=QUANTIZATIONS, help="of the layers' matrices (none)")
    add("--mode", default="block", choices=MODES)
    add("--unmasking", default="low_confidence", choices=RULES)
    add("--batch", type=number_argument(1), default=1, help="requests at once (1)")
    add("--prompt", type=number_argument(1), default=128, help="tokens of each prompt, drawn at random (128)")
    add("--max-tokens", type=number_argument(1), default=256, help="new tokens of each (256)")
    add("--block-length", type=number_argument(1), default=32, help="positions denoised together (32)")
    add("--json", type=path_argument, help="a file for the figures")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    try:
        if options.json:
            check_output(options.json, [options.model])
    except BadOutput as error:
        print(f"stages: --json: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("stages: this needs a GPU, whose kernels it times; this torch sees none", file=sys.stderr)
        return 2
    case = Case(
        options.mode, [(options.prompt, options.max_tokens)] * options.batch, options.block_length, options.unmasking
    )
    load_format = "dummy" if options.model in SHAPES else "auto"
    about = vars(options) | {"gpu": gpu_name("cuda"), "torch": torch.__version__, "commit": commit()}
    try:
        formats = dict(dtype=options.dtype, quantization=options.quantization, load_format=load_format)
        with LLM(options.model, max_num_seqs=options.batch, **formats) as llm:
            info = measure(llm, case)
    except ValueError as error:
        print(f"stages: {error}", file=sys.stderr)
        return 2
    weights = "random" if load_format == "dummy" else "its"
    print(f"{options.model} ({weights} weights), {number_format(about)}, {about['gpu']}")
    print("\n".join(table(info)))
    if options.json:
        content = {key: value for key, value in about.items() if key != "json"} | info
        try:
            write_measured(options.json, json.dumps(content, indent=2, allow_nan=False) + "\n")
        except BadOutput as error:
            print(f"stages: --json: {error}", file=sys.stderr)
            return 2
    return 0
