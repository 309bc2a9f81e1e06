"""Products of many rows on Hopper GPUs: gate and up with SwiGLU's SiLU in one kernel, and any product in FP8.

Persistent and warp-specialised, as CUTLASS multiplies on Hopper: one warp loads tiles of rows and weights with the
tensor memory accelerator, and two or three warpgroups of 64 rows multiply them. Gate and up are neighbours in a tile,
so each thread has both of a result. Products in half precision without a gate stay with cuBLAS, which is as fast.
Written in Gluon, Triton's lower-level language.
"""

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from blockinfer.kernels.backend import begin, is_hopper, launch_options, num_processors
from blockinfer.kernels.products import empty_product
from blockinfer.kernels.quantize import FP8, QuantizedRows, QuantizedWeight

_ROWS = gl.constexpr(64)  # of a warpgroup
_DEPTH = 128  # bytes of a stage: the widest that shared memory is swizzled by
_SHARED_MEMORY = 226 * 1024  # of the 227 KB that a program may have, without its barriers
# A gated product is faster than cuBLAS's with silu_mul from this share (`HopperTile.share`) on. Measured on an H200: at
# .97 it is, at .81 it is not.
_LEAST_SHARE = 0.9
# In FP8 torch is faster with more rows (measured on an H200 at 128, 256, 384 and 512, against split depths too).
_MOST_FP8_ROWS = 384


class HopperTile(NamedTuple):
    """A program's tile: its warpgroups, of 64 rows each, and the columns of the result."""

    groups: int
    columns: int

    def stages(self, gated: bool) -> int:
        """As many as there is shared memory for, besides the result."""
        stage = _DEPTH * (self.groups * _ROWS.value + (1 + gated) * self.columns)
        return (_SHARED_MEMORY - 2 * self.groups * _ROWS.value * self.columns) // stage

    def number(self, rows: int, columns: int) -> int:
        return triton.cdiv(rows, self.groups * _ROWS.value) * triton.cdiv(columns, self.columns)

    def share(self, rows: int, columns: int, processors: int) -> float:
        """Of what the processors could multiply until the last tile is done, the share that is of the result."""
        rounds = triton.cdiv(self.number(rows, columns), processors)
        return rows * columns / (rounds * processors * self.groups * _ROWS.value * self.columns)


_TILES = HopperTile(2, 128), HopperTile(3, 64), HopperTile(2, 64)


def choose_gated_tile(x: torch.Tensor, weight: torch.Tensor) -> HopperTile | None:
    """x [T, K], weight [2 * m, K], in half precision -> the tile for a gated product; None where cuBLAS is faster, or
    this kernel cannot run."""
    if not len(x) or x.dtype.itemsize != 2 or not is_hopper(x.device) or not _fits(x, weight, gated=True):
        return None
    size = len(x), len(weight) // 2, num_processors(x.device)
    tile = max(_TILES, key=lambda tile: tile.share(*size))
    return tile if tile.share(*size) >= _LEAST_SHARE else None


def choose_fp8_tile(x: QuantizedRows, weight: QuantizedWeight, gated: bool = False) -> HopperTile | None:
    """The same for FP8, with a gate or without."""
    rows, columns = len(x.values), weight.shape[0] // (2 if gated else 1)
    if x.dtype.itemsize != 2 or not is_hopper(x.values.device) or not _fits(x.values, weight.values, gated):
        return None
    processors = num_processors(x.values.device)
    tile = max(_TILES[1:], key=lambda tile: tile.share(rows, columns, processors))
    # or no processor has more than one tile: the time is then that of one, whatever the number of tiles
    is_full = tile.share(rows, columns, processors) >= _LEAST_SHARE or tile.number(rows, columns) <= processors
    return tile if is_full and rows <= _MOST_FP8_ROWS else None


def _fits(x: torch.Tensor, weight: torch.Tensor, gated: bool) -> bool:
    """Whether all rows, also those of the result, begin at multiples of 16 bytes, as the tensor memory accelerator asks
    for."""
    columns = weight.shape[0] // (2 if gated else 1)
    if not (x.is_contiguous() and weight.is_contiguous()):
        return False
    return not (x.shape[1] * x.itemsize % 16 or columns % 8 or x.data_ptr() % 16 or weight.data_ptr() % 16)


