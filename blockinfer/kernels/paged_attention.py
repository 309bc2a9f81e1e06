"""Attention of segments over paged K and V: the one attention that every decoding mode uses.

Paging follows vLLM's PagedAttention (arXiv 2309.06180). There is no mask: a query sees all keys below its segment's
kv_len. The kernel keeps a running softmax over tiles of keys (FlashAttention-2, arXiv 2307.08691); where queries are
too few to fill the GPU, the keys of a segment are split over programs and the parts are combined (Flash-Decoding, Dao
et al., 2023).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from blockinfer.kernels.backend import begin, launch_options, num_processors, runs_triton


class SegmentTable(NamedTuple):
    """S segments over T query rows, as tensors on the model's device.

    query_starts [S + 1] int64: segment i owns rows query_starts[i] .. query_starts[i + 1] - 1.
    kv_lens [S] int64. page_table [S, N] int64: the pages of the segment's sequence in order; entries past
    ceil(kv_len / P) may hold anything. kv_slots [T] int64: where each row's own K and V go, page * P + offset.
    """

    query_starts: torch.Tensor
    kv_lens: torch.Tensor
    page_table: torch.Tensor
    kv_slots: torch.Tensor


def paged_attention(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, table: SegmentTable) -> torch.Tensor:
    """q [T, H, D]; k_pages, v_pages [pages, P, HK, D], H a multiple of HK -> [T, H, D]. Scale 1 / sqrt(D).

    Slots at or past kv_len are never read, so they may hold anything. All of one dtype: float32, bfloat16, float16, or
    float64, which the PyTorch twin computes also on a GPU.
    """
    if runs_triton(q):
        return paged_attention_triton(q, k_pages, v_pages, table)
    return paged_attention_torch(q, k_pages, v_pages, table)


def paged_attention_torch(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, table: SegmentTable
) -> torch.Tensor:
    """The twin: dense attention, one segment after the other."""
    out = torch.empty_like(q)
    starts, kv_lens = table.query_starts.tolist(), table.kv_lens.tolist()
    page_size = k_pages.shape[1]
    grouped = q.shape[1] != k_pages.shape[2]
    for i, kv_len in enumerate(kv_lens):
        rows = slice(starts[i], starts[i + 1])
        pages = table.page_table[i, : -(-kv_len // page_size)]
        k = k_pages[pages].flatten(0, 1)[:kv_len]
        v = v_pages[pages].flatten(0, 1)[:kv_len]
        out[rows] = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], enable_gqa=grouped
        )[0].transpose(0, 1)
    return out


class Tiling(NamedTuple):
    """How the kernel cuts its work: query rows and keys of a tile (powers of two, at least 16), parts of the keys."""

    block_m: int
    block_n: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3


def paged_attention_triton(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: SegmentTable,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """The kernel; arguments as of `paged_attention`. tiling: chosen from the shapes where it is not given.

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
    group = heads // kv_heads
    segments, width = table.page_table.shape
    tiling = tiling or choose_tiling(q, kv_heads, segments, width * page_size)
    block_m = max(tiling.block_m, triton.next_power_of_2(group))
    # the heads of a group share their keys, so they are rows of one tile
    block_t = block_m // group
    out = torch.empty(rows, heads, head_dim, dtype=q.dtype, device=q.device)
    split = tiling.splits > 1
    # each part's output and the base-2 logarithm of its softmax's denominator
    parts = torch.empty((rows, heads, tiling.splits, head_dim), dtype=torch.float32, device=q.device) if split else out
    log_sums = torch.empty((rows, heads, tiling.splits), dtype=torch.float32, device=q.device) if split else out
    # tiles never cross a segment's border: at most one more per segment than the rows alone would make
    grid = (rows // block_t + segments, kv_heads, tiling.splits)
    _paged_attention_kernel[grid](
        q,
        k_pages,
        v_pages,
        parts,
        log_sums,
        table.query_starts,
        table.kv_lens,
        table.page_table,
        segments,
        width,
        table.page_table.stride(0),
        q.stride(0),
        1.4426950408889634 / head_dim**0.5,  # log2(e): the kernel's exponentials are powers of two
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        SPLITS=tiling.splits,
        BLOCK_S=triton.next_power_of_2(segments),
        BLOCK_T=block_t,
        BLOCK_M=block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **launch_options(q.device),
    )
    if split:
        _combine_kernel[(rows, heads)](
            parts,
            log_sums,
            out,
            HEAD_DIM=head_dim,
            SPLITS=tiling.splits,
            BLOCK_SPLITS=triton.next_power_of_2(tiling.splits),
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=1,
            **launch_options(q.device),
        )
    return out


def choose_tiling(q: torch.Tensor, kv_heads: int, segments: int, max_kv_len: int) -> Tiling:
    """Tiles as tall as the matrix units take, and so many parts of the keys that most processors have a program.

    Up to 256 keys the second launch costs what the parts save (measured on an H100, and the tiles on an H200, too).
    """
    rows, heads, _ = q.shape
    rows *= heads // kv_heads
    programs = max(segments, rows // 64) * kv_heads
    wanted = num_processors(q.device) // programs if max_kv_len > 256 else 1
    splits = max(1, min(wanted, max_kv_len // 64, 16))
    one_tile = rows <= 64 * segments and splits == 1
    return Tiling(64, 32 if one_tile or q.dtype == torch.float32 else 64, splits)


@triton.jit
def _paged_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    log_sum_ptr,
    query_starts_ptr,
    kv_lens_ptr,
    page_table_ptr,
    segments,
    table_width,
    table_stride,
    q_stride,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    tile = tl.program_id(0)  # grid (tiles, KV_HEADS, SPLITS)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS

    # Segment i's first tile is query_starts[i] // BLOCK_T + i, which leaves room for all tiles of the segments before:
    # the tile's segment is the last whose first tile is not past it.
    index = tl.arange(0, BLOCK_S)
    starts = tl.load(query_starts_ptr + index, mask=index < segments, other=0)
    first_tiles = tl.where(index < segments, starts // BLOCK_T + index, tile + 1)
    segment = tl.sum((first_tiles <= tile).to(tl.int32), axis=0) - 1
    start = tl.load(query_starts_ptr + segment)
    stop = tl.load(query_starts_ptr + segment + 1)
    first_row = start + (tile - start // BLOCK_T - segment) * BLOCK_T
    if first_row >= stop:
        return

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row = first_row + m // GROUP  # [BLOCK_M] int64
    head = kv_head * GROUP + m % GROUP
    row_inside = (m < BLOCK_T * GROUP) & (row < stop)
    inside = row_inside[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + row[:, None] * q_stride + head[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)

    kv_len = tl.load(kv_lens_ptr + segment).to(tl.int32)
    part = tl.cdiv(tl.cdiv(kv_len, BLOCK_N), SPLITS) * BLOCK_N
    first_key = split * part
    last_key = tl.minimum(first_key + part, kv_len)
    table_row = page_table_ptr + segment.to(tl.int64) * table_stride

    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # only the last tile may hold keys that are not the part's
    whole = first_key + tl.maximum(last_key - first_key, 0) // BLOCK_N * BLOCK_N
    # A tile's pages are looked up while the tile before is computed: were they looked up right before K and V, the
    # compiler would load these only one tile ahead, whatever num_stages says.
    n = tl.arange(0, BLOCK_N)
    last_page = table_width - 1
    page = tl.load(table_row + tl.minimum((first_key + n) // PAGE_SIZE, last_page))
    for tile_start in tl.range(first_key, whole, BLOCK_N):
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

    if SPLITS == 1:
        where = (row[:, None] * HEADS + head[:, None]) * HEAD_DIM + d[None, :]
        tl.store(out_ptr + where, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        # a part without keys has a total of 0: its weight is 2 ** -inf and its output 0
        log_sum = tl.where(total > 0, largest + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))
        log_sum = tl.where(total == total, log_sum, total)  # NaN stays NaN
        which = (row * HEADS + head) * SPLITS + split
        tl.store(log_sum_ptr + which, log_sum, mask=row_inside)
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + which[:, None] * HEAD_DIM + d[None, :], acc, mask=inside)


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
        # unused slots may hold NaN, which 0 * NaN would let into the sum: they are not read
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
    parts_ptr,
    log_sum_ptr,
    out_ptr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    which = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)  # grid (T, H)
    split = tl.arange(0, BLOCK_SPLITS)
    d = tl.arange(0, BLOCK_D)
    log_sum = tl.load(log_sum_ptr + which * SPLITS + split, mask=split < SPLITS, other=-float("inf"))
    weight = tl.exp2(log_sum - tl.max(log_sum, axis=0))
    inside = (split < SPLITS)[:, None] & (d < HEAD_DIM)[None, :]
    parts = tl.load(parts_ptr + (which * SPLITS + split)[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    out = tl.sum(parts * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out_ptr + which * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
