"""Which implementation of an operation runs: its Triton kernel or its PyTorch twin."""

from functools import cache

import torch
import triton
import triton.language as tl


def runs_triton(x: torch.Tensor) -> bool:
    """Whether an operation on x is a Triton kernel: on a GPU, but for float64, which the twins alone compute."""
    return x.is_cuda and x.dtype != torch.float64


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the CPU, on which the interpreter runs a kernel's programs in turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it on one of a GPU's processors, which the programs there share; of the CPU as many as are asked for."""
    if device.type != "cuda":
        return 2**31
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


_loaded = 0


def _count_loaded(*args: object, **options: object) -> None:
    global _loaded
    _loaded += 1


# a chain, to which others may add theirs
triton.knobs.runtime.kernel_load_end_hook.add(_count_loaded)


def num_compiled_kernels() -> int:
    """Variants of Triton kernels that this process has compiled, or found compiled on disk: each is loaded once."""
    return _loaded


def launch_options(device: torch.device) -> dict[str, bool]:
    """Of a kernel that begins with `begin`: on GPUs that can (compute capability 9), it is launched while the kernel
    before it still runs, and waits for that one's end itself (programmatic dependent launch)."""
    return {"PDL": True, "launch_pdl": True} if _launches_early(device) else {"PDL": False}


@cache
def _launches_early(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def begin(PDL: tl.constexpr):
    """Lets the next kernel be launched, and waits until the one before has ended and its writes are seen.

    Every program calls it before it reads or writes memory, so that kernels still act one after the other.
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
    """The second half: what a kernel writes, as no kernel does weights, may only be touched after it."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(pointers):
    """Asks for what is there, on an NVIDIA GPU, to be brought into its L2 cache, and does not wait for it."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
