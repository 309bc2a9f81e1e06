"""What the device stores about running sequences, one slot each, and about the blocks that a step works on."""

from enum import IntEnum
from typing import NamedTuple

import torch


class Rank(IntEnum):
    """What positions are scored by; the highest score goes first, and among equal ones the lowest position.

    CONFIDENCE: minus the probability of all other tokens, which falls as the token's own rises. CERTAINTY: minus the
    entropy of the distribution, in nats. RANDOM: a uniform number. POSITION: the leftmost first.
    """

    CONFIDENCE = 0
    CERTAINTY = 1
    RANDOM = 2
    POSITION = 3


class Choice(IntEnum):
    """Which of the ranked positions are revealed.

    TOP and SCHEDULED_THRESHOLD choose in each block. The others choose among all open blocks of a sequence as if these
    were one. All but TOP have an option. If a block must reveal a position and gets none, its best one is revealed.

    TOP: the best positions, as many as the schedule says (LLaDA's remasking, arXiv 2502.09992, section 2.4).
    THRESHOLD: all whose score is at least the option, and always the best one (confidences: Fast-dLLM, arXiv
    2505.22618, section 3.3; entropies: d3LLM's repository).
    FACTOR: the best one, then the i-th best, i >= 2, as long as its confidence is at least 1 - option / (i + 1)
    (Fast-dLLM's section 3.3: with option 1 its Theorem 1, for each n).
    ENTROPY: the most certain positions whose entropies, without the largest, sum to at most the option (arXiv
    2505.24857).
    SCHEDULED_THRESHOLD: all whose score is above the option, but at least the best ones, as many as the schedule says
    (LLaDA2.0, arXiv 2512.15745).
    """

    TOP = 0
    THRESHOLD = 1
    FACTOR = 2
    ENTROPY = 3
    SCHEDULED_THRESHOLD = 4


# For these, the schedule gives each block's number of positions.
OF_A_BLOCK = (Choice.TOP, Choice.SCHEDULED_THRESHOLD)


class SlotOptions(NamedTuple):
    """The options of each slot's request on the device: [slots] int64 of any stride, floats as their bits.

    rank, choice: the unmasking rule; value: the rule's option, a float64. temperature: a float64. seed: as int64.
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
    """The state of each running sequence on the device, one row (slot) each; the last slot is scrap.

    tokens [slots, M] int64: of each position. masked [slots, M] bool: which are still to be revealed. broken [slots]
    bool: whether the logits were NaN or infinite. options [slots, K] int64: the columns of SlotOptions.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    broken: torch.Tensor
    options: torch.Tensor


class Blocks(NamedTuple):
    """The blocks that a step works on, each field [B] int64; the blocks of a sequence are adjacent. Surplus entries
    have no positions, are each a window of its own, and belong to the scrap slot.

    Fields that change in each step of a block. steps: the denoising step in it. counts: how many positions the schedule
    reveals; for rules without a schedule, 1 if at least one must be revealed, else 0. last_steps: 1 if all must be
    revealed, else 0. masked_counts: how many positions are masked as far as the host knows, 0 if none can be revealed.
    A broken sequence has more; one whose last step revealed some before it was interrupted, as by Ctrl-C, has fewer.
    first_masked: the sum of the masked_counts of the blocks before.

    Fields that do not change. slots. starts, lengths: the block's first position, and its number of positions.
    first_rows: the row of that position in the forward, in which a block's rows are adjacent. output_starts: output
    tokens before the block. result_starts: the sum of the lengths of the blocks before. window_firsts, window_lasts:
    the indices of the sequence's first and last block.
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
    window_firsts: torch.Tensor
    window_lasts: torch.Tensor


class MaskedRows(NamedTuple):
    """The first masked_counts masked positions of each block, block after block, each field [N] int64: the row in the
    forward and the place in the block. Where fewer are masked, and at the end, the row is 0 and the place -1 (none)."""

    row: torch.Tensor
    place: torch.Tensor


class Places(NamedTuple):
    """The places of the blocks, [B, L], L the longest length. where: slot and position; places past a block's length
    are in the scrap slot. masked: whether the place is masked. listed: whether `masked_rows` lists it. row: its row in
    that list, 0 for a place that is not listed."""

    where: tuple[torch.Tensor, torch.Tensor]
    masked: torch.Tensor
    listed: torch.Tensor
    row: torch.Tensor


def without_padding(blocks: Blocks) -> Blocks:
    """The blocks without surplus entries, or one if there is none: for the twins, which need not be captured."""
    number = max(1, int(blocks.lengths.count_nonzero()))
    return Blocks(*(column[:number] for column in blocks))


def places_of(state: SlotState, blocks: Blocks) -> Places:
    offsets = torch.arange(int(blocks.lengths.max()), device=blocks.starts.device)
    inside = offsets < blocks.lengths[:, None]
    scrap = len(state.tokens) - 1
    where = blocks.slots[:, None].where(inside, scrap), (blocks.starts[:, None] + offsets).where(inside, 0)
    masked = state.masked[where] & inside
    rank = masked.cumsum(dim=-1)
    listed = masked & (rank <= blocks.masked_counts[:, None])
    return Places(where, masked, listed, (blocks.first_masked[:, None] + rank - 1).where(listed, 0))


def check_contiguous(state: SlotState, blocks: Blocks) -> None:
    """Raises ValueError if a tensor is not contiguous, as the kernels expect."""
    if not all(tensor.is_contiguous() for tensor in (*state, *blocks)):
        raise ValueError("the state of the slots and what describes the blocks must be contiguous")
