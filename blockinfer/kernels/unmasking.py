"""From the masked positions of a step's blocks to the rows that the LM head needs, and from its predictions back.

Two kernels for what PyTorch would launch some eighty for, each of them longer in coming than in running. Each block's
rule is data, and blocks may have any length, so that the same two kernels serve every step.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from blockinfer.kernels import philox
from blockinfer.kernels.backend import begin, launch_options, runs_triton
from blockinfer.kernels.confidence import Confidence, RowOptions


class Rank(IntEnum):
    """What a score is; the highest goes first, and among equal ones the lowest position.

    CONFIDENCE: minus the probability of all other tokens, which falls as the token's own rises. CERTAINTY: minus the
    entropy of the distribution, in nats. RANDOM: a uniform number. POSITION: the leftmost first.
    """

    CONFIDENCE = 0
    CERTAINTY = 1
    RANDOM = 2
    POSITION = 3


class Choice(IntEnum):
    """Which positions, ranked so, are revealed.

    TOP: the scheduled number of the best (LLaDA's remasking, arXiv 2502.09992, section 2.4). The others have an option.
    THRESHOLD: all whose confidence is at least the option, and always the best one (Fast-dLLM, arXiv 2505.22618,
    section 3.3). FACTOR: the longest run of the n best in which the i-th's confidence is at least 1 - option / (i + 1),
    for i >= 2, and at least one (the same section: with option 1 its Theorem 1, for each n). ENTROPY: the most certain
    positions whose entropies, but for the largest, sum to at most the option (arXiv 2505.24857).
    """

    TOP = 0
    THRESHOLD = 1
    FACTOR = 2
    ENTROPY = 3


class SlotOptions(NamedTuple):
    """What each slot's request asks for, as the device keeps it: [slots] int64 of any stride, floats as their bits.

    rank, choice: its unmasking rule; value: the rule's option, a float64. temperature: a float64. seed: as int64.
    forbid_eos, eos_last: as in `kernels.confidence.RowOptions`, 0 or 1.
    """

    rank: torch.Tensor
    choice: torch.Tensor
    value: torch.Tensor
    temperature: torch.Tensor
    seed: torch.Tensor
    forbid_eos: torch.Tensor
    eos_last: torch.Tensor


class SlotState(NamedTuple):
    """What the device keeps of each running sequence, in a row of these, its slot; the last slot is scrap.

    tokens [slots, M] int64, at each position; masked [slots, M] bool, what is still to be revealed; broken [slots]
    bool, whether its logits were NaN or infinite; options [slots, K] int64: the columns of SlotOptions.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    broken: torch.Tensor
    options: torch.Tensor


class Blocks(NamedTuple):
    """The blocks that a step works on, one a sequence, each [B] int64. Where there are fewer, the rest is 0, and all of
    the scrap slot.

    What changes from step to step of a block: steps: the denoising step in it; counts: how many positions the schedule
    reveals; last_steps: whether it must reveal all, 0 or 1; masked_counts: how many positions are masked as far as the
    host knows: a broken sequence has more, and one whose last step revealed and was then cut short, as by Ctrl-C, has
    fewer; first_masked: the sum of those of the blocks before.

    What does not: slots; starts and lengths: the block's first position and how many it has; first_rows: the row of
    that position in the forward, where a block's rows follow each other; output_starts: output tokens before the block;
    result_starts: the sum of the lengths of the blocks before.
    """

    steps: torch.Tensor
    counts: torch.Tensor
    last_steps: torch.Tensor
    masked_counts: torch.Tensor
    first_masked: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    first_rows: torch.Tensor
    output_starts: torch.Tensor
    result_starts: torch.Tensor


class MaskedRows(NamedTuple):
    """Of each block masked_counts masked positions, the first ones, block after block, each [N] int64: the row in the
    forward and the place in the block. Where fewer are masked, and at the end, row 0 and place -1, which is none."""

    row: torch.Tensor
    place: torch.Tensor


def masked_rows(state: SlotState, blocks: Blocks, size: int) -> tuple[MaskedRows, RowOptions]:
    """size: N, at least the sum of blocks.masked_counts. The options are each row's; those of no place are 0."""
    implementation = masked_rows_triton if runs_triton(state.tokens) else masked_rows_torch
    return implementation(state, blocks, size)


def unmask(predicted: Confidence, rows: MaskedRows, state: SlotState, blocks: Blocks, result: torch.Tensor) -> None:
    """Reveals in each block what its sequence's rule chooses, and all where it is the last step.

    predicted [N] and rows [N] in the order of `masked_rows`. A sequence with a row that is not finite is broken, and
    reveals nothing any more. state is written, and result, int64 of at least 2 B and the sum of the lengths: of each
    block whether the sequence is broken and how many positions are masked still, and then the tokens of all blocks.
    """
    implementation = unmask_triton if runs_triton(state.tokens) else unmask_torch
    implementation(predicted, rows, state, blocks, result)


def masked_rows_torch(state: SlotState, blocks: Blocks, size: int) -> tuple[MaskedRows, RowOptions]:
    """The twin."""
    where = _places(state, blocks)
    listed, at = where.listed, where.row[where.listed]
    block, offset = listed.nonzero().unbind(1)
    rows = MaskedRows(*torch.tensor([[0], [-1]], device=at.device).repeat(1, size))
    rows.place[at] = offset
    rows.row[at] = blocks.first_rows[block] + offset
    options = SlotOptions(*state.options.unbind(1))
    slot = blocks.slots[block]

    def of_rows(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(size, dtype=values.dtype, device=at.device).index_copy_(0, at, values)

    return rows, RowOptions(
        temperature=of_rows(options.temperature[slot]).view(torch.float64),
        seed=of_rows(options.seed[slot]),
        position=of_rows(blocks.output_starts[block] + offset),
        step=of_rows(blocks.steps[block]),
        forbid_eos=of_rows(options.forbid_eos[slot] > 0),
        eos_last=of_rows(options.eos_last[slot] > 0),
    )


def unmask_torch(
    predicted: Confidence, rows: MaskedRows, state: SlotState, blocks: Blocks, result: torch.Tensor
) -> None:
    """The twin."""
    where, masked, listed, row = _places(state, blocks)
    options = SlotOptions(*state.options[blocks.slots].unbind(1))
    broken = state.broken[blocks.slots] | (listed & ~predicted.finite[row]).any(dim=-1)
    ranks, choices = options.rank[:, None], options.choice[:, None]
    places = torch.arange(masked.shape[1], device=masked.device)
    positions = blocks.output_starts[:, None] + places
    drawn = philox.uniform(
        options.seed[:, None], philox.RULE_NOISE, positions, blocks.steps[:, None], torch.zeros_like(positions)
    )
    scores = -predicted.others[row]
    scores = torch.where(ranks == Rank.CERTAINTY, -predicted.entropy[row], scores)
    # what has no share in the softmax goes last, at random too
    last = predicted.others[row].isposinf()
    scores = torch.where(ranks == Rank.RANDOM, drawn.float().masked_fill(last, -torch.inf), scores)
    scores = torch.where(ranks == Rank.POSITION, -places.float(), scores)
    value = options.value.contiguous().view(torch.float64)
    reveal = torch.zeros_like(masked)
    for choice, chosen in CHOICES.items():
        if (choices == choice).any():
            reveal |= (choices == choice) & chosen(scores, listed, blocks.counts, value)
    reveal |= listed & (blocks.last_steps > 0)[:, None]
    reveal &= ~broken[:, None]
    tokens = torch.where(reveal, predicted.token_ids[row], state.tokens[where])
    masked &= ~reveal
    state.tokens[where], state.masked[where] = tokens, masked
    state.broken[blocks.slots] = broken
    number = len(blocks.slots)
    result[: 2 * number] = torch.stack([broken.long(), masked.sum(dim=-1)], dim=1).flatten()
    inside = places < blocks.lengths[:, None]
    result[(2 * number + blocks.result_starts[:, None] + places)[inside]] = tokens[inside]


def _order(scores: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Places [B, L] by falling score, the unmasked ones last, whatever their scores."""
    lowest = torch.finfo(scores.dtype).min
    return scores.clamp(min=lowest).masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def _first(order: torch.Tensor, masked: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The first count [B] places of an order [B, L], as far as they are masked."""
    places = torch.arange(order.shape[-1], device=order.device)
    return torch.zeros_like(masked).scatter_(-1, order, places < count[:, None]) & masked


def _top(scores, masked, count, value):
    return _first(_order(scores, masked), masked, count)


def _threshold(scores, masked, count, value):
    best = _first(_order(scores, masked), masked, torch.ones_like(count))
    return best | (masked & (scores >= (value - 1).float()[:, None]))


def _factor(scores, masked, count, value):
    order = _order(scores, masked)
    ranks = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    enough = scores.gather(-1, order) >= (-value[:, None] / (ranks + 1)).float()
    enough[:, 0] = True
    return _first(order, masked, enough.cumprod(dim=-1).sum(dim=-1))


def _entropy(scores, masked, count, value):
    order = _order(scores, masked)
    entropy = -scores.gather(-1, order).double()
    before = torch.cat([torch.zeros_like(entropy[:, :1]), entropy[:, :-1].cumsum(dim=-1)], dim=-1)
    enough = (before <= value.float()[:, None]) & entropy.isfinite()
    enough[:, 0] = True
    return _first(order, masked, enough.cumprod(dim=-1).sum(dim=-1))


# The twins of the choices: (scores [B, L] float32, masked [B, L], count [B], value [B] float64) -> what is revealed.
CHOICES = {Choice.TOP: _top, Choice.THRESHOLD: _threshold, Choice.FACTOR: _factor, Choice.ENTROPY: _entropy}


class _Places(NamedTuple):
    """Of the blocks' places [B, L], L the longest: slot and position, those past a length in the scrap slot; whether it
    is masked; whether `masked_rows` lists it, and there as which row, which is 0 for what is not listed."""

    where: tuple[torch.Tensor, torch.Tensor]
    masked: torch.Tensor
    listed: torch.Tensor
    row: torch.Tensor


def _places(state: SlotState, blocks: Blocks) -> _Places:
    offsets = torch.arange(int(blocks.lengths.max()), device=blocks.starts.device)
    inside = offsets < blocks.lengths[:, None]
    scrap = len(state.tokens) - 1
    where = blocks.slots[:, None].where(inside, scrap), (blocks.starts[:, None] + offsets).where(inside, 0)
    masked = state.masked[where] & inside
    rank = masked.cumsum(dim=-1)
    listed = masked & (rank <= blocks.masked_counts[:, None])
    return _Places(where, masked, listed, (blocks.first_masked[:, None] + rank - 1).where(listed, 0))


def masked_rows_triton(state: SlotState, blocks: Blocks, size: int, block: int = 128) -> tuple[MaskedRows, RowOptions]:
    """The kernel, a program for each block, which walks its places `block` at a time, and one for the rows at the end.

    Raises ValueError where the state or the blocks are not contiguous.
    """
    _check(state, blocks)
    new = dict(device=state.tokens.device)
    rows = MaskedRows(*(torch.empty(size, dtype=torch.int64, **new) for _ in range(2)))
    wide, narrow = [torch.float64, *[torch.int64] * 3], [torch.bool] * 2
    options = RowOptions(*(torch.empty(size, dtype=dtype, **new) for dtype in wide + narrow))
    number = len(blocks.slots)
    _masked_rows_kernel[(number + 1,)](
        state.masked,
        state.masked.stride(0),
        state.options,
        *blocks,
        *rows,
        *options,
        number,
        size,
        OPTIONS=_OPTIONS,
        BLOCK=block,
        **launch_options(state.tokens.device),
    )
    return rows, options


def unmask_triton(
    predicted: Confidence,
    rows: MaskedRows,
    state: SlotState,
    blocks: Blocks,
    result: torch.Tensor,
    block: int = 64,
) -> None:
    """The kernel, a program for each block, which counts for each of its rows, `block` at a time, those that go first.

    Raises ValueError where a tensor is not contiguous.
    """
    _check(state, blocks)
    if not all(tensor.is_contiguous() for tensor in (*predicted, *rows, result)):
        raise ValueError("what is predicted, the rows and result must be contiguous")
    size, device = len(rows.row), state.tokens.device
    scores = torch.empty(size, dtype=torch.float32, device=device)
    ahead = torch.empty(size, dtype=torch.int32, device=device)
    _unmask_kernel[(len(blocks.slots),)](
        *predicted,
        *(rows.place, scores, ahead, result),
        *(state.tokens, state.masked, state.tokens.stride(0), state.broken, state.options),
        *blocks,
        OPTIONS=_OPTIONS,
        RULE_NOISE=philox.RULE_NOISE,
        BLOCK=block,
        **launch_options(device),
    )


def _check(state: SlotState, blocks: Blocks) -> None:
    if not all(tensor.is_contiguous() for tensor in (*state, *blocks)):
        raise ValueError("the state of the slots and what describes the blocks must be contiguous")


_OPTIONS = tl.constexpr(len(SlotOptions._fields))
_RANK, _CHOICE, _VALUE, _TEMPERATURE, _SEED, _FORBID_EOS, _EOS_LAST = (tl.constexpr(i) for i in range(_OPTIONS.value))
_CONFIDENCE, _CERTAINTY, _RANDOM, _POSITION = (tl.constexpr(int(rank)) for rank in Rank)
_TOP, _THRESHOLD, _FACTOR, _ENTROPY = (tl.constexpr(int(choice)) for choice in Choice)


@triton.jit
def _masked_rows_kernel(
    masked_ptr,
    stride,
    options_ptr,
    steps_ptr,
    counts_ptr,
    last_steps_ptr,
    masked_counts_ptr,
    first_masked_ptr,
    slots_ptr,
    starts_ptr,
    lengths_ptr,
    first_rows_ptr,
    output_starts_ptr,
    result_starts_ptr,
    row_ptr,
    place_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    step_ptr,
    forbid_eos_ptr,
    eos_last_ptr,
    number,
    size,
    OPTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    block = tl.program_id(0)  # grid (B + 1,)
    n = tl.arange(0, BLOCK)
    if block == number:
        # what is left over at the end
        next_row = tl.load(first_masked_ptr + number - 1) + tl.load(masked_counts_ptr + number - 1)
        end = next_row * 0 + size
    else:
        slot = tl.load(slots_ptr + block)
        start = tl.load(starts_ptr + block)
        length = tl.load(lengths_ptr + block)
        first_row = tl.load(first_rows_ptr + block)
        position = tl.load(output_starts_ptr + block)
        step = tl.load(steps_ptr + block)
        option = options_ptr + slot * OPTIONS
        temperature = tl.load(option + _TEMPERATURE).to(tl.float64, bitcast=True)
        seed = tl.load(option + _SEED)
        forbid_eos = tl.load(option + _FORBID_EOS) != 0
        eos_last = tl.load(option + _EOS_LAST) != 0
        next_row = tl.load(first_masked_ptr + block)
        end = next_row + tl.load(masked_counts_ptr + block)
        zero = tl.zeros([BLOCK], tl.int64)
        for first in tl.range(0, length, BLOCK):
            place = first + n
            masked = tl.load(masked_ptr + slot * stride + start + place, mask=place < length, other=0) != 0
            at = next_row + tl.cumsum(masked.to(tl.int32), axis=0) - 1
            listed = masked & (at < end)
            tl.store(row_ptr + at, first_row + place, mask=listed)
            tl.store(place_ptr + at, zero + place, mask=listed)
            tl.store(temperature_ptr + at, zero.to(tl.float64) + temperature, mask=listed)
            tl.store(seed_ptr + at, zero + seed, mask=listed)
            tl.store(position_ptr + at, position + place, mask=listed)
            tl.store(step_ptr + at, zero + step, mask=listed)
            tl.store(forbid_eos_ptr + at, (zero == 0) & forbid_eos, mask=listed)
            tl.store(eos_last_ptr + at, (zero == 0) & eos_last, mask=listed)
            next_row += tl.sum(listed.to(tl.int64), axis=0)
    nothing = tl.zeros([BLOCK], tl.int64)
    for first in tl.range(next_row, end, BLOCK):
        at = first + n
        left = at < end
        tl.store(row_ptr + at, nothing, mask=left)
        tl.store(place_ptr + at, nothing - 1, mask=left)
        tl.store(temperature_ptr + at, nothing.to(tl.float64), mask=left)
        tl.store(seed_ptr + at, nothing, mask=left)
        tl.store(position_ptr + at, nothing, mask=left)
        tl.store(step_ptr + at, nothing, mask=left)
        tl.store(forbid_eos_ptr + at, nothing != 0, mask=left)
        tl.store(eos_last_ptr + at, nothing != 0, mask=left)


@triton.jit
def _unmask_kernel(
    token_ids_ptr,
    others_ptr,
    entropy_ptr,
    finite_ptr,
    place_ptr,
    scores_ptr,
    ahead_ptr,
    result_ptr,
    tokens_ptr,
    masked_ptr,
    stride,
    broken_ptr,
    options_ptr,
    steps_ptr,
    counts_ptr,
    last_steps_ptr,
    masked_counts_ptr,
    first_masked_ptr,
    slots_ptr,
    starts_ptr,
    lengths_ptr,
    first_rows_ptr,
    output_starts_ptr,
    result_starts_ptr,
    OPTIONS: tl.constexpr,
    RULE_NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    block = tl.program_id(0)  # grid (B,)
    slot = tl.load(slots_ptr + block)
    option = options_ptr + slot * OPTIONS
    rank, choice = tl.load(option + _RANK), tl.load(option + _CHOICE)
    value = tl.load(option + _VALUE).to(tl.float64, bitcast=True)
    seed, step = tl.load(option + _SEED), tl.load(steps_ptr + block)
    first, count = tl.load(first_masked_ptr + block), tl.load(masked_counts_ptr + block)
    scheduled, reveal_all = tl.load(counts_ptr + block), tl.load(last_steps_ptr + block) != 0
    length, position = tl.load(lengths_ptr + block), tl.load(output_starts_ptr + block)
    state_row = slot * stride + tl.load(starts_ptr + block)
    tokens_at = result_ptr + 2 * tl.num_programs(0) + tl.load(result_starts_ptr + block)
    # no kernel of the step makes what was read so far, so it is read while the one before still runs
    begin(PDL)
    if length == 0:
        return
    n = tl.arange(0, BLOCK)

    # the scores of the block's rows
    broken = tl.load(broken_ptr + slot) != 0
    for start in tl.range(0, count, BLOCK):
        at = first + start + n
        inside = start + n < count
        place = tl.load(place_ptr + at, mask=inside, other=-1)
        listed = place >= 0
        others = tl.load(others_ptr + at, mask=listed, other=0.0)
        score = -others
        if rank == _CERTAINTY:
            score = -tl.load(entropy_ptr + at, mask=listed, other=0.0)
        if rank == _RANDOM:
            drawn = philox.uniform_triton(seed, RULE_NOISE, position + place, step, place * 0)
            score = tl.where(others == float("inf"), -float("inf"), drawn.to(tl.float32))
        if rank == _POSITION:
            score = -place.to(tl.float32)
        tl.store(scores_ptr + at, tl.where(listed, score, -float("inf")), mask=inside)
        finite = tl.load(finite_ptr + at, mask=listed, other=1) != 0
        broken |= tl.max((listed & ~finite).to(tl.int32), axis=0) > 0
    tl.debug_barrier()

    # of each row, how many go first: the places rise from row to row, so among equal scores the first row does
    end = count * 0 + 2**31 - 1  # what is chosen of the ranking, where a run of it is
    for start in tl.range(0, count, BLOCK):
        row = start + n
        score = tl.load(scores_ptr + first + row, mask=row < count, other=-float("inf"))
        ahead = tl.zeros([BLOCK], tl.int32)
        entropy = tl.zeros([BLOCK], tl.float64)  # the sum of theirs
        for other_start in tl.range(0, count, BLOCK):
            other_row = other_start + n
            other = tl.load(scores_ptr + first + other_row, mask=other_row < count, other=-float("inf"))[None, :]
            goes_first = (other > score[:, None]) | ((other == score[:, None]) & (other_row[None, :] < row[:, None]))
            goes_first &= (other_row < count)[None, :]
            ahead += tl.sum(goes_first.to(tl.int32), axis=1)
            if choice == _ENTROPY:
                entropy -= tl.sum(tl.where(goes_first, other, 0.0).to(tl.float64), axis=1)
        tl.store(ahead_ptr + first + row, ahead, mask=row < count)
        if choice > _THRESHOLD:
            enough = (entropy <= value.to(tl.float32).to(tl.float64)) & (tl.abs(score) < float("inf"))
            if choice == _FACTOR:
                enough = score >= (-value / (ahead + 2).to(tl.float64)).to(tl.float32)
            end = tl.minimum(end, tl.min(tl.where((row < count) & (ahead > 0) & ~enough, ahead, 2**31 - 1), axis=0))
    tl.debug_barrier()

    for start in tl.range(0, count, BLOCK):
        at = first + start + n
        inside = start + n < count
        place = tl.load(place_ptr + at, mask=inside, other=-1)
        ahead = tl.load(ahead_ptr + at, mask=inside, other=0)
        chosen = ahead < end
        if choice == _TOP:
            chosen = ahead < scheduled
        if choice == _THRESHOLD:
            score = tl.load(scores_ptr + at, mask=inside, other=0.0)
            chosen = (ahead == 0) | (score >= (value - 1).to(tl.float32))
        reveal = (place >= 0) & (chosen | reveal_all) & ~broken
        token = tl.load(token_ids_ptr + at, mask=reveal, other=0)
        tl.store(tokens_ptr + state_row + place, token, mask=reveal)
        tl.store(masked_ptr + state_row + place, tl.zeros([BLOCK], tl.int1), mask=reveal)
    tl.store(broken_ptr + slot, broken)
    tl.debug_barrier()

    left = count * 0
    for start in tl.range(0, length, BLOCK):
        place = start + n
        inside = place < length
        left += tl.sum((tl.load(masked_ptr + state_row + place, mask=inside, other=0) != 0).to(tl.int64), axis=0)
        tl.store(tokens_at + place, tl.load(tokens_ptr + state_row + place, mask=inside, other=0), mask=inside)
    tl.store(result_ptr + 2 * block, broken.to(tl.int64))
    tl.store(result_ptr + 2 * block + 1, left)
