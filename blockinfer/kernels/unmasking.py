"""From the masked positions of a step's blocks to the rows that the LM head needs, and from its predictions back.

Two kernels for what PyTorch would launch some eighty for, each of them longer in coming than in running.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from blockinfer.decoding.unmasking import RULES
from blockinfer.kernels.backend import begin, launch_options, runs_triton


class SlotState(NamedTuple):
    """What the device keeps of each running sequence, in a row of these, its slot; the last slot is scrap.

    tokens [slots, M] int64, at each position; masked [slots, M] bool, what is still to be revealed; broken [slots]
    bool, whether its logits were NaN or infinite; rules, values [slots] int64, of any stride: the index in RULES of its
    unmasking rule, and that rule's option as the bits of a float64.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    broken: torch.Tensor
    rules: torch.Tensor
    values: torch.Tensor


class Blocks(NamedTuple):
    """The blocks that a step works on, one a sequence, each [B] int64; what pads them is of the scrap slot and empty.

    slots; starts and lengths: the block's first position and how many it has; first_rows: the row of that position in
    the forward, where a block's rows follow each other. steps: the denoising step in the block; counts: how many
    positions the schedule reveals in it; last_steps: whether it must reveal all, 0 or 1; masked_counts: how many
    positions are masked as far as the host knows: a broken sequence has more, and one whose last step revealed and was
    then cut short, as by Ctrl-C, has fewer; output_starts: output tokens before the block.
    """

    slots: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    first_rows: torch.Tensor
    steps: torch.Tensor
    counts: torch.Tensor
    last_steps: torch.Tensor
    masked_counts: torch.Tensor
    output_starts: torch.Tensor


class MaskedRows(NamedTuple):
    """Of each block masked_counts masked positions, the first ones, block after block, each [N] int64: the index of the
    block, the place in it, the row in the forward. Where fewer are masked, and at the end, block 0's first row."""

    block: torch.Tensor
    offset: torch.Tensor
    row: torch.Tensor


def masked_rows(state: SlotState, blocks: Blocks, width: int, size: int) -> MaskedRows:
    """width: of the longest block; size: N, at least the sum of blocks.masked_counts."""
    implementation = masked_rows_triton if runs_triton(state.tokens) else masked_rows_torch
    return implementation(state, blocks, width, size)


def unmask(
    rule: str,
    scores: torch.Tensor,
    token_ids: torch.Tensor,
    finite: torch.Tensor,
    state: SlotState,
    blocks: Blocks,
    result: torch.Tensor,
) -> None:
    """Reveals in the blocks of this rule's sequences what it chooses, and all where it is the last step.

    Of each masked row [N], in the order of `masked_rows`: scores float32, what the rule ranks by; token_ids int64, what
    takes the mask's place; finite bool. A sequence with a row that is not finite is broken, and reveals nothing any
    more. state is written, and of result [B, 2 + width] int64 the rows of these blocks: whether the sequence is broken,
    how many positions are masked still, and the tokens of the block, of which nothing past its length means anything.
    """
    implementation = unmask_triton if runs_triton(state.tokens) else unmask_torch
    implementation(rule, scores, token_ids, finite, state, blocks, result)


def masked_rows_torch(state: SlotState, blocks: Blocks, width: int, size: int) -> MaskedRows:
    """The twin."""
    places = _places(state, blocks, width)
    rows = torch.zeros((size, 2), dtype=torch.int64, device=places.row.device)
    rows[places.row[places.listed]] = places.listed.nonzero()
    block, offset = rows.unbind(1)
    return MaskedRows(block, offset, blocks.first_rows[block] + offset)


def unmask_torch(
    rule: str,
    scores: torch.Tensor,
    token_ids: torch.Tensor,
    finite: torch.Tensor,
    state: SlotState,
    blocks: Blocks,
    result: torch.Tensor,
) -> None:
    """The twin."""
    where, masked, listed, place = _places(state, blocks, result.shape[1] - 2)
    mine = state.rules[blocks.slots] == list(RULES).index(rule)
    broken = state.broken[blocks.slots] | (listed & ~finite[place]).any(dim=-1)
    values = state.values[blocks.slots].view(torch.float64).float()
    reveal = RULES[rule].select(scores[place], listed, blocks.counts, values)
    reveal |= listed & (blocks.last_steps > 0)[:, None]
    reveal &= (mine & ~broken)[:, None]
    tokens = torch.where(reveal, token_ids[place], state.tokens[where])
    masked &= ~reveal
    state.tokens[where], state.masked[where] = tokens, masked
    state.broken[blocks.slots[mine]] = broken[mine]
    result[mine] = torch.cat([broken[:, None].long(), masked.sum(dim=-1, keepdim=True), tokens], dim=1)[mine]


