"""SwiGLU's elementwise half (arXiv 2002.05202): silu(gate) * up."""

import torch
import torch.nn.functional as F


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 * m], the gate first -> [T, m]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
