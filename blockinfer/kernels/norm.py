"""Residual addition and RMSNorm (arXiv 1910.07467), as LLaDA computes it: in float32, cast back, then the weight."""

import torch
import triton
import triton.language as tl

from blockinfer.kernels.backend import begin, launch_options, runs_triton
from blockinfer.kernels.parts import add_parts
from blockinfer.kernels.quantize import FP8, QuantizedRows, quantize_rows, runs_fp8, store_quantized


def add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float, quantized: bool = False
) -> tuple[torch.Tensor | QuantizedRows, torch.Tensor]:
    """x, residual [T, d], weight [d] -> (rms_norm(x + residual), x + residual); residual is overwritten with the sum.
    If asked for, the norm's output is quantised by rows.

    x may also be parts [S, T, d], of residual's dtype or wider, from `kernels.linear.linear_parts`; they are summed
    here. None stands for 0. The mean square is computed in float32 (float64 for float64).
    """
    if not runs_triton(residual):
        normed = add_rms_norm_torch(x, residual, weight, eps)
    elif quantized and runs_fp8(residual):
        return add_rms_norm_triton(x, residual, weight, eps, quantized=True), residual
    else:
        normed = add_rms_norm_triton(x, residual, weight, eps)
    return quantize_rows(normed) if quantized else normed, residual


def add_rms_norm_torch(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The twin, of what is normed."""
    if x is not None:
        residual.add_(x if x.ndim == 2 else x.sum(0))
    wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(residual.dtype) * weight


def add_rms_norm_triton(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float, quantized: bool = False
) -> torch.Tensor | QuantizedRows:
    """The kernel: a row, which a program holds whole.

    Raises ValueError where a shape differs or a tensor is not contiguous.
    """
    parts = 0 if x is None else 1 if x.ndim == 2 else x.shape[0]
    x = residual if x is None else x
    check_normed(x, residual, weight)
    rows, columns = residual.shape
    out = torch.empty((rows, columns), dtype=FP8 if quantized else residual.dtype, device=residual.device)
    scale = torch.empty((rows,), dtype=torch.float32, device=residual.device) if quantized else out
    block = triton.next_power_of_2(columns)
    _add_rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        out,
        scale,
        columns,
        eps,
        PARTS=parts,
        QUANTIZED=quantized,
        BLOCK=block,
        num_warps=min(8, max(1, block // 256)),
        **launch_options(residual.device),
    )
    return QuantizedRows(out, scale, residual.dtype) if quantized else out


def check_normed(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises ValueError unless x is [T, d] or [S, T, d], residual [T, d] and weight [d], all contiguous, as the kernels
    expect."""
    if residual.ndim != 2 or weight.shape != residual.shape[1:] or x.shape[-2:] != residual.shape or x.ndim > 3:
        raise ValueError(
            f"x must be [T, d] or [S, T, d], residual [T, d] and weight [d], got {tuple(x.shape)}, "
            f"{tuple(residual.shape)} and {tuple(weight.shape)}"
        )
    if not (x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous()):
        raise ValueError("x, residual and weight must be contiguous")


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    columns,
    eps,
    PARTS: tl.constexpr,
    QUANTIZED: tl.constexpr,
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
    total = add_parts(total, x_ptr, where, plane, inside, PARTS)
    # normalise the stored value: the rounded sum
    x = total.to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + where, x, mask=inside)
    normed = rms_normed(x, columns, eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    out = (normed * weight).to(x.dtype)
    if QUANTIZED:
        store_quantized(out.to(tl.float32), inside, out_ptr + where, scale_ptr + row)
    else:
        tl.store(out_ptr + where, out, mask=inside)


@triton.jit
def rms_normed(x, columns, eps):
    """x: a whole row, 0 past its columns -> what is multiplied by the weight, float32, rounded to x's dtype."""
    wide = x.to(tl.float32)
    return (wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / columns + eps)).to(x.dtype).to(tl.float32)
