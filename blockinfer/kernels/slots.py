"""What the device keeps of running sequences, a slot each, and of the blocks that a step works on."""

from enum import IntEnum
from typing import NamedTuple

import torch


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

    TOP: the scheduled number of the best of each block (LLaDA's remasking, arXiv 2502.09992, section 2.4). The others
    have an option, and choose among all open blocks of a sequence as if these were one. THRESHOLD: all whose score is
    at least the option, and always the best one (of confidences Fast-dLLM, arXiv 2505.22618, section 3.3; of entropies
    d3LLM's repository). FACTOR: the longest run of the n best in which the i-th's confidence is at least
    1 - option / (i + 1), for i >= 2, and at least one (Fast-dLLM's section 3.3: with option 1 its Theorem 1, for each
    n). ENTROPY: the most certain positions whose entropies, but for the largest, sum to at most the option (arXiv
    2505.24857). SCHEDULED_THRESHOLD, of each block: all whose score is above the option, where they are as many as the
    schedule says, and else the so many best (LLaDA2.0, arXiv 2512.15745). Where a block must reveal one and got nothing
    by these, its best one is revealed.
    """

    TOP = 0
    THRESHOLD = 1
    FACTOR = 2
    ENTROPY = 3
    SCHEDULED_THRESHOLD = 4


# These count of each block what the schedule says.
OF_A_BLOCK = (Choice.TOP, Choice.SCHEDULED_THRESHOLD)


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
    """The blocks that a step works on, each [B] int64; those of a sequence follow each other. Where there are fewer,
    the rest is 0, each a window of its own, and all of the scrap slot.

    What changes from step to step of a block: steps: the denoising step in it; counts: how many positions the schedule
    reveals or, of rules without one, whether one at least must be revealed, 0 or 1; last_steps: whether all must, 0 or
    1; masked_counts: how many positions are masked as far as the host knows: a broken sequence has more, and one whose
    last step revealed and was then cut short, as by Ctrl-C, has fewer; 0 where none can be revealed; first_masked: the
    sum of those of the blocks before.

    What does not: slots; starts and lengths: the block's first position and how many it has; first_rows: the row of
    that position in the forward, where a block's rows follow each other; output_starts: output tokens before the block;
    result_starts: the sum of the lengths of the blocks before; window_firsts, window_lasts: which of the blocks are the
    sequence's first and last.
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
    """Of each block masked_counts masked positions, the first ones, block after block, each [N] int64: the row in the
    forward and the place in the block. Where fewer are masked, and at the end, row 0 and place -1, which is none."""

    row: torch.Tensor
    place: torch.Tensor


class Places(NamedTuple):
    """Of the blocks' places [B, L], L the longest: slot and position, those past a length in the scrap slot; whether it
    is masked; whether `masked_rows` lists it, and there as which row, which is 0 for what is not listed."""

    where: tuple[torch.Tensor, torch.Tensor]
    masked: torch.Tensor
    listed: torch.Tensor
    row: torch.Tensor


def without_padding(blocks: Blocks) -> Blocks:
    """The blocks that there are, or one where there is none: for the twins, which need not be captured."""
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
    """Raises ValueError where the kernels would index by strides that are not there."""
    if not all(tensor.is_contiguous() for tensor in (*state, *blocks)):
        raise ValueError("the state of the slots and what describes the blocks must be contiguous")