def hopper_linear(
    x: torch.Tensor | QuantizedRows, weight: torch.Tensor | QuantizedWeight, tile: HopperTile, gated: bool = False
) -> torch.Tensor:
    """x [T, K], weight [N, K], of one half precision or both quantised -> x @ weight.T, [T, N]; gated: weight [2 * m,
    K], the gate's rows first -> silu(x @ gate.T) * (x @ up.T), [T, m]. In x's dtype, rounded once.

    Raises ValueError where a shape, a dtype or a stride does not fit; rows of x, weight and the result begin at
    multiples of 16 bytes.
    """
    x_scale = weight_scale = None
    dtype = x.dtype
    if isinstance(x, QuantizedRows) != isinstance(weight, QuantizedWeight):
        raise ValueError(f"x and weight must both be quantised or neither, got {type(x)} and {type(weight)}")
    if isinstance(x, QuantizedRows):
        x, x_scale = x.values, x.scale
        weight, weight_scale = weight.values, weight.scale
        if not (x_scale.is_contiguous() and weight_scale.is_contiguous()):
            raise ValueError("the scales of x and weight must be contiguous")
    out = empty_product(x, weight, dtype, 1, gated)[0]
    if not _fits(x, weight, gated):
        raise ValueError(
            "x and weight must be contiguous, and their rows and the result's begin at multiples of 16 bytes, got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype or dtype.itemsize != 2 or x.dtype not in (dtype, FP8):
        raise ValueError(f"x and weight must be of one half precision or FP8, got {x.dtype} and {weight.dtype}")
    (rows, columns), depth = out.shape, x.shape[1]

    def blocks(tensor: torch.Tensor, height: int, width: int) -> TensorDescriptor:
        shape, of = [height, width], gl.float8e4nv if tensor.dtype == FP8 else gl.bfloat16
        layout = gl.NVMMASharedLayout.get_default_for(shape, of)
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), shape, layout)

    width = _DEPTH // x.itemsize
    _hopper_linear_kernel[(min(tile.number(rows, columns), num_processors(x.device)),)](
        blocks(x, _ROWS.value, width),
        blocks(weight, tile.columns, width),
        blocks(out, _ROWS.value, tile.columns),
        x_scale,
        weight_scale,
        rows,
        columns,
        depth,
        GATED=gated,
        SCALED=x_scale is not None,
        GROUPS=tile.groups,
        N=tile.columns,
        STAGES=tile.stages(gated),
        num_warps=4,
        **launch_options(x.device),
    )
    return out


