"""Residual addition and RMSNorm (arXiv 1910.07467), as LLaDA computes it: in float32, cast back, then the weight."""

import torch
import triton
import triton.language as tl

from blockinfer.kernels.backend import begin, launch_options, runs_triton


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [T, d], weight [d] -> (rms_norm(x + residual), x + residual); residual is overwritten with the sum.

    x may also be parts [S, T, d], of residual's dtype or wider, whose sum is meant: kernels.linear.linear_parts leaves
    them. The mean square is taken in float32 (float64 for float64).
    """
    implementation = add_rms_norm_triton if runs_triton(residual) else add_rms_norm_torch
    return implementation(x, residual, weight, eps), residual


def add_rms_norm_torch(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The twin, of what is normed."""
    residual.add_(x if x.ndim == 2 else x.sum(0))
    wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(residual.dtype) * weight


def add_rms_norm_triton(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The kernel: a row, which a program holds whole.

    Raises ValueError where a shape differs or a tensor is not contiguous.
    """
    if residual.ndim != 2 or weight.shape != residual.shape[1:] or x.shape[-2:] != residual.shape or x.ndim > 3:
        raise ValueError(
            f"x must be [T, d] or [S, T, d], residual [T, d] and weight [d], got {tuple(x.shape)}, "
            f"{tuple(residual.shape)} and {tuple(weight.shape)}"
        )
    if not (x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous()):
        raise ValueError("x, residual and weight must be contiguous")
    rows, columns = residual.shape
    out = torch.empty((rows, columns), dtype=residual.dtype, device=residual.device)
    block = triton.next_power_of_2(columns)
    _add_rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        out,
        columns,
        eps,
        PARTS=1 if x.ndim == 2 else x.shape[0],
        BLOCK=block,
        num_warps=min(8, max(1, block // 256)),
        **launch_options(residual.device),
    )
    return out


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    columns,
    eps,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)  # grid (T,)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    where = row * columns + column
    plane = tl.num_programs(0).to(tl.int64) * columns
    total = tl.load(residual_ptr + where, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(x_ptr + part * plane + where, mask=inside, other=0.0).to(tl.float32)
    # what is normed is what is stored: the rounded sum
    x = total.to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + where, x, mask=inside)
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / columns + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    out = normed.to(out_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=inside)
