"""The experts of a mixture: grouped products that read the weights of each expert in use once.

A row and one of its experts are a pair. Pairs are sorted by expert and cut into tiles, on the device, so that one CUDA
graph serves every routing: the grid has as many programs as there can be tiles, and surplus ones end at once. As in
`linear`, the weights are the tall operand of the matrix units.

On an H200, for a layer of LLaDA2-mini with random experts, these kernels take 237 us for 32 rows, 415 for 1,024 and 734
for 4,096; reading the weights in use takes 238 for 32 rows. torch's grouped_mm with what it needs around it, but
without ordering and weighing the pairs, takes 378, 565 and 802.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from blockinfer.kernels.activation import silu_mul_torch
from blockinfer.kernels.backend import begin, launch_options, runs_triton, shared_memory
from blockinfer.kernels.router import Routing


def mixture(x: torch.Tensor, routing: Routing, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x [T, d]; the experts' gate_up [E, 2 * m, d], the gate's rows first, and down [E, d, m], all of one dtype -> the
    weighted sum of the outputs of each row's experts, [T, d], or as parts [K, T, d] that the caller sums. An expert's
    output is down @ (silu(gate @ x) * (up @ x)), arXiv 2002.05202.
    """
    return mixture_triton(x, routing, gate_up, down) if runs_triton(x) else mixture_torch(x, routing, gate_up, down)


