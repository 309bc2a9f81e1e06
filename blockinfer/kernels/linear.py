"""Matrix products of a few rows, which are bound by reading the weights once.

With the rows of one request's block cuBLAS leaves memory bandwidth unused, and its split products need another launch
to be summed. Here the weights are the tall operand of the matrix units and the rows the narrow one. If there are too
few columns to fill the GPU, the depth is split over programs (split-K), and the next operation adds up the parts. More
rows than SKINNY_ROWS go to cuBLAS.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from blockinfer.kernels.activation import silu, silu_mul
from blockinfer.kernels.backend import begin, launch_options, num_processors, runs_triton, shared_memory
from blockinfer.kernels.fp8_linear import fp8_gated_linear, fp8_linear, fp8_linear_parts
from blockinfer.kernels.hopper_linear import choose_gated_tile, hopper_linear
from blockinfer.kernels.products import choose_splits, empty_product, part_of_depth
from blockinfer.kernels.quantize import QuantizedRows, QuantizedWeight

SKINNY_ROWS = 64
# the shared memory of the largest tile below, with its launch, at this many rows
_SHARED_MEMORY = 160 * 1024

# the model's weights and activations: a quantised weight is multiplied with quantised rows, quantised now or before
Weight = torch.Tensor | QuantizedWeight
Rows = torch.Tensor | QuantizedRows


def linear(x: Rows, weight: Weight) -> torch.Tensor:
    """x [T, K], weight [N, K], of one dtype or the weight quantised -> x @ weight.T, [T, N]."""
    if isinstance(weight, QuantizedWeight):
        return fp8_linear(x, weight)
    if _is_skinny(x):
        return skinny_linear_triton(x, weight, choose_tiling(x, weight)._replace(splits=1))[0]
    return F.linear(x, weight)


def linear_parts(x: Rows, weight: Weight, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], weight [N, K] -> x @ weight.T as [T, N], or S parts of it that the caller sums, [S, T, N]: float32 if
    S > 1. out [T, N] in x's dtype: written only if the product is one of torch's that can write there."""
    if isinstance(weight, QuantizedWeight):
        return fp8_linear_parts(x, weight)
    if _is_skinny(x):
        return skinny_linear_triton(x, weight, choose_tiling(x, weight))
    return F.linear(x, weight) if out is None else torch.mm(x, weight.T, out=out)


def gated_linear(x: Rows, weight: Weight) -> torch.Tensor:
    """x [T, K], weight [2 * m, K], the gate's rows first -> silu(x @ gate.T) * (x @ up.T), [T, m]: arXiv 2002.05202."""
    if isinstance(weight, QuantizedWeight):
        return fp8_gated_linear(x, weight)
    if _is_skinny(x):
        return skinny_linear_triton(x, weight, choose_tiling(x, weight, gated=True), gated=True)[0]
    tile = choose_gated_tile(x, weight)
    return silu_mul(F.linear(x, weight)) if tile is None else hopper_linear(x, weight, tile, gated=True)


def wide_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K], weight [N, K] of few columns -> x @ weight.T, unrounded in at least float32, as [T, N] or as parts
    [S, T, N] that the caller sums."""
    if _is_skinny(x):
        splits = min(num_processors(x.device) // triton.cdiv(weight.shape[0], 64), x.shape[1] // 128)
        return skinny_linear_triton(x, weight, Tiling(64, 128, max(2, splits)))
    if runs_triton(x) and x.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide))


def _is_skinny(x: torch.Tensor) -> bool:
    """float32 stays with cuBLAS: its products there are as exact as the tests ask for, and no faster here."""
    return (
        runs_triton(x)
        and x.dtype != torch.float32
        and 0 < x.shape[0] <= SKINNY_ROWS
        and shared_memory(x.device) >= _SHARED_MEMORY
    )


class Tiling(NamedTuple):
    """Columns and depth of a program's tile, powers of two, at least 16; parts of the depth."""

    block_n: int
    block_k: int
    splits: int
    num_warps: int = 4
    num_stages: int = 5


