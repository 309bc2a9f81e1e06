"""Which implementation of an operation runs: its Triton kernel or its PyTorch twin."""

from functools import cache

import torch
import triton
import triton.language as tl


def runs_triton(x: torch.Tensor) -> bool:
    """Whether operations on x run as Triton kernels: on a GPU, except in float64, which only the twins compute."""
    return x.is_cuda and x.dtype != torch.float64


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the CPU, on which the interpreter runs a kernel's programs in turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of one multiprocessor, shared by the programs that run there; 2**31 on the CPU."""
    if device.type != "cuda":
        return 2**31
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


@cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """That of an NVIDIA GPU; (0, 0) of other devices."""
    if device.type != "cuda" or torch.version.hip:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def is_hopper(device: torch.device) -> bool:
    return compute_capability(device)[0] == 9


_loaded = 0


def _count_loaded(*args: object, **options: object) -> None:
    global _loaded
    _loaded += 1


# a chain, to which other code may add hooks
triton.knobs.runtime.kernel_load_end_hook.add(_count_loaded)


def num_compiled_kernels() -> int:
    """Variants of Triton kernels that this process has compiled, or found compiled on disk: each is loaded once."""
    return _loaded


def launch_options(device: torch.device) -> dict[str, bool]:
    """Launch options for a kernel that starts with `begin`. On GPUs of compute capability 9 or more it is launched
    while the kernel before it still runs, and waits itself for that kernel to end (programmatic dependent launch)."""
    return {"PDL": True, "launch_pdl": True} if compute_capability(device) >= (9, 0) else {"PDL": False}


@triton.jit
def begin(PDL: tl.constexpr):
    """Lets the next kernel be launched, and waits until the one before has ended and its writes are seen.

    Every program calls it before it reads or writes memory, so that kernels still act one after the other. One without
    work need not: also through a kernel that ended early, the next one waits for all before (seen on an H200).
    """
    launch_next(PDL)
    wait_for_last(PDL)


@triton.jit
def launch_next(PDL: tl.constexpr):
    """The first half of `begin`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last(PDL: tl.constexpr):
    """The second half of `begin`: data that kernels write may only be touched after it; weights may be read before."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(pointers):
    """Prefetches from these addresses into the L2 cache of an NVIDIA GPU, without waiting."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
