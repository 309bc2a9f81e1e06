"""Residual addition and RMSNorm (arXiv 1910.07467), as LLaDA computes it: in float32, cast back, then the weight."""

import torch
import triton
import triton.language as tl

from blockinfer.kernels.backend import runs_triton


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, d], weight [d] -> [T, d] in x's dtype. The mean square is taken in float32 (float64 for float64)."""
    return rms_norm_triton(x, weight, eps) if runs_triton(x) else rms_norm_torch(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [T, d] -> (rms_norm(x + residual), x + residual). residual is overwritten with the sum."""
    if runs_triton(x):
        return rms_norm_triton(x, weight, eps, residual), residual
    residual.add_(x)
    return rms_norm_torch(residual, weight, eps), residual


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The twin of `rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The kernel of both: a row, which a program holds whole. The sum with a residual [T, d] replaces the residual.

    Raises ValueError where a shape differs or a tensor is not contiguous.
    """
    added = x if residual is None else residual
    if x.ndim != 2 or weight.shape != x.shape[1:] or added.shape != x.shape:
        raise ValueError(
            f"x and residual must be [T, d] and weight [d], got {tuple(x.shape)}, {tuple(added.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if not (x.is_contiguous() and added.is_contiguous() and weight.is_contiguous()):
        raise ValueError("x, residual and weight must be contiguous")
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(columns)
    _rms_norm_kernel[(rows,)](
        x,
        added,
        weight,
        out,
        columns,
        eps,
        ADD=residual is not None,
        BLOCK=block,
        num_warps=min(8, max(1, block // 256)),
    )
    return out


@triton.jit
def _rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, columns, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # grid (T,)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    where = row * columns + column
    x = tl.load(x_ptr + where, mask=inside, other=0.0)
    if ADD:
        total = x.to(tl.float32) + tl.load(residual_ptr + where, mask=inside, other=0.0).to(tl.float32)
        # what is normed is what is stored: the rounded sum
        x = total.to(x.dtype)
        tl.store(residual_ptr + where, x, mask=inside)
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / columns + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    out = normed.to(out_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=inside)
