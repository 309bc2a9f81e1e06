"""SwiGLU's elementwise half (arXiv 2002.05202): silu(gate) * up."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from blockinfer.kernels.backend import begin, launch_options, runs_triton


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 * m], the gate first -> [T, m], in its dtype: float64 (the PyTorch twin's), float32 or narrower."""
    return silu_mul_triton(gate_up) if runs_triton(gate_up) else silu_mul_torch(gate_up)


def silu_mul_torch(gate_up: torch.Tensor) -> torch.Tensor:
    """The twin."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def silu_mul_triton(gate_up: torch.Tensor, block: int = 1024) -> torch.Tensor:
    """The kernel, in tiles of `block` columns. Raises ValueError where gate_up is not a contiguous [T, 2 * m]."""
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(f"gate_up must be a contiguous [T, 2 * m], got {tuple(gate_up.shape)}")
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, columns), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul_kernel[(rows, triton.cdiv(columns, block))](
        gate_up, out, columns, BLOCK=block, **launch_options(gate_up.device)
    )
    return out


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, columns, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)  # grid (T, tiles of columns)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(gate_up_ptr + row * 2 * columns + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * columns + columns + column, mask=inside, other=0.0).to(tl.float32)
    out = silu(gate) * up
    tl.store(out_ptr + row * columns + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def silu(x):
    # of two equal forms of the sigmoid, the one whose exponential cannot overflow
    small = tl.exp(-tl.abs(x))
    return x * tl.where(x >= 0, 1.0, small) / (1.0 + small)
