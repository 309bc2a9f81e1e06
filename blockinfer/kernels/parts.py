"""The sum of a product's parts from `kernels.linear.linear_parts`, for an all-reduce over the ranks."""

import torch
import triton
import triton.language as tl

from blockinfer.kernels.backend import begin, launch_options, runs_triton


def sum_parts(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [T, d], or parts [S, T, d], of `dtype` or wider -> [T, d] in `dtype`: x itself if it is the result already. The
    sum is computed in at least float32."""
    if x.ndim == 2 and x.dtype == dtype:
        return x
    out = torch.empty(x.shape[-2:], dtype=dtype, device=x.device)
    return sum_parts_triton(x, out) if runs_triton(x) else sum_parts_torch(x, out)


def sum_parts_torch(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The twin."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return out.copy_(wide if x.ndim == 2 else wide.sum(0))


def sum_parts_triton(x: torch.Tensor, out: torch.Tensor, block: int = 1024) -> torch.Tensor:
    """The kernel, in tiles of `block` numbers. Raises ValueError where shapes differ or a tensor is not contiguous."""
    if x.shape[-2:] != out.shape or x.ndim > 3 or not (x.is_contiguous() and out.is_contiguous()):
        raise ValueError(
            f"x must be a contiguous [T, d] or [S, T, d] and out [T, d], got {tuple(x.shape)} and {tuple(out.shape)}"
        )
    parts, number = (1 if x.ndim == 2 else x.shape[0]), out.numel()
    _sum_parts_kernel[(triton.cdiv(number, block),)](
        x, out, number, PARTS=parts, BLOCK=block, **launch_options(x.device)
    )
    return out


@triton.jit
def _sum_parts_kernel(x_ptr, out_ptr, number, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # grid (tiles,)
    inside = where < number
    total = add_parts(tl.zeros([BLOCK], tl.float32), x_ptr, where, tl.cast(number, tl.int64), inside, PARTS)
    tl.store(out_ptr + where, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_parts(total, x_ptr, where, plane, inside, PARTS: tl.constexpr):
    """total plus what is at `where` in each part of x, float32; a part begins `plane` numbers after the one before."""
    for part in tl.static_range(PARTS):
        total += tl.load(x_ptr + part * plane + where, mask=inside, other=0.0).to(tl.float32)
    return total