def choose_tiling(x: torch.Tensor, weight: torch.Tensor, gated: bool = False) -> Tiling:
    """At least a program for each processor, all of them reading (measured on an H100, at 32 rows). Each program also
    reads all of x, so at more than 32 rows fewer and wider tiles are faster (measured on an H200, at 64 rows)."""
    columns, processors = weight.shape[0] // (2 if gated else 1), num_processors(x.device)
    if columns > 2**15 and not gated:
        return Tiling(128, 128, 1, num_warps=8, num_stages=3)
    if x.shape[0] > 32 and 3 * triton.cdiv(columns, 128) >= 2 * processors:
        return Tiling(128, 64, 1, num_stages=4 if gated else 5)
    if gated:
        return Tiling(64, 128, 1, num_stages=4)
    return Tiling(64, 128, choose_splits(triton.cdiv(columns, 64), x.shape[1], processors))


def skinny_linear_triton(x: torch.Tensor, weight: torch.Tensor, tiling: Tiling, gated: bool = False) -> torch.Tensor:
    """The kernel of all three -> [S, T, N], S = tiling.splits: in x's dtype where S is 1, and float32 parts else.

    Raises ValueError where shapes, dtypes or strides do not fit, and for a gate that is split.
    """
    out = empty_product(x, weight, x.dtype, tiling.splits, gated)
    if x.dtype != weight.dtype:
        raise ValueError(f"x and weight must be of one dtype, got {x.dtype} and {weight.dtype}")
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError("x and weight must be contiguous")
    rows, depth = x.shape
    columns = out.shape[2]
    block_k = min(tiling.block_k, max(16, triton.next_power_of_2(depth)))
    _skinny_linear_kernel[(triton.cdiv(columns, tiling.block_n), tiling.splits)](
        x,
        weight,
        out,
        rows,
        columns,
        depth,
        part_of_depth(depth, block_k, tiling.splits),
        GATED=gated,
        WHOLE=depth % block_k == 0 and columns % tiling.block_n == 0,
        BLOCK_T=max(16, triton.next_power_of_2(rows)),
        BLOCK_N=tiling.block_n,
        BLOCK_K=block_k,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **launch_options(x.device),
    )
    return out


@triton.jit
def _skinny_linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    columns,
    depth,
    part,
    GATED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid (tiles of columns, splits); part: the depth of a split, a multiple of BLOCK_K
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    row = tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    row_inside = row < rows
    column_inside = column < columns
    weights = weight_ptr + column.to(tl.int64)[:, None] * depth + k[None, :]  # [BLOCK_N, BLOCK_K]
    up_weights = weights + tl.cast(columns, tl.int64) * depth  # columns == 1 is a constant, without .to
    xs = x_ptr + row[:, None] * depth + k[None, :]  # [BLOCK_T, BLOCK_K]

    first = split * part
    begin(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in tl.range(first, tl.minimum(first + part, depth), BLOCK_K):
        if WHOLE:
            w = tl.load(weights + start)
            x = tl.load(xs + start, mask=row_inside[:, None], other=0.0)
        else:
            inside = start + k < depth
            w = tl.load(weights + start, mask=column_inside[:, None] & inside[None, :], other=0.0)
            x = tl.load(xs + start, mask=row_inside[:, None] & inside[None, :], other=0.0)
        x = tl.trans(x)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if GATED:
            if WHOLE:
                w = tl.load(up_weights + start)
            else:
                w = tl.load(up_weights + start, mask=column_inside[:, None] & inside[None, :], other=0.0)
            up_acc = tl.dot(w, x, up_acc, input_precision="ieee")
    if GATED:
        acc = silu(acc) * up_acc
    where = (split * rows + row).to(tl.int64)[None, :] * columns + column[:, None]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=row_inside[None, :] & column_inside[:, None])
