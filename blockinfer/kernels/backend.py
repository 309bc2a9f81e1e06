"""Which implementation of an operation runs: its Triton kernel or its PyTorch twin."""

import torch


def runs_triton(x: torch.Tensor) -> bool:
    """Whether an operation on x is a Triton kernel: on a GPU, but for float64, which the twins alone compute."""
    return x.is_cuda and x.dtype != torch.float64
