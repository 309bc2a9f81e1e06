"""How a kernel is timed, and what its figures are fractions of.

On a GPU a call's time is GPU time: calls over many sets of buffers form one CUDA graph, which is replayed for some
milliseconds and then waited for. The gap between two kernels of a graph is included, as it is in the engine.
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton

from evals.runs.configurations import KERNEL

Call = Callable[[], Any]

# A GPU round is this long: launching the graphs and waiting for them, some 20 us, is little beside it.
ROUND_SECONDS = 5e-3
# A GPU that multiplies for longer reaches its power limit and lowers its clock: an H200 from 1.98 to 1.5 GHz.
SUSTAINED_SECONDS = {"cuda": 1.0, "cpu": 0.0}


class Work(NamedTuple):
    """A kernel at one shape, and the baseline it is compared with.

    calls, beside: the kernel's and the baseline's calls, each on one set of buffers after the other. moved: the bytes
    that a call must read and write at least; flops: those of its matrix products.
    """

    kernel: str
    shape: dict[str, int | str]
    calls: list[Call]
    held_against: str
    beside: list[Call]
    moved: int
    flops: int = 0


class Ceilings(NamedTuple):
    """What the device was measured to reach: bytes/s of a copy (reads plus writes) and of a sum; FLOP/s of a matrix
    product, in short rounds and after SUSTAINED_SECONDS of repetition."""

    copy: float
    read: float
    matmul: float
    sustained_matmul: float


class Round(NamedTuple):
    """run makes `calls` calls and waits for the device."""

    run: Callable[[], None]
    calls: int

    def seconds(self) -> float:
        """The seconds of one call."""
        start = time.perf_counter()
        self.run()
        return (time.perf_counter() - start) / self.calls


def num_sets(moved: int, device: str) -> int:
    """How many sets of `moved` bytes it takes so that a GPU's L2 cache has lost a set before its next turn."""
    if device == "cpu":
        return 2
    return max(2, math.ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / moved))


def copies(moved: int, device: str) -> list[Call]:
    """Plain copies that move as many bytes as a kernel must, half of them read and half written."""
    # whole vectors, each set at an aligned address
    half = max(1, moved // 512) * 256
    source, target = torch.zeros(2, num_sets(moved, device), half, dtype=torch.uint8, device=device)
    return [partial(into.copy_, out_of) for into, out_of in zip(target, source, strict=True)]


def make_round(calls: list[Call], device: str) -> Round:
    """Every call at least once, in order."""
    # what a first call compiles or loads cannot be compiled or loaded during a graph's capture
    _make(calls)
    if device == "cpu":
        return Round(partial(_make, calls), len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _make(calls)
    once = Round(partial(_replay, graph, 1), 1)
    # the first replay uploads the graph to the device
    once.run()
    times = max(1, math.ceil(ROUND_SECONDS / once.seconds()))
    return Round(partial(_replay, graph, times), times * len(calls))


def _make(calls: list[Call]) -> None:
    for call in calls:
        call()


def _replay(graph: torch.cuda.CUDAGraph, times: int) -> None:
    for _ in range(times):
        graph.replay()
    torch.cuda.synchronize()


def measure_ceilings(dtype: torch.dtype, device: str) -> Ceilings:
    """On a GPU from 2 GiB, read or copied, and from matrices of 8,192 x 8,192 in dtype; less on a CPU."""
    large, width = (2**29, 8192) if device == "cuda" else (2**22, 256)
    source, target = torch.randn(2, large, device=device)
    a, b = torch.randn(2, width, width, device=device).to(dtype)
    size, flops, multiply = source.nbytes, 2 * width**3, partial(torch.matmul, a, b)
    # by a kernel: as a CUDA graph's copy node, 2 GiB were measured to take 1.5 times as long
    copying = partial(torch.neg, source, out=target)
    copy, read, product = (_median_seconds(call, device) for call in (copying, source.sum, multiply))
    sustained = _median_seconds(multiply, device, SUSTAINED_SECONDS[device])
    return Ceilings(2 * size / copy, size / read, matmul=flops / product, sustained_matmul=flops / sustained)


def _median_seconds(call: Call, device: str, after: float = 0.0) -> float:
    """The median of seven rounds, which begin after `after` seconds of others."""
    round = make_round([call], device)
    start = time.perf_counter()
    while time.perf_counter() - start < after:
        round.run()
    return statistics.median(round.seconds() for _ in range(7))


def figures(work: Work, seconds: float, beside_seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """What is stored of a kernel; seconds: of a call. bound: which ceiling the shape would reach first."""
    memory, arithmetic = work.moved / ceilings.copy, work.flops / ceilings.matmul
    return {
        "microseconds": 1e6 * seconds,
        "tb_per_s": work.moved / seconds / 1e12,
        "tflop_per_s": work.flops / seconds / 1e12 if work.flops else None,
        "bound": "memory" if memory >= arithmetic else "matmul",
        "fraction": max(memory, arithmetic) / seconds,
        "fraction_of_copy": memory / seconds,
        "fraction_of_read": work.moved / ceilings.read / seconds,
        "fraction_of_matmul": arithmetic / seconds if work.flops else None,
        "copy_tb_per_s": ceilings.copy / 1e12,
        "read_tb_per_s": ceilings.read / 1e12,
        "matmul_tflop_per_s": ceilings.matmul / 1e12,
        "sustained_matmul_tflop_per_s": ceilings.sustained_matmul / 1e12,
        "held_against": work.held_against,
        "held_against_microseconds": 1e6 * beside_seconds,
        "times_as_fast": beside_seconds / seconds,
    }


def about(work: Work, implementation: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What a kernel's figures depend on."""
    return {
        KERNEL: work.kernel,
        "shape": work.shape,
        "implementation": implementation,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "triton": triton.__version__,
        "bytes": work.moved,
        "flops": work.flops,
    }


def table(infos: list[dict[str, Any]]) -> list[str]:
    """A row for each kernel and shape, below what all of them share; as lines of text."""
    first = infos[0]
    lines = [
        f"{first['implementation']} in {first['dtype']}, {first['device']}",
        f"ceilings of this run: copy {first['copy_tb_per_s']:.3g} TB/s, read {first['read_tb_per_s']:.3g} TB/s, "
        f"matmul {first['matmul_tflop_per_s']:.3g} TFLOP/s, sustained {first['sustained_matmul_tflop_per_s']:.3g}",
        f"{'kernel':<20}{'shape':<44}{'us':>7}{'reached':>17}{'of ceiling':>16}   as fast as",
    ]
    for info in infos:
        shape = " ".join(f"{name}={value}" for name, value in info["shape"].items())
        if info["bound"] == "memory":
            reached, ceiling = f"{info['tb_per_s']:.3g} TB/s", "copy"
        else:
            reached, ceiling = f"{info['tflop_per_s']:.3g} TFLOP/s", "matmul"
        line = f"{info[KERNEL]:<20}{shape:<44}{info['microseconds']:>7.1f}{reached:>17}"
        line += f"{100 * info['fraction']:>7.1f} % {ceiling:<7}"
        lines.append(line + f"{info['times_as_fast']:>6.2f} x {info['held_against']}")
    lines.append("of ceiling: of the one that the shape would reach first; copy: a plain one of as many bytes")
    return lines
