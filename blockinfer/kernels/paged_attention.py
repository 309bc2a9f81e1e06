"""Attention of segments over paged K and V, for all segments except wide ones (wide_attention.py).

Paging follows vLLM's PagedAttention (arXiv 2309.06180). There is no mask: a query sees all keys below its segment's
kv_len. The kernel keeps a running softmax over tiles of keys (FlashAttention-2, arXiv 2307.08691). If there are too few
queries to fill the GPU, the keys of a segment are split over programs and the parts are combined (Flash-Decoding, Dao
et al., 2023).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from blockinfer.kernels.backend import begin, launch_options, num_processors, runs_triton
from blockinfer.kernels.segments import (
    BLOCK_M,
    FIRST,
    KV_LEN,
    MOST_PARTS,
    PART,
    PARTS,
    PLACE,
    SLOT,
    STOP,
    TILE_COLUMNS,
    SegmentTable,
    softmax_scale,
)


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: SegmentTable,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [T, H, D]; k_pages, v_pages [pages, P, HK, D], H a multiple of HK -> [T, H, D], in `out` if it is given.

    Scale 1 / sqrt(D). Slots at or past kv_len are never read, so they may hold anything. Rows that are in no tile are
    not written. All of one dtype: float32, bfloat16, float16, or float64 (the PyTorch twin, also on a GPU).
    """
    implementation = paged_attention_triton if runs_triton(q) else paged_attention_torch
    return implementation(q, k_pages, v_pages, table, out)


def paged_attention_torch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: SegmentTable,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin: dense attention, one tile after the other, each with all its keys at once."""
    out = torch.empty_like(q) if out is None else out
    page_size = k_pages.shape[1]
    grouped = q.shape[1] != k_pages.shape[2]
    for first, stop, slot, kv_len, part, *_ in table.tiles[: int(table.num_tiles[0])].tolist():
        if part > 0:
            continue
        pages = table.page_tables[slot, : -(-kv_len // page_size)]
        k = k_pages[pages].flatten(0, 1)[:kv_len]
        v = v_pages[pages].flatten(0, 1)[:kv_len]
        out[first:stop] = F.scaled_dot_product_attention(
            q[first:stop].transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], enable_gqa=grouped
        )[0].transpose(0, 1)
    return out


class Tiling(NamedTuple):
    """What the kernel is compiled for: query rows and keys of a tile, powers of two, at least 16."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 3


