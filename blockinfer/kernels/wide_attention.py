"""Attention of wide segments, whose many rows are the last keys they attend to: prompts, canvases, what is left of one.

Their q, k and v have just been computed and lie side by side, so only earlier keys are read from pages. The schedule is
FlashAttention-3's (arXiv 2407.08608), for Hopper: one warp loads K and V with the tensor memory accelerator; two
warpgroups of 64 query rows take turns at the matrix units, so that the softmax of one overlaps with the products of the
other; and a warpgroup begins its next tile before it writes the output of the last one.

It is written in Gluon, Triton's lower-level language. On an H200 it reaches .96 to 1.18 of the speed of cuDNN, which
scaled_dot_product_attention chooses. The same loop in Triton, and FlashAttention-2, which torch.nn.attention.varlen
calls, reach .51 to .85. cuDNN itself cannot be captured in a CUDA graph with lengths that lie on the device.
"""

import math

import torch
import torch.nn.functional as F
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

from blockinfer.kernels.backend import begin, is_hopper, launch_options, num_processors, runs_triton
from blockinfer.kernels.segments import (
    FIRST,
    KV_LEN,
    PART,
    PLACE,
    SLOT,
    STOP,
    TILE_COLUMNS,
    Cutting,
    SegmentTable,
    softmax_scale,
)

# Query rows of a warpgroup, of which a tile has two; keys of a tile.
_ROWS, _KEYS = gl.constexpr(64), gl.constexpr(128)
_STAGES = gl.constexpr(2)  # tiles of K and of V that are being loaded or in use
_SWIZZLED = gl.constexpr(64)  # columns that shared memory holds side by side, in 128 bytes


def with_wide(cutting: Cutting, head_dim: int, page_size: int, dtype: torch.dtype, device: torch.device) -> Cutting:
    """The cutting, with wide segments left to `wide_attention`. Its twin takes segments of any number of rows, in
    ordinary tiles. The kernel takes those of at least a tile of keys, on Hopper GPUs, in half precision, for head sizes
    64 and 128 and pages of a multiple of 8 tokens. Where few rows have many earlier keys, splitting these is faster
    (measured on an H200)."""
    if not runs_triton(torch.empty(0, dtype=dtype, device=device)):
        return cutting._replace(wide_rows=cutting.rows)
    if not (is_hopper(device) and dtype.itemsize == 2 and head_dim in (64, 128) and page_size % 8 == 0):
        return cutting
    return cutting._replace(wide_rows=2 * _ROWS.value, least_wide=_KEYS.value)


def wide_attention(
    qk: torch.Tensor, v: torch.Tensor, kv_pages: torch.Tensor, table: SegmentTable, out: torch.Tensor
) -> None:
    """qk [T, H + HK, D]: queries and keys, with RoPE; v [T, HK, D], H a multiple of HK; kv_pages [2, pages, P, HK, D]:
    the keys before a segment's rows; out [T, H, D]: only the rows of the table's wide segments are written.

    Scale 1 / sqrt(D). K and V of rows of other segments, and slots at or past kv_len, may hold anything; slots of a
    segment's own rows are not attended to either, but must hold finite numbers. All of one dtype.
    """
    implementation = wide_attention_gluon if runs_triton(qk) else wide_attention_torch
    implementation(qk, v, kv_pages, table, out)


