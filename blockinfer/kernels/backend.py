"""Which implementation of an operation runs: its Triton kernel or its PyTorch twin."""

from functools import cache

import torch


def runs_triton(x: torch.Tensor) -> bool:
    """Whether an operation on x is a Triton kernel: on a GPU, but for float64, which the twins alone compute."""
    return x.is_cuda and x.dtype != torch.float64


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the CPU, on which the interpreter runs a kernel's programs in turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
