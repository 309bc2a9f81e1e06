"""The product of many rows with gate and up, and SwiGLU's SiLU, in one kernel on Hopper GPUs.

Persistent and warp-specialised, as CUTLASS multiplies on Hopper: one warp loads tiles of rows and weights with the
tensor memory accelerator, and two or three warpgroups of 64 rows multiply them. Gate and up are neighbours in a tile,
so each thread has both of a result. Products without a gate stay with cuBLAS, which is as fast. Written in Gluon,
Triton's lower-level language.
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

_ROWS = gl.constexpr(64)  # of a warpgroup
_DEPTH = gl.constexpr(64)  # of a stage: 128 bytes, the widest that shared memory is swizzled by
_SHARED_MEMORY = 226 * 1024  # of the 227 KB that a program may have, without its barriers
# of the multiplications that the GPU could make meanwhile, the share from which on this kernel is the faster one
# (measured on an H200: it wins at .91 and above, and loses at .81)
_LEAST_SHARE = 0.9


class GatedTile(NamedTuple):
    """A program's tile: its warpgroups, of 64 rows each, and the columns of the result."""

    groups: int
    columns: int

    def stages(self) -> int:
        """As many as there is shared memory for, besides the result."""
        stage = 2 * _DEPTH.value * (self.groups * _ROWS.value + 2 * self.columns)
        return (_SHARED_MEMORY - 2 * self.groups * _ROWS.value * self.columns) // stage


_TILES = GatedTile(2, 128), GatedTile(3, 64), GatedTile(2, 64)


def choose_gated_tile(x: torch.Tensor, weight: torch.Tensor) -> GatedTile | None:
    """x [T, K], weight [2 * m, K] -> the tile with which the GPU's processors together multiply the least beside the
    result; None where that is too much, or the kernel cannot run."""
    if not (is_hopper(x.device) and x.dtype.itemsize == 2 and _fits(x, weight)):
        return None
    rows, columns, processors = len(x), len(weight) // 2, num_processors(x.device)

    def multiplied(tile: GatedTile) -> int:
        tiles = triton.cdiv(rows, tile.groups * _ROWS.value) * triton.cdiv(columns, tile.columns)
        return triton.cdiv(tiles, processors) * processors * tile.groups * _ROWS.value * tile.columns

    tile = min(_TILES, key=multiplied)
    return tile if rows * columns >= _LEAST_SHARE * multiplied(tile) else None


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, as the tensor memory accelerator asks for."""
    return x.is_contiguous() and weight.is_contiguous() and not (x.shape[1] % 8 or weight.shape[0] % 16)


def gated_linear_gluon(x: torch.Tensor, weight: torch.Tensor, tile: GatedTile) -> torch.Tensor:
    """x [T, K], weight [2 * m, K], the gate's rows first, of one half precision, K and m multiples of 8 ->
    silu(x @ gate.T) * (x @ up.T), [T, m], rounded once.

    Raises ValueError where a shape, a dtype or a stride does not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1] != x.shape[1] or not _fits(x, weight):
        raise ValueError(
            "x [T, K] and weight [2 * m, K] must be contiguous, K and m multiples of 8, got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype or x.dtype.itemsize != 2:
        raise ValueError(f"x and weight must be of one half precision, got {x.dtype} and {weight.dtype}")
    (rows, depth), columns = x.shape, weight.shape[0] // 2
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)

    def blocks(tensor: torch.Tensor, height: int, width: int) -> TensorDescriptor:
        shape = [height, width]
        layout = gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16)
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), shape, layout)

    tiles = triton.cdiv(rows, tile.groups * _ROWS.value) * triton.cdiv(columns, tile.columns)
    _gated_linear_kernel[(min(tiles, num_processors(x.device)),)](
        blocks(x, _ROWS.value, _DEPTH.value),
        blocks(weight, tile.columns, _DEPTH.value),
        blocks(out, _ROWS.value, tile.columns),
        rows,
        columns,
        depth,
        GROUPS=tile.groups,
        N=tile.columns,
        STAGES=tile.stages(),
        num_warps=4,
        **launch_options(x.device),
    )
    return out


