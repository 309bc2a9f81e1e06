"""Log-probabilities of the tokens that a step reveals, for requests that ask for them.

They are computed outside the step's own functions, so that a step without such a request launches nothing more. The LM
head runs once more, on all rows of the block.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from blockinfer.decoding.windows import OpenBlock
from blockinfer.engine.batch import denoised, open_blocks
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.sequence import Sequence
from blockinfer.kernels.confidence import Vocabulary
from blockinfer.kernels.guidance import Guidance
from blockinfer.kernels.slots import SlotState


class Observed(NamedTuple):
    """An open block before its step: its sequence, its first row in the forward, the distance to its shadow's rows, and
    which of its positions are masked."""

    sequence: Sequence
    block: OpenBlock
    first_row: int
    shift: int
    masked: torch.Tensor


class RevealedLogprobs:
    """Keeps log-probabilities on the device until a block ends: for each slot that asks, [N, 2 k + 3] float64. N: the
    output positions or, with one block open at a time, the block's. Columns: the token's rank, then the ids and then
    the log-probabilities of the token and of the k likeliest tokens, the likeliest first."""

    def __init__(self, state: SlotState, vocabulary: Vocabulary, padded: Callable[[int], int]) -> None:
        """padded: from a number of rows to the number to pad them to."""
        self._padded = padded
        self._state = state
        self._vocabulary = vocabulary
        self._kept: dict[int, torch.Tensor] = {}

    def start(self, sequence: Sequence) -> None:
        """Allocates memory for a sequence that has just got its slot."""
        self._kept.pop(sequence.slot, None)
        if sequence.params.logprobs is not None:
            params = sequence.params
            length = params.max_tokens if sequence.has_several_blocks else params.block_length
            shape = length, 2 * params.logprobs + 3
            self._kept[sequence.slot] = torch.zeros(shape, dtype=torch.float64, device=self._state.tokens.device)

    def before(self, scheduled: list[ScheduledSequence]) -> list[Observed]:
        """The blocks that need log-probabilities, before the step; empty if no request asks."""
        if all(sequence.params.logprobs is None for sequence, _ in denoised(scheduled)):
            return []
        return [
            Observed(
                *(sequence, block, row, plan.rows // sequence.lanes),
                self._state.masked[sequence.slot, block.start : block.stop].clone(),
            )
            for sequence, plan, block, row in open_blocks(scheduled)
            if sequence.params.logprobs is not None
        ]

    def after(self, observed: list[Observed], logits: Callable[[torch.Tensor, Guidance | None], torch.Tensor]) -> None:
        """Keeps those of the tokens that the step revealed. logits: of rows [N] of the forward."""
        for sequence, block, first_row, shift, masked in observed:
            length = len(masked)
            # padded to a captured size, whose kernels are compiled
            rows = torch.arange(self._padded(length), device=masked.device).clamp(max=length - 1) + first_row
            guidance = None
            if sequence.guided:
                scale = torch.full(rows.shape, sequence.params.cfg_scale, dtype=torch.float64, device=rows.device)
                guidance = Guidance(torch.full_like(rows, shift), scale)
            tokens = self._state.tokens[sequence.slot, block.start : block.stop]
            found = _likeliest(
                self._logprobs(logits(rows, guidance)[:length], sequence), tokens, sequence.params.logprobs
            )
            revealed = masked & ~self._state.masked[sequence.slot, block.start : block.stop]
            kept = self._kept_of(sequence, block)
            kept.copy_(torch.where(revealed[:, None], found, kept))

    def read(self, sequence: Sequence) -> list[dict[int, tuple[float, int]]] | None:
        """For each position of the open blocks, the log-probabilities and ranks of its tokens by id, valid where it is
        revealed; None if the request does not ask. Waits for the device."""
        number = sequence.params.logprobs
        if number is None:
            return None
        positions = []
        kept = torch.cat([self._kept_of(sequence, block) for block in sequence.window])
        for rank, *values in kept.tolist():
            ids, logprobs = [int(i) for i in values[: number + 1]], values[number + 1 :]
            # the token itself last, replacing its entry among the likeliest
            tokens = dict(zip(ids[1:], zip(logprobs[1:], range(1, number + 1), strict=True), strict=True))
            positions.append(tokens | {ids[0]: (logprobs[0], int(rank))})
        return positions

    def _kept_of(self, sequence: Sequence, block: OpenBlock) -> torch.Tensor:
        kept = self._kept[sequence.slot]
        first = block.start - sequence.prompt_len if sequence.has_several_blocks else 0
        return kept[first : first + block.stop - block.start]

    def _logprobs(self, logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        """[N, vocab_size], of the distribution that the step reveals from: -inf for tokens that are no candidates."""
        size, mask_token_id, eos_ids, _ = self._vocabulary
        logits = logits[:, :size].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        logits[:, mask_token_id : mask_token_id + 1] = -torch.inf
        if sequence.params.logits_eos_inf:
            logits[:, eos_ids] = -torch.inf
        return logits.log_softmax(dim=-1)


def _likeliest(logprobs: torch.Tensor, tokens: torch.Tensor, number: int) -> torch.Tensor:
    """logprobs [N, V], tokens [N] -> [N, 2 number + 3], as `RevealedLogprobs` keeps them."""
    # a position still masked has the mask token, which may be outside the columns
    own = logprobs.gather(1, tokens.clamp(max=logprobs.shape[1] - 1)[:, None])
    rank = (logprobs > own).sum(dim=1, keepdim=True) + 1
    values, ids = logprobs.topk(number, dim=1)
    return torch.cat([x.double() for x in (rank, tokens[:, None], ids, own, values)], dim=1)
