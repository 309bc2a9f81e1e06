"""Matrix products of FP8 rows with FP8 weights: half the bytes of bfloat16 to read, and twice its multiplication rate.

The matrix units multiply the values. At its end the same kernel applies the scales of rows and columns, and a gate. The
weights are the tall operand of the matrix units. If there are too few tiles to fill the GPU, the depth is split over
programs (split-K), and the next operation adds up the parts. With many rows `hopper_linear` or torch's product is
faster.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.functional import ScalingType

from blockinfer.kernels.activation import silu, silu_mul
from blockinfer.kernels.backend import (
    is_hopper,
    launch_next,
    launch_options,
    num_processors,
    prefetch,
    shared_memory,
    wait_for_last,
)
from blockinfer.kernels.hopper_linear import HopperTile, choose_fp8_tile, hopper_linear
from blockinfer.kernels.products import choose_splits, empty_product, part_of_depth
from blockinfer.kernels.quantize import QuantizedRows, QuantizedWeight, quantize_rows, runs_fp8

# up to this many rows the kernel's time is that of reading the weights, and torch's is longer
_FEW_ROWS = 64
# the factor of both operands where torch multiplies them in half precision: exact, and nothing overflows
_UNIT = 2.0**-9


def fp8_linear(x: torch.Tensor | QuantizedRows, weight: QuantizedWeight) -> torch.Tensor:
    """x [T, K], weight [N, K] -> x @ weight.T, [T, N] in x's dtype; x is quantised first if it is not yet."""
    return _product(_quantized(x), weight, may_split=False)


def fp8_linear_parts(x: torch.Tensor | QuantizedRows, weight: QuantizedWeight) -> torch.Tensor:
    """The same, or S parts of it that the caller sums, [S, T, N]: float32 if S > 1."""
    return _product(_quantized(x), weight, may_split=True)


def fp8_gated_linear(x: torch.Tensor | QuantizedRows, weight: QuantizedWeight) -> torch.Tensor:
    """x [T, K], weight [2 * m, K], the gate's rows first -> silu(x @ gate.T) * (x @ up.T), [T, m] in x's dtype."""
    rows = _quantized(x)
    if _multiplied_as_fp8(rows):
        if (tile := _hopper_tile(rows, weight, gated=True)) is not None:
            return hopper_linear(rows, weight, tile, gated=True)
        if not _is_torch_faster(rows, weight):
            return fp8_linear_triton(rows, weight, choose_tile(rows, weight, gated=True), gated=True)[0]
    return silu_mul(_product(rows, weight, may_split=False))


def _product(x: QuantizedRows, weight: QuantizedWeight, may_split: bool) -> torch.Tensor:
    if not _multiplied_as_fp8(x):
        return fp8_linear_torch(x, weight)
    if (tile := _hopper_tile(x, weight)) is not None:
        return hopper_linear(x, weight, tile)
    tile = choose_tile(x, weight)
    if may_split and tile.splits > 1:
        return fp8_linear_triton(x, weight, tile)
    if _is_torch_faster(x, weight):
        return _scaled_mm(x, weight)
    return fp8_linear_triton(x, weight, tile._replace(splits=1))[0]


def _quantized(x: torch.Tensor | QuantizedRows) -> QuantizedRows:
    return x if isinstance(x, QuantizedRows) else quantize_rows(x)


def _multiplied_as_fp8(x: QuantizedRows) -> bool:
    return x.dtype != torch.float64 and runs_fp8(x.scale)


def fp8_linear_torch(x: QuantizedRows, weight: QuantizedWeight) -> torch.Tensor:
    """The twin: the same values and scales, widened to x.dtype for as long as torch's product takes."""
    wide = torch.promote_types(x.dtype, torch.float32)
    product = F.linear(x.values.to(x.dtype).mul_(_UNIT), weight.values.to(x.dtype).mul_(_UNIT)).to(wide)
    return (product * (x.scale.to(wide) / _UNIT)[:, None] * (weight.scale.to(wide) / _UNIT).mT).to(x.dtype)


def _hopper_tile(x: QuantizedRows, weight: QuantizedWeight, gated: bool = False) -> HopperTile | None:
    return choose_fp8_tile(x, weight, gated) if x.values.shape[0] > _FEW_ROWS else None


def _is_torch_faster(x: QuantizedRows, weight: QuantizedWeight) -> bool:
    """Over _FEW_ROWS rows, and torch can scale rows and columns itself: Hopper, bfloat16, N and K multiples of 16."""
    return (
        x.values.shape[0] > _FEW_ROWS
        and x.dtype == torch.bfloat16
        and is_hopper(x.values.device)
        and not any(size % 16 for size in weight.shape)
    )


def _scaled_mm(x: QuantizedRows, weight: QuantizedWeight) -> torch.Tensor:
    """`fp8_linear` by torch -> [T, N], bfloat16."""
    by_rows = ScalingType.RowWise
    return F.scaled_mm(
        x.values,
        weight.values.mT,
        x.scale[:, None],
        by_rows,
        weight.scale.mT,
        by_rows,
        output_dtype=x.dtype,
        use_fast_accum=True,
    )