@gluon.jit
def _gated_linear_kernel(
    x_blocks,
    weight_blocks,
    out_blocks,
    rows,
    columns,
    depth,
    GROUPS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    x = gl.allocate_shared_memory(x_blocks.dtype, [STAGES * GROUPS, _ROWS, _DEPTH], x_blocks.layout)
    weight = gl.allocate_shared_memory(x_blocks.dtype, [STAGES, 2 * N, _DEPTH], weight_blocks.layout)
    out = gl.allocate_shared_memory(x_blocks.dtype, [GROUPS, _ROWS, N], out_blocks.layout)
    # filled: by the loading warp; free again: once all warpgroups have read it
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    begin(PDL)
    # tiles of the same columns follow each other, and share weights
    row_tiles = gl.cdiv(rows, GROUPS * _ROWS)
    tiles = row_tiles * gl.cdiv(columns, N)
    loading = (x_blocks, weight_blocks, x, weight, filled, free)
    computing = (out_blocks, x, weight, out, filled, free)
    sizes = (row_tiles, tiles, columns, depth)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (computing, sizes, 0, GROUPS, N, STAGES)),
                (_multiply, (computing, sizes, 1, GROUPS, N, STAGES)),
                (_load, (loading, sizes, GROUPS, N, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (computing, sizes, 0, GROUPS, N, STAGES)),
                (_multiply, (computing, sizes, 1, GROUPS, N, STAGES)),
                (_multiply, (computing, sizes, 2, GROUPS, N, STAGES)),
                (_load, (loading, sizes, GROUPS, N, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


@gluon.jit
def _load(given, sizes, GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):
    """What the loading warp does: the tiles of the program, as far ahead of the others as there are stages."""
    x_blocks, weight_blocks, x, weight, filled, free = given
    row_tiles, tiles, columns, depth = sizes
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = tile % row_tiles * (GROUPS * _ROWS), tile // row_tiles * N
        for k in range(0, depth, _DEPTH):
            i, is_second = step % STAGES, step // STAGES % 2
            mbarrier.wait(free.index(i), is_second ^ 1)
            nbytes: gl.constexpr = GROUPS * x_blocks.block_type.nbytes + 2 * weight_blocks.block_type.nbytes
            mbarrier.expect(filled.index(i), nbytes)
            for group in gl.static_range(GROUPS):
                at = [row + group * _ROWS, k]
                tma.async_copy_global_to_shared(x_blocks, at, filled.index(i), x.index(i * GROUPS + group))
            gate, up = weight.index(i).slice(0, N), weight.index(i).slice(N, N)
            tma.async_copy_global_to_shared(weight_blocks, [column, k], filled.index(i), gate)
            tma.async_copy_global_to_shared(weight_blocks, [columns + column, k], filled.index(i), up)
            step += 1


@gluon.jit
def _multiply(given, sizes, GROUP: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):
    """What a warpgroup does: its 64 rows of the tiles of the program."""
    out_blocks, x, weight, out, filled, free = given
    row_tiles, tiles, columns, depth = sizes
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * N, 16])
    acc = gl.zeros([_ROWS, 2 * N], gl.float32, ACC)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        use_acc = False
        for k in range(0, depth, _DEPTH):
            i, phase = step % STAGES, step // STAGES % 2
            mbarrier.wait(filled.index(i), phase)
            rows = x.index(i * GROUPS + GROUP)
            acc = warpgroup_mma(rows, weight.index(i).permute((1, 0)), acc, use_acc=use_acc, is_async=True)
            use_acc = True
            # the product before this one has ended
            acc = warpgroup_mma_wait(1, deps=[acc])
            if k > 0:
                mbarrier.arrive(free.index((step - 1) % STAGES))
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index((step - 1) % STAGES))
        gate, up = acc.reshape([_ROWS, 2, N]).permute(0, 2, 1).split()
        # of two equal forms of the sigmoid, the one whose exponential cannot overflow
        small = gl.exp(-gl.abs(gate))
        gated = gate * gl.where(gate >= 0, 1.0, small) / (1.0 + small) * up
        # the copy out of the buffer has ended
        tma.store_wait(0)
        out.index(GROUP).store(gated.to(out.dtype))
        fence_async_shared()
        at = [tile % row_tiles * (GROUPS * _ROWS) + GROUP * _ROWS, tile // row_tiles * N]
        tma.async_copy_shared_to_global(out_blocks, at, out.index(GROUP))
    tma.store_wait(0)