class _Places(NamedTuple):
    """Of the blocks' places [B, width]: slot and position, those past a length in the scrap slot; whether it is masked;
    whether `masked_rows` lists it, and there as which row, which is 0 for what is not listed."""

    where: tuple[torch.Tensor, torch.Tensor]
    masked: torch.Tensor
    listed: torch.Tensor
    row: torch.Tensor


def _places(state: SlotState, blocks: Blocks, width: int) -> _Places:
    offsets = torch.arange(width, device=blocks.starts.device)
    inside = offsets < blocks.lengths[:, None]
    scrap = len(state.tokens) - 1
    where = blocks.slots[:, None].where(inside, scrap), (blocks.starts[:, None] + offsets).where(inside, 0)
    masked = state.masked[where] & inside
    rank = masked.cumsum(dim=-1)
    listed = masked & (rank <= blocks.masked_counts[:, None])
    first = blocks.masked_counts.cumsum(dim=0) - blocks.masked_counts
    return _Places(where, masked, listed, (first[:, None] + rank - 1).where(listed, 0))


def masked_rows_triton(state: SlotState, blocks: Blocks, width: int, size: int) -> MaskedRows:
    """The kernel, a program for each block. Raises ValueError where the state or the blocks are not contiguous."""
    _check(state, blocks)
    rows = MaskedRows(*(torch.empty(size, dtype=torch.int64, device=state.tokens.device) for _ in range(3)))
    number = len(blocks.slots)
    _masked_rows_kernel[(number,)](
        state.masked,
        state.masked.stride(0),
        *(blocks.slots, blocks.starts, blocks.lengths, blocks.first_rows, blocks.masked_counts),
        *rows,
        number,
        size,
        BLOCK_B=triton.next_power_of_2(number),
        BLOCK_L=triton.next_power_of_2(width),
        **launch_options(state.tokens.device),
    )
    return rows