class Tile(NamedTuple):
    """Rows, columns and depth of a program's tile, powers of two, at least 16; parts of the depth. ahead: lines of 128
    bytes of each of its weights' rows, a power of two, that are prefetched while the kernel before still runs."""

    block_t: int
    block_n: int
    block_k: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4
    ahead: int = 0


def choose_tile(x: QuantizedRows, weight: QuantizedWeight, gated: bool = False) -> Tile:
    """The fastest of those measured on an H200, for shapes at which torch is not faster."""
    rows, (columns, depth) = x.values.shape[0], weight.shape
    processors = num_processors(x.values.device)
    if shared_memory(x.values.device) < 160 * 1024:
        return Tile(64, 64, 64)
    if rows > _FEW_ROWS:
        if gated:
            return Tile(128, 128, 128, num_warps=8, num_stages=3)
        tiles = triton.cdiv(rows, 128) * triton.cdiv(columns, 128)
        return Tile(128, 128, 128, choose_splits(tiles, depth, processors), num_warps=8)
    block_t = max(16, triton.next_power_of_2(rows))
    ahead = 4 if rows <= 32 else 0
    if gated:
        return Tile(block_t, 64, 128, num_stages=6 if rows <= 32 else 4, ahead=ahead)
    splits = choose_splits(triton.cdiv(columns, 64), depth, processors)
    return Tile(block_t, 64, 128 if splits == 1 else 256, splits, num_stages=5, ahead=ahead)


def fp8_linear_triton(x: QuantizedRows, weight: QuantizedWeight, tile: Tile, gated: bool = False) -> torch.Tensor:
    """The kernel of all three -> [S, T, N], S = tile.splits: in x.dtype where S is 1, and float32 parts else.

    Raises ValueError where shapes or strides do not fit, and for a gate that is split.
    """
    values, weights = x.values, weight.values
    out = empty_product(values, weights, x.dtype, tile.splits, gated)
    if not all(tensor.is_contiguous() for tensor in (values, weights, x.scale, weight.scale)):
        raise ValueError("x and weight must be contiguous")
    rows, depth = values.shape
    columns = out.shape[2]
    block_k = min(tile.block_k, max(32, triton.next_power_of_2(depth)))
    whole = depth % block_k == 0 and columns % tile.block_n == 0
    options = launch_options(values.device)
    _fp8_linear_kernel[(triton.cdiv(rows, tile.block_t) * triton.cdiv(columns, tile.block_n), tile.splits)](
        values,
        x.scale,
        weights,
        weight.scale,
        out,
        rows,
        columns,
        depth,
        part_of_depth(depth, block_k, tile.splits),
        GATED=gated,
        WHOLE=whole,
        BLOCK_T=tile.block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        AHEAD=tile.ahead if whole and options["PDL"] else 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **options,
    )
    return out


@triton.jit
def _fp8_linear_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
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
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid (tiles of rows x tiles of columns, splits): tiles of the same columns follow each other, and share weights
    row_tiles = tl.cdiv(rows, BLOCK_T)
    row = tl.program_id(0) % row_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(0) // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    row_inside = row < rows
    column_inside = column < columns
    weights = weight_ptr + column.to(tl.int64)[:, None] * depth + k[None, :]  # [BLOCK_N, BLOCK_K]
    up_weights = weights + tl.cast(columns, tl.int64) * depth  # columns == 1 is a constant, without .to
    xs = x_ptr + row.to(tl.int64)[:, None] * depth + k[None, :]  # [BLOCK_T, BLOCK_K]

    first = split * part  # part: the depth of a split, a multiple of BLOCK_K
    if AHEAD:
        line = tl.arange(0, AHEAD) * 128
        lines = weight_ptr + column.to(tl.int64)[:, None] * depth + first + line[None, :]
        prefetch(lines)
        if GATED:
            prefetch(lines + tl.cast(columns, tl.int64) * depth)
    else:
        launch_next(PDL)
    wait_for_last(PDL)
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
        acc = tl.dot(w, x, acc)
        if GATED:
            if WHOLE:
                w = tl.load(up_weights + start)
            else:
                w = tl.load(up_weights + start, mask=column_inside[:, None] & inside[None, :], other=0.0)
            up_acc = tl.dot(w, x, up_acc)
    if AHEAD:
        # not earlier: the next kernel's prefetches would delay this kernel's own loads
        launch_next(PDL)
    x_scale = tl.load(x_scale_ptr + row, mask=row_inside, other=0.0)[None, :]
    acc = acc * x_scale * tl.load(weight_scale_ptr + column, mask=column_inside, other=0.0)[:, None]
    if GATED:
        up_scale = tl.load(weight_scale_ptr + columns + column, mask=column_inside, other=0.0)
        acc = silu(acc) * (up_acc * x_scale * up_scale[:, None])
    where = (tl.cast(split, tl.int64) * rows + row)[None, :] * columns + column[:, None]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=row_inside[None, :] & column_inside[:, None])