def paged_attention_triton(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: SegmentTable,
    out: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """The kernel; arguments as for `paged_attention`. tiling: by default chosen from the shapes; the tiles have as many
    rows as fit into its block_m.

    Raises ValueError where a shape, a dtype or a stride is not what the kernel indexes by.
    """
    rows, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    if k_pages.shape != v_pages.shape or k_pages.shape[3] != head_dim or heads % kv_heads:
        shapes = f"{tuple(q.shape)}, {tuple(k_pages.shape)} and {tuple(v_pages.shape)}"
        raise ValueError(
            f"q [T, H, D] must fit k_pages and v_pages [pages, P, HK, D], H a multiple of HK, got {shapes}"
        )
    if not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(f"q, K and V must be of one dtype, got {q.dtype}, {k_pages.dtype} and {v_pages.dtype}")
    if not (k_pages.is_contiguous() and v_pages.is_contiguous() and q.stride(2) == 1 and q.stride(1) == head_dim):
        raise ValueError("k_pages and v_pages must be contiguous, and so must each row of q")
    out = torch.empty(rows, heads, head_dim, dtype=q.dtype, device=q.device) if out is None else out
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous, of q's shape and dtype, got {tuple(out.shape)} of {out.dtype}")
    group = heads // kv_heads
    tiling = tiling or choose_tiling(q)
    block_m = max(tiling.block_m, triton.next_power_of_2(group))
    if table.scratch is not None and table.scratch.outputs.shape[1:] != (kv_heads, block_m, head_dim):
        raise ValueError(
            f"the parts of tiles are [{kv_heads}, {block_m}, {head_dim}], the scratch memory is for "
            f"{list(table.scratch.outputs.shape[1:])}"
        )
    # the heads of a group share their keys, so they are rows of one tile
    block_t = block_m // group
    # for blocks of half a tile, and for fewer rows if these fill the GPU, each program has one tile
    programs = kv_heads * max(triton.cdiv(2 * rows, block_t), num_processors(q.device) // kv_heads)
    _paged_attention_kernel[(programs if rows else 0,)](
        q,
        k_pages,
        v_pages,
        out,
        *(table.scratch or (None, None)),
        table.tiles,
        table.num_tiles,
        table.page_tables,
        table.page_tables.shape[1],
        table.page_tables.stride(0),
        q.stride(0),
        softmax_scale(head_dim),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        SPLIT=table.scratch is not None,
        BLOCK_M=block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        STAGES=tiling.num_stages,
        num_warps=tiling.num_warps,
        **launch_options(q.device),
    )
    if table.scratch is not None:
        _combine_kernel[(len(table.scratch.outputs), kv_heads, triton.cdiv(block_m, 8) if rows else 0)](
            out,
            *table.scratch,
            table.tiles,
            table.num_tiles,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_M=block_m,
            BLOCK_PARTS=min(MOST_PARTS, triton.next_power_of_2(len(table.scratch.outputs))),
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=1,
            **launch_options(q.device),
        )
    return out


def choose_tiling(q: torch.Tensor) -> Tiling:
    """Measured on an H200."""
    return Tiling(BLOCK_M, 32 if q.dtype == torch.float32 else 64)


@triton.jit
def _paged_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    parts_ptr,
    log_sums_ptr,
    tiles_ptr,
    num_tiles_ptr,
    page_tables_ptr,
    table_width,
    table_stride,
    q_stride,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    GROUP: tl.constexpr = HEADS // KV_HEADS
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    num_tiles = tl.load(num_tiles_ptr).to(tl.int32)
    # grid (programs,): each takes a tile and a KV head, and goes on with those that are left
    for work in tl.range(tl.program_id(0), num_tiles * KV_HEADS, tl.num_programs(0), num_stages=1):
        kv_head = work // num_tiles
        tile_ptr = tiles_ptr + (work % num_tiles).to(tl.int64) * TILE_COLUMNS
        first_row = tl.load(tile_ptr + FIRST)
        stop = tl.load(tile_ptr + STOP)
        kv_len = tl.load(tile_ptr + KV_LEN).to(tl.int32)
        part = tl.load(tile_ptr + PART).to(tl.int32)
        parts = tl.load(tile_ptr + PARTS).to(tl.int32)
        table_row = page_tables_ptr + tl.load(tile_ptr + SLOT) * table_stride
        keys_of_part = tl.cdiv(tl.cdiv(kv_len, BLOCK_N), parts) * BLOCK_N
        first_key = part * keys_of_part
        last_key = tl.minimum(first_key + keys_of_part, kv_len)
        # no kernel of the step writes what was read so far, so it is read while the previous one still runs
        begin(PDL)

        row = first_row + m // GROUP  # [BLOCK_M] int64
        head = kv_head * GROUP + m % GROUP
        inside = ((m < BLOCK_M // GROUP * GROUP) & (row < stop))[:, None] & (d < HEAD_DIM)[None, :]
        q = tl.load(q_ptr + row[:, None] * q_stride + head[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
        if SPLIT and BLOCK_N > 16:
            # narrow tiles read few keys sooner, wide ones have more of many keys in flight
            if last_key - first_key <= 8 * BLOCK_N:
                acc, total, largest = _attend_to_part(
                    *(q, k_ptr, v_ptr, table_row, table_width, kv_head, first_key, last_key, scale),
                    *(KV_HEADS, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N // 2, BLOCK_D, STAGES),
                )
            else:
                acc, total, largest = _attend_to_part(
                    *(q, k_ptr, v_ptr, table_row, table_width, kv_head, first_key, last_key, scale),
                    *(KV_HEADS, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, STAGES + 1),
                )
        else:
            acc, total, largest = _attend_to_part(
                *(q, k_ptr, v_ptr, table_row, table_width, kv_head, first_key, last_key, scale),
                *(KV_HEADS, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, STAGES),
            )

        whole_tile = inside
        # a part without keys has a total of 0: its weight is 2 ** -inf and its output 0
        denominator = tl.where(total > 0, total, 1.0)
        output = acc / denominator[:, None]
        if SPLIT:
            whole_tile = inside & (parts == 1)
            if parts > 1:
                log_sum = tl.where(total > 0, largest + tl.log2(denominator), -float("inf"))
                log_sum = tl.where(total == total, log_sum, total)  # NaN stays NaN
                place = (tl.load(tile_ptr + PLACE) + part) * KV_HEADS + kv_head
                at = place * BLOCK_M + m
                tl.store(log_sums_ptr + at, log_sum)
                tl.store(parts_ptr + at[:, None] * HEAD_DIM + d[None, :], output, mask=inside)
        out_at = out_ptr + (row[:, None] * HEADS + head[:, None]) * HEAD_DIM + d[None, :]
        tl.store(out_at, output.to(out_ptr.dtype.element_ty), mask=whole_tile)


@triton.jit
def _attend_to_part(
    q,
    k_ptr,
    v_ptr,
    table_row,
    table_width,
    kv_head,
    first_key,
    last_key,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """q [BLOCK_M, BLOCK_D] on the keys of a part -> their weighted values, the sum of weights, the largest score."""
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # only the last tile of keys may hold keys outside the part
    whole = first_key + tl.maximum(last_key - first_key, 0) // BLOCK_N * BLOCK_N
    # A tile's pages are looked up while the tile before is computed: if they were looked up right before K and V, the
    # compiler would load these only one tile ahead, whatever num_stages says.
    n = tl.arange(0, BLOCK_N)
    last_page = table_width - 1
    page = tl.load(table_row + tl.minimum((first_key + n) // PAGE_SIZE, last_page))
    for tile_start in tl.range(first_key, whole, BLOCK_N, num_stages=STAGES):
        next_page = tl.load(table_row + tl.minimum((tile_start + BLOCK_N + n) // PAGE_SIZE, last_page))
        acc, total, largest = _attend(
            *(acc, total, largest, q, k_ptr, v_ptr, page, kv_head, tile_start, last_key, scale, True),
            *(KV_HEADS, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D),
        )
        page = next_page
    if whole < last_key:
        acc, total, largest = _attend(
            *(acc, total, largest, q, k_ptr, v_ptr, page, kv_head, whole, last_key, scale, False),
            *(KV_HEADS, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D),
        )
    return acc, total, largest


@triton.jit
def _attend(
    acc,
    total,
    largest,
    q,
    k_ptr,
    v_ptr,
    page,
    kv_head,
    tile_start,
    last_key,
    scale,
    WHOLE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The running softmax after BLOCK_N more keys, whose pages are given; those from last_key on are left out, unless
    WHOLE says that there are none."""
    key = tile_start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    slot = page * PAGE_SIZE + key % PAGE_SIZE  # [BLOCK_N] int64
    at = (slot * KV_HEADS + kv_head)[:, None] * HEAD_DIM + d[None, :]  # [BLOCK_N, BLOCK_D]
    if WHOLE and HEAD_DIM == BLOCK_D:
        k = tl.load(k_ptr + at)
        v = tl.load(v_ptr + at)
    else:
        # unused slots may hold NaN, and 0 * NaN would reach the sum: they are not read
        inside = (key < last_key)[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if not WHOLE:
        score = tl.where((key < last_key)[None, :], score, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(score, axis=1) * scale)
    shrink = tl.exp2(largest - new_largest)
    p = tl.exp2(score * scale - new_largest[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return acc, total, new_largest


@triton.jit
def _combine_kernel(
    out_ptr,
    parts_ptr,
    log_sums_ptr,
    tiles_ptr,
    num_tiles_ptr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid (parts, KV_HEADS, BLOCK_M / 8): the programs of a tile's parts share its rows
    is_tile = tl.program_id(0) < tl.load(num_tiles_ptr)
    tile_ptr = tiles_ptr + tl.program_id(0) * TILE_COLUMNS
    parts = tl.load(tile_ptr + PARTS, mask=is_tile, other=1).to(tl.int32)
    part = tl.load(tile_ptr + PART, mask=is_tile, other=0).to(tl.int32)
    first_row = tl.load(tile_ptr + FIRST, mask=is_tile, other=0)
    rows = (tl.load(tile_ptr + STOP, mask=is_tile, other=0) - first_row).to(tl.int32)
    place = tl.load(tile_ptr + PLACE, mask=is_tile, other=0)
    begin(PDL)
    if parts == 1:
        return
    kv_head = tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_PARTS)
    inside = (n < parts)[:, None] & (d < HEAD_DIM)[None, :]
    for m in tl.range(part * tl.num_programs(2) + tl.program_id(2), rows * GROUP, parts * tl.num_programs(2)):
        at = ((place + n) * KV_HEADS + kv_head) * BLOCK_M + m
        log_sum = tl.load(log_sums_ptr + at, mask=n < parts, other=-float("inf"))
        outputs = tl.load(parts_ptr + at[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
        weight = tl.exp2(log_sum - tl.max(log_sum, axis=0))
        out = tl.sum(outputs * weight[:, None], axis=0) / tl.sum(weight, axis=0)
        where = ((first_row + m // GROUP) * HEADS + kv_head * GROUP + m % GROUP) * HEAD_DIM + d
        tl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