def unmask_triton(
    rule: str,
    scores: torch.Tensor,
    token_ids: torch.Tensor,
    finite: torch.Tensor,
    state: SlotState,
    blocks: Blocks,
    result: torch.Tensor,
) -> None:
    """The kernel, a program for each block, which counts for each position those that go first.

    Raises ValueError where a tensor is not contiguous.
    """
    _check(state, blocks)
    if not all(tensor.is_contiguous() for tensor in (scores, token_ids, finite, result)):
        raise ValueError("scores, token_ids, finite and result must be contiguous")
    number, width = len(blocks.slots), result.shape[1] - 2
    block_l = triton.next_power_of_2(width)
    _unmask_kernel[(number,)](
        *(scores, token_ids, finite, result, width),
        *(state.tokens, state.masked, state.tokens.stride(0), state.broken),
        *(state.rules, state.rules.stride(0), state.values, state.values.stride(0)),
        *(blocks.slots, blocks.starts, blocks.lengths, blocks.counts, blocks.last_steps, blocks.masked_counts),
        number,
        SELECT="top" if RULES[rule].scheduled else rule,
        RULE=list(RULES).index(rule),
        BLOCK_B=triton.next_power_of_2(number),
        BLOCK_L=block_l,
        BLOCK_N=max(1, min(64, 8192 // block_l)),
        num_warps=min(16, max(4, block_l // 32)),
        **launch_options(state.tokens.device),
    )


def _check(state: SlotState, blocks: Blocks) -> None:
    if not all(tensor.is_contiguous() for tensor in (*state[:3], *blocks)):
        raise ValueError("tokens, masked, broken and what describes the blocks must be contiguous")


@triton.jit
def _listed_of(
    masked_ptr, stride, slots_ptr, starts_ptr, lengths_ptr, counts_ptr, number, B: tl.constexpr, L: tl.constexpr
):
    """Of this program's block: which of its places are masked, which of these are listed and as which row, all [L];
    how many are listed, as which row the first is, and how many rows there are for them."""
    block = tl.program_id(0)
    index = tl.arange(0, B)
    counts = tl.load(counts_ptr + index, mask=index < number, other=0)
    first = tl.sum(tl.where(index < block, counts, 0), axis=0)
    count = tl.load(counts_ptr + block)
    offset = tl.arange(0, L)
    at = masked_ptr + tl.load(slots_ptr + block) * stride + tl.load(starts_ptr + block) + offset
    masked = tl.load(at, mask=offset < tl.load(lengths_ptr + block), other=0) != 0
    rank = tl.cumsum(masked.to(tl.int32), axis=0)
    listed = masked & (rank <= count)
    return masked, listed, first + rank - 1, tl.sum(listed.to(tl.int32), axis=0), first, count


@triton.jit
def _masked_rows_kernel(
    masked_ptr,
    stride,
    slots_ptr,
    starts_ptr,
    lengths_ptr,
    first_rows_ptr,
    masked_counts_ptr,
    block_ptr,
    offset_ptr,
    row_ptr,
    number,
    size,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    block = tl.program_id(0)  # grid (B,)
    _, listed, place, number_listed, first, count = _listed_of(
        *(masked_ptr, stride, slots_ptr, starts_ptr, lengths_ptr, masked_counts_ptr, number, BLOCK_B, BLOCK_L)
    )
    offset = tl.arange(0, BLOCK_L)
    tl.store(block_ptr + place, block.to(tl.int64), mask=listed)
    tl.store(offset_ptr + place, offset.to(tl.int64), mask=listed)
    tl.store(row_ptr + place, tl.load(first_rows_ptr + block) + offset, mask=listed)
    # the rows that are left over; the last block has all to the end
    zero = tl.zeros([BLOCK_L], tl.int64)
    end = tl.where(block == number - 1, size, first + count)
    for start in tl.range(first + number_listed, end, BLOCK_L):
        place = start + offset
        tl.store(block_ptr + place, zero, mask=place < end)
        tl.store(offset_ptr + place, zero, mask=place < end)
        tl.store(row_ptr + place, zero + tl.load(first_rows_ptr), mask=place < end)


@triton.jit
def _unmask_kernel(
    scores_ptr,
    token_ids_ptr,
    finite_ptr,
    result_ptr,
    width,
    tokens_ptr,
    masked_ptr,
    stride,
    broken_ptr,
    rules_ptr,
    rules_stride,
    values_ptr,
    values_stride,
    slots_ptr,
    starts_ptr,
    lengths_ptr,
    counts_ptr,
    last_steps_ptr,
    masked_counts_ptr,
    number,
    SELECT: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    block = tl.program_id(0)  # grid (B,)
    slot = tl.load(slots_ptr + block)
    if tl.load(rules_ptr + slot * rules_stride) != RULE:
        return
    masked, listed, place, number_listed, first, _ = _listed_of(
        *(masked_ptr, stride, slots_ptr, starts_ptr, lengths_ptr, masked_counts_ptr, number, BLOCK_B, BLOCK_L)
    )
    finite = tl.load(finite_ptr + place, mask=listed, other=1) != 0
    broken = (tl.load(broken_ptr + slot) != 0) | (tl.max((listed & ~finite).to(tl.int32), axis=0) > 0)

    # the highest score goes first, and among equal ones the lowest position
    score = tl.load(scores_ptr + place, mask=listed, other=0.0)
    ahead = tl.zeros([BLOCK_L], tl.int32)  # how many listed positions go first
    entropy = tl.zeros([BLOCK_L], tl.float64)  # their sum of entropies
    for start in tl.range(0, number_listed, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        other = tl.load(scores_ptr + first + n, mask=n < number_listed, other=0.0)
        before = (first + n)[None, :] < place[:, None]
        goes_first = (other[None, :] > score[:, None]) | ((other[None, :] == score[:, None]) & before)
        goes_first &= (n < number_listed)[None, :]
        ahead += tl.sum(goes_first.to(tl.int32), axis=1)
        if SELECT == "entropy":
            entropy -= tl.sum(tl.where(goes_first, other.to(tl.float64)[None, :], 0.0), axis=1)

    value = tl.load(values_ptr + slot * values_stride).to(tl.float64, bitcast=True).to(tl.float32)
    if SELECT == "top":
        chosen = ahead < tl.load(counts_ptr + block)
    elif SELECT == "threshold":
        chosen = (ahead == 0) | (score >= value)
    else:
        # the longest run of the best of which each is enough
        tl.static_assert(SELECT == "factor" or SELECT == "entropy")
        if SELECT == "factor":
            enough = score >= 1 - tl.div_rn(value, (ahead + 2).to(tl.float32))
        else:
            enough = (entropy <= value.to(tl.float64)) & (tl.abs(score) < float("inf"))
        end = tl.min(tl.where(listed & (ahead > 0) & ~enough, ahead, 2 * BLOCK_L), axis=0)
        chosen = ahead < end
    reveal = listed & (chosen | (tl.load(last_steps_ptr + block) > 0)) & ~broken

    offset = tl.arange(0, BLOCK_L)
    inside = offset < tl.load(lengths_ptr + block)
    at = slot * stride + tl.load(starts_ptr + block) + offset
    token = tl.load(tokens_ptr + at, mask=inside, other=0)
    token = tl.where(reveal, tl.load(token_ids_ptr + place, mask=reveal, other=0), token)
    tl.store(tokens_ptr + at, token, mask=reveal)
    tl.store(masked_ptr + at, tl.zeros([BLOCK_L], tl.int1), mask=reveal)
    tl.store(broken_ptr + slot, broken)
    row = result_ptr + block.to(tl.int64) * (width + 2)
    tl.store(row, broken.to(tl.int64))
    tl.store(row + 1, tl.sum((masked & ~reveal).to(tl.int64), axis=0))
    tl.store(row + 2 + offset, token, mask=offset < width)