def mixture_torch(x: torch.Tensor, routing: Routing, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The twin: one expert after the other."""
    out = torch.zeros_like(x)
    for expert in routing.experts.unique().tolist():
        rows, place = (routing.experts == expert).nonzero(as_tuple=True)
        made = F.linear(silu_mul_torch(F.linear(x[rows], gate_up[expert])), down[expert])
        out.index_add_(0, rows, (made * routing.weights[rows, place, None]).to(x.dtype))
    return out


class PairOrder(NamedTuple):
    """order [T * K] int32: pairs, row * K + place, by expert. tiles [I, 3] int32: for each tile its expert, its first
    pair in that order and the one past its last; unused entries hold no pair."""

    order: torch.Tensor
    tiles: torch.Tensor


# the shared memory of the largest tile below
_SHARED_MEMORY = 150 * 1024


class ExpertTiling(NamedTuple):
    """Pairs, columns and depth of a program's tile, powers of two, at least 16."""

    block_t: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 4


def expert_tilings(pairs: int, experts: int, memory: int) -> tuple[ExpertTiling, ExpertTiling]:
    """For gate and up, and for down; both with one block_t, so large that an expert's pairs are mostly one tile
    (measured on an H200, at LLaDA2-mini's and LLaDA-MoE's shapes). memory: bytes that a processor's programs share."""
    mean = pairs / experts
    if memory < _SHARED_MEMORY:
        small = ExpertTiling(16 if mean <= 12 else 64, 64, 64, num_stages=2)
        return small, small
    if mean <= 12:
        return ExpertTiling(16, 64, 128, num_stages=3), ExpertTiling(16, 128, 64, num_stages=5)
    if mean <= 32:
        return ExpertTiling(32, 64, 64, num_stages=5), ExpertTiling(32, 128, 64, num_stages=5)
    if mean <= 136:
        return ExpertTiling(64, 64, 64), ExpertTiling(64, 128, 64, num_warps=8)
    return ExpertTiling(128, 128, 64, num_warps=8, num_stages=3), ExpertTiling(128, 128, 64)


def mixture_triton(
    x: torch.Tensor,
    routing: Routing,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    tilings: tuple[ExpertTiling, ExpertTiling] | None = None,
) -> torch.Tensor:
    """The kernels -> [K, T, d]. Raises ValueError where shapes, dtypes or strides do not fit."""
    rows, width = x.shape
    experts, columns = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.shape != (experts, 2 * columns, width) or down.shape != (experts, width, columns):
        shapes = f"{tuple(x.shape)}, {tuple(gate_up.shape)} and {tuple(down.shape)}"
        raise ValueError(f"x [T, d], gate_up [E, 2 * m, d] and down [E, d, m] do not fit: {shapes}")
    if not x.dtype == gate_up.dtype == down.dtype:
        raise ValueError(f"x and the weights must be of one dtype, got {x.dtype}, {gate_up.dtype} and {down.dtype}")
    if not all(tensor.is_contiguous() for tensor in (x, gate_up, down, *routing)):
        raise ValueError("x, the weights and the routing must be contiguous")
    places = routing.experts.shape[1]
    first, second = tilings or expert_tilings(rows * places, experts, shared_memory(x.device))
    pairs = order_pairs(routing.experts, experts, first.block_t)
    hidden = torch.empty((rows * places, columns), dtype=x.dtype, device=x.device)
    _grouped_linear(x, gate_up, None, hidden, pairs, places, first)
    out = torch.empty((places, rows, width), dtype=x.dtype, device=x.device)
    _grouped_linear(hidden, down, routing.weights, out, pairs, places, second)
    return out


def order_pairs(chosen: torch.Tensor, experts: int, block_t: int) -> PairOrder:
    """chosen [T, K] int32. Pairs of an expert come in any order: it changes no output."""
    number = chosen.numel()
    counts = torch.zeros(experts, dtype=torch.int32, device=chosen.device)
    ranks = torch.empty(number, dtype=torch.int32, device=chosen.device)
    block = 128
    grid = triton.cdiv(number, block)
    options = launch_options(chosen.device)
    _expert_count_kernel[(grid,)](chosen, counts, ranks, number, BLOCK=block, num_warps=4, **options)
    most = min(experts, number) + number // block_t
    order = torch.empty(number, dtype=torch.int32, device=chosen.device)
    tiles = torch.empty((most, 3), dtype=torch.int32, device=chosen.device)
    block = 32
    _expert_order_kernel[(triton.cdiv(max(number, most), block),)](
        chosen,
        counts,
        ranks,
        order,
        tiles,
        number,
        most,
        experts,
        BLOCK_T=block_t,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK=block,
        num_warps=4,
        **options,
    )
    return PairOrder(order, tiles)


@triton.jit
def _expert_count_kernel(experts_ptr, counts_ptr, ranks_ptr, number, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # grid (tiles of pairs,)
    inside = pair < number
    expert = tl.load(experts_ptr + pair, mask=inside, other=0)
    rank = tl.atomic_add(counts_ptr + expert, 1, mask=inside)
    tl.store(ranks_ptr + pair, rank, mask=inside)


@triton.jit
def _expert_order_kernel(
    experts_ptr,
    counts_ptr,
    ranks_ptr,
    order_ptr,
    tiles_ptr,
    number,
    most,
    experts,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # grid (tiles of pairs and of tiles,)
    e = tl.arange(0, BLOCK_E)[None, :]
    counts = tl.load(counts_ptr + e, mask=e < experts, other=0)  # [1, BLOCK_E]

    # pair i goes after all pairs of the experts before its own
    inside = i < number
    expert = tl.load(experts_ptr + i, mask=inside, other=0)
    start = tl.sum(tl.where(e < expert[:, None], counts, 0), axis=1)
    rank = tl.load(ranks_ptr + i, mask=inside, other=0)
    tl.store(order_ptr + start + rank, i, mask=inside)

    # tile i belongs to the first expert whose end lies after it
    tiles = (counts + BLOCK_T - 1) // BLOCK_T
    ends = tl.cumsum(tiles, axis=1)
    expert = tl.sum(tl.where((ends <= i[:, None]) & (e < experts), 1, 0), axis=1)
    before = e < expert[:, None]
    start = tl.sum(tl.where(before, counts, 0), axis=1)
    index = i - tl.sum(tl.where(before, tiles, 0), axis=1)
    count = tl.sum(tl.where(e == expert[:, None], counts, 0), axis=1)
    first = start + index * BLOCK_T
    stop = tl.where(expert < experts, tl.minimum(first + BLOCK_T, start + count), first)
    inside = i < most
    tl.store(tiles_ptr + 3 * i, tl.minimum(expert, experts - 1), mask=inside)
    tl.store(tiles_ptr + 3 * i + 1, first, mask=inside)
    tl.store(tiles_ptr + 3 * i + 2, stop, mask=inside)


def _grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    out: torch.Tensor,
    pairs: PairOrder,
    places: int,
    tiling: ExpertTiling,
) -> None:
    """Without scales, gated: x [T, d], weight [E, 2 * m, d] -> out [T * K, m], in the order of the pairs. With them:
    x [T * K, m] in that order, weight [E, d, m], scales [T, K] -> out [K, T, d]."""
    gated = scales is None
    columns, depth = weight.shape[1] // (2 if gated else 1), weight.shape[2]
    block_k = min(tiling.block_k, max(16, triton.next_power_of_2(depth)))
    _grouped_linear_kernel[(triton.cdiv(columns, tiling.block_n), len(pairs.tiles))](
        x,
        weight,
        scales,
        out,
        pairs.order,
        pairs.tiles,
        len(pairs.order) // places,
        columns,
        depth,
        PLACES=places,
        GATED=gated,
        WHOLE=depth % block_k == 0 and columns % tiling.block_n == 0,
        BLOCK_T=tiling.block_t,
        BLOCK_N=tiling.block_n,
        BLOCK_K=block_k,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **launch_options(x.device),
    )


@triton.jit
def _grouped_linear_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    out_ptr,
    order_ptr,
    tiles_ptr,
    rows,
    columns,
    depth,
    PLACES: tl.constexpr,
    GATED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid (tiles of columns, tiles of pairs)
    begin(PDL)
    tile = tiles_ptr + 3 * tl.program_id(1)
    expert = tl.load(tile).to(tl.int64)
    first, stop = tl.load(tile + 1), tl.load(tile + 2)
    if first >= stop:
        return
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = first + tl.arange(0, BLOCK_T)
    at_inside = at < stop
    column_inside = column < columns
    pair = tl.load(order_ptr + at, mask=at_inside, other=0)
    source = pair // PLACES if GATED else at
    xs = x_ptr + source.to(tl.int64)[:, None] * depth + k[None, :]  # [BLOCK_T, BLOCK_K]
    size = tl.cast(columns, tl.int64) * depth
    start_of_expert = weight_ptr + expert * size * (2 if GATED else 1)
    weights = start_of_expert + column.to(tl.int64)[:, None] * depth + k[None, :]  # [BLOCK_N, BLOCK_K]
    up_weights = weights + size

    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in tl.range(0, depth, BLOCK_K):
        if WHOLE:
            w = tl.load(weights + start)
            x = tl.load(xs + start, mask=at_inside[:, None], other=0.0)
        else:
            inside = start + k < depth
            w = tl.load(weights + start, mask=column_inside[:, None] & inside[None, :], other=0.0)
            x = tl.load(xs + start, mask=at_inside[:, None] & inside[None, :], other=0.0)
        x = tl.trans(x)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if GATED:
            if WHOLE:
                w = tl.load(up_weights + start)
            else:
                w = tl.load(up_weights + start, mask=column_inside[:, None] & inside[None, :], other=0.0)
            up_acc = tl.dot(w, x, up_acc, input_precision="ieee")
    if GATED:
        # of two equal forms of the sigmoid, the one whose exponential cannot overflow
        small = tl.exp(-tl.abs(acc))
        acc = acc * tl.where(acc >= 0, 1.0, small) / (1.0 + small) * up_acc
        target = at
    else:
        acc *= tl.load(scales_ptr + pair, mask=at_inside, other=0.0)[None, :]
        target = pair % PLACES * rows + pair // PLACES
    where = target.to(tl.int64)[None, :] * columns + column[:, None]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=at_inside[None, :] & column_inside[:, None])
