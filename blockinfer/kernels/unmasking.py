"""From the predictions of a step's masked rows back to its blocks: what each sequence's rule reveals.

One kernel; PyTorch would launch about forty, each of which takes longer to launch than to run. Each block's rule is
data, and blocks may have any length, so that the same kernel serves every step.
"""

import torch
import triton
import triton.language as tl

from blockinfer.kernels import philox
from blockinfer.kernels.backend import begin, launch_options, runs_triton
from blockinfer.kernels.confidence import Confidence
from blockinfer.kernels.slots import (
    OF_A_BLOCK,
    Blocks,
    Choice,
    MaskedRows,
    Rank,
    SlotOptions,
    SlotState,
    check_contiguous,
    places_of,
    without_padding,
)


def unmask(predicted: Confidence, rows: MaskedRows, state: SlotState, blocks: Blocks, result: torch.Tensor) -> None:
    """Reveals in each block what its sequence's rule chooses, and all where it is the last step.

    predicted [N] and rows [N] in the order of `masked_rows`. A sequence with a row that is not finite is broken, and
    reveals nothing any more. state is written, and result, int64 of at least 2 B and the sum of the lengths: of each
    block whether the sequence is broken and how many positions are masked still, and then the tokens of all blocks.
    """
    implementation = unmask_triton if runs_triton(state.tokens) else unmask_torch
    implementation(predicted, rows, state, blocks, result)


def unmask_torch(
    predicted: Confidence, rows: MaskedRows, state: SlotState, blocks: Blocks, result: torch.Tensor
) -> None:
    """The twin."""
    number, blocks = len(blocks.slots), without_padding(blocks)
    where, masked, listed, row = places_of(state, blocks)
    options = SlotOptions(*state.options[blocks.slots].unbind(1))
    broken = _of_windows(state.broken[blocks.slots] | (listed & ~predicted.finite[row]).any(dim=-1), blocks)
    # options that no sequence uses are skipped: here the launch of an operation costs as much as its work
    ranks, choices = options.rank[:, None], options.choice[:, None]
    ranks_there, choices_there = set(options.rank.tolist()), set(options.choice.tolist())
    places = torch.arange(masked.shape[1], device=masked.device)
    scores = -predicted.others[row]
    if Rank.CERTAINTY in ranks_there:
        scores = torch.where(ranks == Rank.CERTAINTY, -predicted.entropy[row], scores)
    if Rank.RANDOM in ranks_there:
        positions = blocks.output_starts[:, None] + places
        drawn = philox.uniform(
            options.seed[:, None], philox.RULE_NOISE, positions, blocks.steps[:, None], torch.zeros_like(positions)
        )
        # tokens without a share in the softmax go last, also for a random rule
        last = predicted.others[row].isposinf()
        scores = torch.where(ranks == Rank.RANDOM, drawn.float().masked_fill(last, -torch.inf), scores)
    if Rank.POSITION in ranks_there:
        scores = torch.where(ranks == Rank.POSITION, -places.float(), scores)
    best = _top(scores, listed, blocks.counts)
    reveal = best
    if Choice.SCHEDULED_THRESHOLD in choices_there:
        reveal = best | (_above(scores, listed, _values(options)) & (choices == Choice.SCHEDULED_THRESHOLD))
    if choices_there.difference(OF_A_BLOCK):
        of_window = _chosen_of_windows(predicted, rows, options, blocks)
        others = listed & of_window.gather(1, _row_in_window(row, blocks))
        of_block = sum(choices == choice for choice in OF_A_BLOCK).bool()
        reveal = torch.where(of_block, reveal, others | (best & ~others.any(-1, keepdim=True)))
    reveal = (reveal | (listed & (blocks.last_steps > 0)[:, None])) & ~broken[:, None]
    tokens = torch.where(reveal, predicted.token_ids[row], state.tokens[where])
    masked &= ~reveal
    state.tokens[where], state.masked[where] = tokens, masked
    state.broken[blocks.slots] = broken
    result[: 2 * len(blocks.slots)] = torch.stack([broken.long(), masked.sum(dim=-1)], dim=1).flatten()
    inside = places < blocks.lengths[:, None]
    result[(2 * number + blocks.result_starts[:, None] + places)[inside]] = tokens[inside]