@gluon.jit
def _hopper_linear_kernel(
    x_blocks,
    weight_blocks,
    out_blocks,
    x_scale_ptr,
    weight_scale_ptr,
    rows,
    columns,
    depth,
    GATED: gl.constexpr,
    SCALED: gl.constexpr,
    GROUPS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    DEPTH: gl.constexpr = x_blocks.block_type.shape[1]
    WIDE: gl.constexpr = 2 * N if GATED else N
    x = gl.allocate_shared_memory(x_blocks.dtype, [STAGES * GROUPS, _ROWS, DEPTH], x_blocks.layout)
    weight = gl.allocate_shared_memory(x_blocks.dtype, [STAGES, WIDE, DEPTH], weight_blocks.layout)
    out = gl.allocate_shared_memory(out_blocks.dtype, [GROUPS, _ROWS, N], out_blocks.layout)
    # filled: by the loading warp; free again: once all warpgroups have read it
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    begin(PDL)
    # tiles of the same columns follow each other, and share weights
    row_tiles = gl.cdiv(rows, GROUPS * _ROWS)
    sizes = (row_tiles, row_tiles * gl.cdiv(columns, N), rows, columns, depth)
    loading = (x_blocks, weight_blocks, x, weight, filled, free)
    computing = (out_blocks, x_scale_ptr, weight_scale_ptr, x, weight, out, filled, free)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (computing, sizes, 0, GATED, SCALED, GROUPS, N, STAGES)),
                (_multiply, (computing, sizes, 1, GATED, SCALED, GROUPS, N, STAGES)),
                (_load, (loading, sizes, GATED, GROUPS, N, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (computing, sizes, 0, GATED, SCALED, GROUPS, N, STAGES)),
                (_multiply, (computing, sizes, 1, GATED, SCALED, GROUPS, N, STAGES)),
                (_multiply, (computing, sizes, 2, GATED, SCALED, GROUPS, N, STAGES)),
                (_load, (loading, sizes, GATED, GROUPS, N, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


@gluon.jit
def _load(given, sizes, GATED: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):
    """What the loading warp does: the tiles of the program, as far ahead of the others as there are stages."""
    x_blocks, weight_blocks, x, weight, filled, free = given
    row_tiles, tiles, _, columns, depth = sizes
    DEPTH: gl.constexpr = x_blocks.block_type.shape[1]
    NBYTES: gl.constexpr = GROUPS * x_blocks.block_type.nbytes + (2 if GATED else 1) * weight_blocks.block_type.nbytes
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = tile % row_tiles * (GROUPS * _ROWS), tile // row_tiles * N
        for k in range(0, depth, DEPTH):
            i, is_second = step % STAGES, step // STAGES % 2
            mbarrier.wait(free.index(i), is_second ^ 1)
            mbarrier.expect(filled.index(i), NBYTES)
            for group in gl.static_range(GROUPS):
                at = [row + group * _ROWS, k]
                tma.async_copy_global_to_shared(x_blocks, at, filled.index(i), x.index(i * GROUPS + group))
            if GATED:
                gate, up = weight.index(i).slice(0, N), weight.index(i).slice(N, N)
                tma.async_copy_global_to_shared(weight_blocks, [column, k], filled.index(i), gate)
                tma.async_copy_global_to_shared(weight_blocks, [columns + column, k], filled.index(i), up)
            else:
                tma.async_copy_global_to_shared(weight_blocks, [column, k], filled.index(i), weight.index(i))
            step += 1


@gluon.jit
def _multiply(
    given,
    sizes,
    GROUP: gl.constexpr,
    GATED: gl.constexpr,
    SCALED: gl.constexpr,
    GROUPS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What a warpgroup does: its 64 rows of the tiles of the program."""
    out_blocks, x_scale_ptr, weight_scale_ptr, x, weight, out, filled, free = given
    row_tiles, tiles, rows, columns, depth = sizes
    DEPTH: gl.constexpr = x.shape[2]
    WIDE: gl.constexpr = 2 * N if GATED else N
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 32 if SCALED else 16])
    acc = gl.zeros([_ROWS, WIDE], gl.float32, ACC)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first, column = tile % row_tiles * (GROUPS * _ROWS) + GROUP * _ROWS, tile // row_tiles * N
        use_acc = False
        for k in range(0, depth, DEPTH):
            i, phase = step % STAGES, step // STAGES % 2
            mbarrier.wait(filled.index(i), phase)
            mine = x.index(i * GROUPS + GROUP)
            acc = warpgroup_mma(mine, weight.index(i).permute((1, 0)), acc, use_acc=use_acc, is_async=True)
            use_acc = True
            # the product before this one has ended
            acc = warpgroup_mma_wait(1, deps=[acc])
            if k > 0:
                mbarrier.arrive(free.index((step - 1) % STAGES))
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index((step - 1) % STAGES))
        made = acc
        if SCALED:
            row = first + gl.arange(0, _ROWS, gl.SliceLayout(1, ACC))
            at = gl.arange(0, WIDE, gl.SliceLayout(0, ACC))
            inside = column + at % N < columns
            # those of up follow those of the gate
            of_column = weight_scale_ptr + column + at % N + at // N * columns
            made *= gl.expand_dims(gl.load(x_scale_ptr + row, mask=row < rows, other=0.0), 1)
            made *= gl.expand_dims(gl.load(of_column, mask=inside, other=0.0), 0)
        if GATED:
            gate, up = made.reshape([_ROWS, 2, N]).permute(0, 2, 1).split()
            # of two equal forms of the sigmoid, the one whose exponential cannot overflow
            small = gl.exp(-gl.abs(gate))
            made = gate * gl.where(gate >= 0, 1.0, small) / (1.0 + small) * up
        # the copy out of the buffer has ended
        tma.store_wait(0)
        out.index(GROUP).store(made.to(out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_blocks, [first, column], out.index(GROUP))
    tma.store_wait(0)