def wide_attention_torch(
    qk: torch.Tensor, v: torch.Tensor, kv_pages: torch.Tensor, table: SegmentTable, out: torch.Tensor
) -> None:
    """The twin: dense attention, one tile after the other."""
    kv_heads, page_size = v.shape[1], kv_pages.shape[2]
    q, k = qk[:, :-kv_heads], qk[:, -kv_heads:]
    paged, wide = table.num_tiles.tolist()
    for first, stop, slot, kv_len, before, _, place in table.tiles[paged : paged + wide].tolist():
        own = slice(place, place + kv_len - before)
        kv = k[own], v[own]
        if before:
            pages = kv_pages[:, table.page_tables[slot, : -(-before // page_size)]].flatten(1, 2)
            kv = (torch.cat([earlier[:before], mine]) for earlier, mine in zip(pages, kv, strict=True))
        tensors = (tensor.transpose(0, 1)[None] for tensor in (q[first:stop], *kv))
        attended = F.scaled_dot_product_attention(*tensors, enable_gqa=q.shape[1] != kv_heads)
        out[first:stop] = attended[0].transpose(0, 1)


def wide_attention_gluon(
    qk: torch.Tensor, v: torch.Tensor, kv_pages: torch.Tensor, table: SegmentTable, out: torch.Tensor
) -> None:
    """The kernel; arguments as for `wide_attention`. The table must be made with the cutting of `with_wide`.

    Raises ValueError where a shape, a dtype or a stride is not what the kernel indexes by.
    """
    rows, heads, head_dim = out.shape
    kv_heads, page_size = v.shape[1], kv_pages.shape[2]
    of_keys = kv_heads, head_dim
    if qk.shape != (rows, heads + kv_heads, head_dim) or v.shape != (rows, *of_keys) or heads % kv_heads:
        shapes = f"{tuple(qk.shape)}, {tuple(v.shape)} and {tuple(out.shape)}"
        raise ValueError(
            f"qk [T, H + HK, D], v [T, HK, D] and out [T, H, D], H a multiple of HK, must fit, got {shapes}"
        )
    if kv_pages.shape[3:] != of_keys or len(kv_pages) != 2 or page_size % 8:
        shape = tuple(kv_pages.shape)
        raise ValueError(f"kv_pages must be [2, pages, P, HK, D], P a multiple of 8, HK, D = {of_keys}, got {shape}")
    if not qk.dtype == v.dtype == kv_pages.dtype == out.dtype or qk.dtype.itemsize != 2:
        dtypes = f"{qk.dtype}, {v.dtype}, {kv_pages.dtype} and {out.dtype}"
        raise ValueError(f"qk, v, kv_pages and out must be of one half precision, got {dtypes}")
    contiguous = qk.is_contiguous() and out.is_contiguous() and kv_pages[0].is_contiguous()
    if not (contiguous and v.stride()[1:] == (head_dim, 1)):
        raise ValueError("qk, out, and the pages of K and of V must be contiguous, and so must each row of v")

    def blocks(tensor: torch.Tensor, size: int, columns: int = head_dim) -> TensorDescriptor:
        shape, wide = [size, columns], [len(tensor), tensor.shape[1] * head_dim]
        layout = gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16)
        return TensorDescriptor(tensor, wide, [tensor.stride(0), 1], shape, layout)

    q_rows, keys, page_rows = _ROWS.value, _KEYS.value, math.gcd(page_size, _KEYS.value)
    _wide_attention_kernel[(num_processors(qk.device) if rows else 0,)](
        *(blocks(qk, q_rows), blocks(qk, keys), blocks(v, keys)),
        *(blocks(slots.flatten(0, 1), page_rows, _SWIZZLED.value) for slots in kv_pages),
        *(blocks(out, q_rows), out),
        table.tiles,
        table.num_tiles,
        table.page_tables,
        table.page_tables.stride(0),
        softmax_scale(head_dim),
        HEADS=heads,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        num_warps=4,
        **launch_options(qk.device),
    )


@gluon.jit
def _wide_attention_kernel(
    q_blocks,
    k_blocks,
    v_blocks,
    k_page_blocks,
    v_page_blocks,
    out_blocks,
    out_ptr,
    tiles_ptr,
    num_tiles_ptr,
    page_tables_ptr,
    table_stride,
    scale,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    PDL: gl.constexpr,
):
    # two tiles of queries, each with a half for each warpgroup
    q = gl.allocate_shared_memory(q_blocks.dtype, [4, _ROWS, HEAD_DIM], q_blocks.layout)
    k = gl.allocate_shared_memory(q_blocks.dtype, [_STAGES, _KEYS, HEAD_DIM], k_blocks.layout)
    v = gl.allocate_shared_memory(q_blocks.dtype, [_STAGES, _KEYS, HEAD_DIM], v_blocks.layout)
    out = gl.allocate_shared_memory(q_blocks.dtype, [2, _ROWS, HEAD_DIM], out_blocks.layout)
    # filled: by the loading warp; free again: once both warpgroups have read it
    q_filled = _barriers(2, 1)
    q_free = _barriers(2, 2)
    k_filled = _barriers(_STAGES, 1)
    k_free = _barriers(_STAGES, 2)
    v_filled = _barriers(_STAGES, 1)
    v_free = _barriers(_STAGES, 2)
    turns = _barriers(2, 1)
    filled, free = (q_filled, k_filled, v_filled), (q_free, k_free, v_free)
    num_paged = gl.load(num_tiles_ptr)
    num_tiles = gl.load(num_tiles_ptr + 1).to(gl.int32)
    tiles_ptr += num_paged * TILE_COLUMNS
    # no kernel of the step writes what was read so far
    begin(PDL)
    both = (out_blocks, out_ptr, tiles_ptr, num_tiles, scale, q, k, v, out, filled, free, turns)
    paged = (k_page_blocks, v_page_blocks, page_tables_ptr, table_stride)
    loading = (q_blocks, k_blocks, v_blocks, paged, tiles_ptr, num_tiles, q, k, v, filled, free)
    gl.warp_specialize(
        [
            (_compute, (both, 0, HEADS, HEAD_DIM)),
            (_compute, (both, 1, HEADS, HEAD_DIM)),
            (_load, (loading, HEADS, GROUP, HEAD_DIM, PAGE_SIZE)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _barriers(number: gl.constexpr, arrivals: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def _tile_of(work, tiles_ptr, num_tiles):
    """-> its head, first row, the row past its last, the first of the segment's rows, how many these are, and how many
    keys are before them."""
    tile_ptr = tiles_ptr + (work % num_tiles).to(gl.int64) * TILE_COLUMNS
    first = gl.load(tile_ptr + FIRST).to(gl.int32)
    stop = gl.load(tile_ptr + STOP).to(gl.int32)
    place = gl.load(tile_ptr + PLACE).to(gl.int32)
    before = gl.load(tile_ptr + PART).to(gl.int32)
    return work // num_tiles, first, stop, place, gl.load(tile_ptr + KV_LEN).to(gl.int32) - before, before


@gluon.jit
def _fill(blocks, row, column, barrier, buffer, free, is_second):
    """Waits until the buffer is free for the first or second time, in turns, and has it filled."""
    mbarrier.wait(free, is_second ^ 1)
    mbarrier.expect(barrier, blocks.block_type.nbytes)
    tma.async_copy_global_to_shared(blocks, [row, column], barrier, buffer)


@gluon.jit
def _fill_from_pages(blocks, pages_ptr, start, column, barrier, buffer, free, is_second, PAGE_SIZE: gl.constexpr):
    """`_fill` with the keys from `start` on, a multiple of _KEYS, of the pages that the pointer leads to."""
    HEAD_DIM: gl.constexpr = buffer.shape[1]
    ROWS: gl.constexpr = blocks.block_type.shape[0]
    mbarrier.wait(free, is_second ^ 1)
    mbarrier.expect(barrier, _KEYS * HEAD_DIM * 2)
    for part in gl.static_range(_KEYS // ROWS):
        key = start + part * ROWS
        row = gl.load(pages_ptr + key // PAGE_SIZE).to(gl.int32) * PAGE_SIZE + key % PAGE_SIZE
        for side in gl.static_range(HEAD_DIM // _SWIZZLED):
            place = buffer.slice(part * ROWS, ROWS).slice(side * _SWIZZLED, _SWIZZLED, dim=1)
            tma.async_copy_global_to_shared(blocks, [row, column + side * _SWIZZLED], barrier, place)


@gluon.jit
def _load(given, HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """What the loading warp does: all tiles of the program, as far ahead of the others as there is room. Of each the
    segment's own keys come first."""
    q_blocks, k_blocks, v_blocks, paged, tiles_ptr, num_tiles, q, k, v, filled, free = given
    k_page_blocks, v_page_blocks, page_tables_ptr, table_stride = paged
    q_filled, k_filled, v_filled = filled
    q_free, k_free, v_free = free
    tile, keys_read = 0, 0
    for work in range(gl.program_id(0), num_tiles * HEADS, gl.num_programs(0)):
        head, first, _, place, own, before = _tile_of(work, tiles_ptr, num_tiles)
        kv_column = head // GROUP * HEAD_DIM
        half = tile % 2
        mbarrier.wait(q_free.index(half), tile // 2 % 2 ^ 1)
        mbarrier.expect(q_filled.index(half), 2 * q_blocks.block_type.nbytes)
        for part in gl.static_range(2):
            at = [first + part * _ROWS, head * HEAD_DIM]
            tma.async_copy_global_to_shared(q_blocks, at, q_filled.index(half), q.index(2 * half + part))
        for start in range(0, own, _KEYS):
            # the last keys too are loaded as a whole tile, so that no row of another segment is read
            row = place + gl.minimum(start, own - _KEYS)
            i, phase = keys_read % _STAGES, keys_read // _STAGES % 2
            k_column = HEADS * HEAD_DIM + kv_column
            _fill(k_blocks, row, k_column, k_filled.index(i), k.index(i), k_free.index(i), phase)
            _fill(v_blocks, row, kv_column, v_filled.index(i), v.index(i), v_free.index(i), phase)
            keys_read += 1
        # a segment has at least a tile of own keys, so the last tile before them has no slot past its keys
        slot = gl.load(tiles_ptr + (work % num_tiles).to(gl.int64) * TILE_COLUMNS + SLOT)
        pages_ptr = page_tables_ptr + slot * table_stride
        for start in range(0, before, _KEYS):
            i, phase = keys_read % _STAGES, keys_read // _STAGES % 2
            keys = (pages_ptr, start, kv_column)
            _fill_from_pages(k_page_blocks, *keys, k_filled.index(i), k.index(i), k_free.index(i), phase, PAGE_SIZE)
            _fill_from_pages(v_page_blocks, *keys, v_filled.index(i), v.index(i), v_free.index(i), phase, PAGE_SIZE)
            keys_read += 1
        tile += 1


@gluon.jit
def _compute(given, WHICH: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """What a warpgroup does: its half of the rows of all tiles of the program.

    The scores of the next keys, or of the next tile's first ones, are computed while the softmax of those before waits
    for its product with V.
    """
    out_blocks, out_ptr, tiles_ptr, num_tiles, scale, q, k, v, out, filled, free, turns = given
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _KEYS, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ACC_ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    q_filled, k_filled, v_filled = filled
    q_free, k_free, v_free = free
    num_work = num_tiles * HEADS
    key = gl.arange(0, _KEYS, gl.SliceLayout(0, SCORES))
    no_scores = gl.zeros([_ROWS, _KEYS], gl.float32, SCORES)
    acc = gl.zeros([_ROWS, HEAD_DIM], gl.float32, ACC)
    tile, keys_read, turn = 0, 0, 0
    if gl.program_id(0) < num_work:
        head, first, stop, _, own, before = _tile_of(gl.program_id(0), tiles_ptr, num_tiles)
        mbarrier.wait(q_filled.index(0), 0)
        mbarrier.wait(k_filled.index(0), 0)
        _take_turn(turns, turn, WHICH)
        scores = warpgroup_mma(q.index(WHICH), k.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        _pass_turn(turns, WHICH)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_free.index(0))
        p, largest, total = _first_softmax(scores, scale)
        weights = gl.convert_layout(p.to(q.dtype), WEIGHTS)
        turn += 1
        for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
            # the next tile's, which begins before this one ends
            next_work = gl.minimum(work + gl.num_programs(0), num_work - 1)
            next_head, next_first, next_stop, _, next_own, next_before = _tile_of(next_work, tiles_ptr, num_tiles)
            my_q = q.index(tile % 2 * 2 + WHICH)
            padded = gl.cdiv(own, _KEYS) * _KEYS
            for start in range(_KEYS, padded + before, _KEYS):
                i, phase = keys_read % _STAGES, keys_read // _STAGES % 2
                keys_read += 1
                j, next_phase = keys_read % _STAGES, keys_read // _STAGES % 2
                mbarrier.wait(k_filled.index(j), next_phase)
                _take_turn(turns, turn, WHICH)
                scores = warpgroup_mma(my_q, k.index(j).permute((1, 0)), no_scores, use_acc=False, is_async=True)
                mbarrier.wait(v_filled.index(i), phase)
                product = warpgroup_mma(weights, v.index(i), acc, is_async=True)
                _pass_turn(turns, WHICH)
                turn += 1
                scores = warpgroup_mma_wait(1, deps=[scores])
                mbarrier.arrive(k_free.index(j))
                # of the last own keys those seen before, of the last earlier ones those past them
                seen = gl.where(start < padded, start + _KEYS - own, 0)
                until = gl.where(start < padded, _KEYS, padded + before - start)
                if (seen > 0) | (until < _KEYS):
                    left_out = (key < seen) | (key >= until)
                    scores = gl.where(gl.expand_dims(left_out, 0), -float("inf"), scores)
                new_largest = gl.maximum(largest, gl.max(scores, axis=1) * scale)
                shrink = gl.exp2(largest - new_largest)
                largest = new_largest
                p = gl.exp2(scores * scale - gl.expand_dims(largest, 1))
                total = total * shrink + gl.sum(p, axis=1)
                acc = warpgroup_mma_wait(0, deps=[product])
                mbarrier.arrive(v_free.index(i))
                acc *= gl.expand_dims(gl.convert_layout(shrink, ACC_ROWS), 1)
                weights = gl.convert_layout(p.to(q.dtype), WEIGHTS)
            mbarrier.arrive(q_free.index(tile % 2))
            tile += 1
            share = gl.expand_dims(1.0 / gl.convert_layout(total, ACC_ROWS), 1)
            i, phase = keys_read % _STAGES, keys_read // _STAGES % 2
            keys_read += 1
            if work + gl.num_programs(0) < num_work:
                j, next_phase = keys_read % _STAGES, keys_read // _STAGES % 2
                mbarrier.wait(q_filled.index(tile % 2), tile // 2 % 2)
                mbarrier.wait(k_filled.index(j), next_phase)
                next_q = q.index(tile % 2 * 2 + WHICH)
                _take_turn(turns, turn, WHICH)
                scores = warpgroup_mma(next_q, k.index(j).permute((1, 0)), no_scores, use_acc=False, is_async=True)
                mbarrier.wait(v_filled.index(i), phase)
                product = warpgroup_mma(weights, v.index(i), acc, is_async=True)
                _pass_turn(turns, WHICH)
                scores = warpgroup_mma_wait(1, deps=[scores])
                mbarrier.arrive(k_free.index(j))
                p, largest, total = _first_softmax(scores, scale)
                acc = warpgroup_mma_wait(0, deps=[product])
                mbarrier.arrive(v_free.index(i))
                weights = gl.convert_layout(p.to(q.dtype), WEIGHTS)
            else:
                mbarrier.wait(v_filled.index(i), phase)
                _take_turn(turns, turn, WHICH)
                product = warpgroup_mma(weights, v.index(i), acc, is_async=True)
                _pass_turn(turns, WHICH)
                acc = warpgroup_mma_wait(0, deps=[product])
            turn += 1
            _write(
                (acc * share).to(q.dtype),
                first + WHICH * _ROWS,
                stop,
                head,
                out.index(WHICH),
                out_blocks,
                out_ptr,
                HEADS,
            )
            acc = gl.zeros([_ROWS, HEAD_DIM], gl.float32, ACC)
            head, first, stop, own, before = next_head, next_first, next_stop, next_own, next_before
        tma.store_wait(0)


@gluon.jit
def _take_turn(turns, turn, WHICH: gl.constexpr):
    """Waits until the other warpgroup has handed its products of before to the matrix units; the first one begins."""
    mbarrier.wait(turns.index(WHICH), turn % 2 ^ 1 - WHICH)


@gluon.jit
def _pass_turn(turns, WHICH: gl.constexpr):
    mbarrier.arrive(turns.index(1 - WHICH))


@gluon.jit
def _first_softmax(scores, scale):
    """Of a tile's first keys: weights, and of each row the largest scaled score and the sum of the weights."""
    largest = gl.max(scores, axis=1) * scale
    p = gl.exp2(scores * scale - gl.expand_dims(largest, 1))
    return p, largest, gl.sum(p, axis=1)


@gluon.jit
def _write(values, row, stop, head, buffer, out_blocks, out_ptr, HEADS: gl.constexpr):
    """values [_ROWS, HEAD_DIM] of the rows from `row` on, of which those from stop on are another segment's."""
    HEAD_DIM: gl.constexpr = values.shape[1]
    if row + _ROWS <= stop:
        # the copy out of the buffer has finished
        tma.store_wait(0)
        buffer.store(values)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_blocks, [row, head * HEAD_DIM], buffer)
    else:
        rows = row + gl.arange(0, _ROWS, gl.SliceLayout(1, values.type.layout))
        d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, values.type.layout))
        at = gl.expand_dims((rows.to(gl.int64) * HEADS + head) * HEAD_DIM, 1) + gl.expand_dims(d, 0)
        gl.store(out_ptr + at, values, mask=gl.expand_dims(rows < stop, 1))