def _of_windows(flags: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """flags [B] -> whether the flag of any block of the same sequence is set, [B]."""
    found = torch.zeros_like(flags).index_put_((blocks.window_firsts,), flags, accumulate=True)
    return found[blocks.window_firsts]


def _row_in_window(row: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """row [B, L]: of the masked rows -> their indices in their windows; 0 for those that are not listed."""
    return (row - blocks.first_masked[blocks.window_firsts][:, None]).clamp(min=0)


def _chosen_of_windows(predicted: Confidence, rows: MaskedRows, options: SlotOptions, blocks: Blocks) -> torch.Tensor:
    """[B, W], W at least the masked rows of the largest window: which rows of each block's window its rule chooses, if
    it has no schedule."""
    first, last = (blocks.first_masked[edge] for edge in (blocks.window_firsts, blocks.window_lasts))
    count = last + blocks.masked_counts[blocks.window_lasts] - first
    number = torch.arange(max(1, int(count.max())), device=first.device)
    row = (first[:, None] + number).where(number < count[:, None], 0)
    listed = (number < count[:, None]) & (rows.place[row] >= 0)
    scores = torch.where(options.rank[:, None] == Rank.CERTAINTY, -predicted.entropy[row], -predicted.others[row])
    chosen = torch.zeros_like(listed)
    for choice, choose in CHOICES.items():
        if choice not in OF_A_BLOCK and (options.choice == choice).any():
            chosen |= (options.choice == choice)[:, None] & choose(scores, listed, blocks.counts, _values(options))
    return chosen


def _values(options: SlotOptions) -> torch.Tensor:
    """The rules' options, float64."""
    return options.value.contiguous().view(torch.float64)


def _order(scores: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Places [B, L] by falling score, the unmasked ones last, whatever their scores."""
    lowest = torch.finfo(scores.dtype).min
    return scores.clamp(min=lowest).masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def _first(order: torch.Tensor, masked: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The first count [B] places of an order [B, L], as far as they are masked."""
    places = torch.arange(order.shape[-1], device=order.device)
    return torch.zeros_like(masked).scatter_(-1, order, places < count[:, None]) & masked


def _top(scores, masked, count, value=None):
    return _first(_order(scores, masked), masked, count)


def _threshold(scores, masked, count, value):
    return _top(scores, masked, torch.ones_like(count)) | (masked & (scores >= value.float()[:, None]))


def _scheduled_threshold(scores, masked, count, value):
    return _top(scores, masked, count) | _above(scores, masked, value)


def _above(scores, masked, value):
    return masked & (scores > value.float()[:, None])


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
CHOICES = {
    Choice.TOP: _top,
    Choice.THRESHOLD: _threshold,
    Choice.FACTOR: _factor,
    Choice.ENTROPY: _entropy,
    Choice.SCHEDULED_THRESHOLD: _scheduled_threshold,
}


def unmask_triton(
    predicted: Confidence,
    rows: MaskedRows,
    state: SlotState,
    blocks: Blocks,
    result: torch.Tensor,
    block: int = 64,
) -> None:
    """The kernel, a program for each block, which counts for each of its rows, `block` at a time, those that go first.

    A rule without a schedule ranks the rows of all open blocks of a sequence: each of its programs does so, for itself.

    Raises ValueError where a tensor is not contiguous.
    """
    check_contiguous(state, blocks)
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


# The columns of SlotOptions.
_OPTIONS = tl.constexpr(len(SlotOptions._fields))
_RANK, _CHOICE, _VALUE, _SEED = (
    tl.constexpr(SlotOptions._fields.index(name)) for name in ("rank", "choice", "value", "seed")
)
_CONFIDENCE, _CERTAINTY, _RANDOM, _POSITION = (tl.constexpr(int(rank)) for rank in Rank)
_TOP, _THRESHOLD, _FACTOR, _ENTROPY, _SCHEDULED_THRESHOLD = (tl.constexpr(int(choice)) for choice in Choice)


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
    window_firsts_ptr,
    window_lasts_ptr,
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
    window_first = tl.load(first_masked_ptr + tl.load(window_firsts_ptr + block))
    window_last = tl.load(window_lasts_ptr + block)
    window_end = tl.load(first_masked_ptr + window_last) + tl.load(masked_counts_ptr + window_last)
    scheduled, reveal_all = tl.load(counts_ptr + block), tl.load(last_steps_ptr + block) != 0
    length, position = tl.load(lengths_ptr + block), tl.load(output_starts_ptr + block)
    state_row = slot * stride + tl.load(starts_ptr + block)
    tokens_at = result_ptr + 2 * tl.num_programs(0) + tl.load(result_starts_ptr + block)
    # the rows that are ranked
    ranked_first, ranked_end = first, first + count
    if (choice != _TOP) & (choice != _SCHEDULED_THRESHOLD):
        ranked_first, ranked_end = window_first, window_end
    # no kernel of the step writes what was read so far, so it is read while the previous one still runs
    begin(PDL)
    if length == 0:
        return
    n = tl.arange(0, BLOCK)

    broken = tl.load(broken_ptr + slot) != 0
    for start in tl.range(window_first, window_end, BLOCK):
        at = start + n
        inside = at < window_end
        place = tl.load(place_ptr + at, mask=inside, other=-1)
        listed = place >= 0
        others = tl.load(others_ptr + at, mask=listed, other=0.0)
        score = -others
        if rank == _CERTAINTY:
            score = -tl.load(entropy_ptr + at, mask=listed, other=0.0)
        # the schedule's ranks, which count within a block
        if rank == _RANDOM:
            drawn = philox.uniform_triton(seed, RULE_NOISE, position + place, step, place * 0)
            score = tl.where(others == float("inf"), -float("inf"), drawn.to(tl.float32))
        if rank == _POSITION:
            score = -place.to(tl.float32)
        is_ranked = inside & (at >= ranked_first) & (at < ranked_end)
        tl.store(scores_ptr + at, tl.where(listed, score, -float("inf")), mask=is_ranked)
        finite = tl.load(finite_ptr + at, mask=listed, other=1) != 0
        broken |= tl.max((listed & ~finite).to(tl.int32), axis=0) > 0
    tl.debug_barrier()

    # how many rows go before each row: positions rise from row to row, so the first of equal scores goes first
    end = count * 0 + 2**31 - 1  # the number of chosen rows, if they are the ranking's first ones
    for start in tl.range(ranked_first, ranked_end, BLOCK):
        row = start + n
        score = tl.load(scores_ptr + row, mask=row < ranked_end, other=-float("inf"))
        ahead = tl.zeros([BLOCK], tl.int32)
        entropy = tl.zeros([BLOCK], tl.float64)  # the sum of the entropies of the rows ahead
        for other_start in tl.range(ranked_first, ranked_end, BLOCK):
            other_row = other_start + n
            other = tl.load(scores_ptr + other_row, mask=other_row < ranked_end, other=-float("inf"))[None, :]
            goes_first = (other > score[:, None]) | ((other == score[:, None]) & (other_row[None, :] < row[:, None]))
            goes_first &= (other_row < ranked_end)[None, :]
            ahead += tl.sum(goes_first.to(tl.int32), axis=1)
            if choice == _ENTROPY:
                entropy -= tl.sum(tl.where(goes_first, other, 0.0).to(tl.float64), axis=1)
        tl.store(ahead_ptr + row, ahead, mask=row < ranked_end)
        if (choice == _FACTOR) | (choice == _ENTROPY):
            enough = (entropy <= value.to(tl.float32).to(tl.float64)) & (tl.abs(score) < float("inf"))
            if choice == _FACTOR:
                enough = score >= (-value / (ahead + 2).to(tl.float64)).to(tl.float32)
            is_cut = (row < ranked_end) & (ahead > 0) & ~enough
            end = tl.minimum(end, tl.min(tl.where(is_cut, ahead, 2**31 - 1), axis=0))
    tl.debug_barrier()
    if (choice == _TOP) | (choice == _SCHEDULED_THRESHOLD):
        end = scheduled
    lowest = value.to(tl.float32)

    # if a block must reveal a row and none of its own is among those chosen in the window, its best one
    best = count * 0 - 1
    if (choice != _TOP) & (scheduled > 0) & (window_end - window_first > count):
        best = count * 0 + 2**31 - 1
        for start in tl.range(first, first + count, BLOCK):
            at = start + n
            listed = tl.load(place_ptr + at, mask=at < first + count, other=-1) >= 0
            ahead = tl.load(ahead_ptr + at, mask=listed, other=2**31 - 1).to(tl.int64)
            score = tl.load(scores_ptr + at, mask=listed, other=-float("inf"))
            best = tl.minimum(best, tl.min(ahead, axis=0))
            chosen = listed & _is_chosen(choice, ahead, score, end, lowest)
            # below every row, permanently
            best = tl.where(tl.max(chosen.to(tl.int32), axis=0) > 0, -1, best)

    for start in tl.range(first, first + count, BLOCK):
        at = start + n
        inside = at < first + count
        place = tl.load(place_ptr + at, mask=inside, other=-1)
        ahead = tl.load(ahead_ptr + at, mask=inside, other=0).to(tl.int64)
        score = tl.load(scores_ptr + at, mask=inside, other=0.0)
        chosen = _is_chosen(choice, ahead, score, end, lowest) | (ahead == best)
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


@triton.jit
def _is_chosen(choice, ahead, score, end, lowest):
    """ahead [N]: how many rows go first. end: of a run of the ranking. lowest: the score that a threshold asks for."""
    in_run = (ahead < end) | ((choice == _SCHEDULED_THRESHOLD) & (score > lowest))
    return tl.where(choice == _THRESHOLD, (ahead == 0) | (score >= lowest), in_run)
