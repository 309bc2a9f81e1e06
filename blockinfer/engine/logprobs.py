"""The log-probabilities of what a step reveals, for the requests that ask for them.

They are read beside the step's own functions, not by them, so that a step without such a request launches nothing more.
The LM head's rows are computed once more, those of the whole block.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from blockinfer.decoding.windows import OpenBlock
from blockinfer.engine.batch import block_rows, denoised
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.sequence import Sequence
from blockinfer.kernels.confidence import Vocabulary
from blockinfer.kernels.guidance import Guidance
from blockinfer.kernels.slots import SlotState


class Observed(NamedTuple):
    """An open block before its step: its sequence, its first row in the forward, how many rows further its shadow's is,
    and which of its positions are masked."""

    sequence: Sequence
    block: OpenBlock
    first_row: int
    shift: int
    masked: torch.Tensor


class RevealedLogprobs:
    """Keeps them on the device until a block's end: of each slot that asks [N, 2 k + 3] float64, N output positions or,
    where one block is open at a time, those of a block: the token's rank, and ids and log-probabilities of the token
    and of the k likeliest ones, the likeliest first."""

    def __init__(self, state: SlotState, vocabulary: Vocabulary, padded: Callable[[int], int]) -> None:
        """padded: to how many rows so many are best padded."""
        self._padded = padded
        self._state = state
        self._vocabulary = vocabulary
        self._kept: dict[int, torch.Tensor] = {}

    def start(self, sequence: Sequence) -> None:
        """Room for a sequence that was given its slot."""
        self._kept.pop(sequence.slot, None)
        if sequence.params.logprobs is not None:
            params = sequence.params
            length = params.max_tokens if sequence.has_several_blocks else params.block_length
            shape = length, 2 * params.logprobs + 3
            self._kept[sequence.slot] = torch.zeros(shape, dtype=torch.float64, device=self._state.tokens.device)

    def before(self, scheduled: list[ScheduledSequence]) -> list[Observed]:
        """What the step may reveal; empty where nobody asks."""
        entries = denoised(scheduled)
        if all(sequence.params.logprobs is None for sequence, _ in entries):
            return []
        blocks = [(sequence, plan, block) for sequence, plan in entries for block in sequence.window]
        return [
            Observed(
                *(sequence, block, row, plan.rows // sequence.lanes),
                self._state.masked[sequence.slot, block.start : block.stop].clone(),
            )
            for (sequence, plan, block), row in zip(blocks, block_rows(scheduled), strict=True)
            if sequence.params.logprobs is not None
        ]

    def after(self, observed: list[Observed], logits: Callable[[torch.Tensor, Guidance | None], torch.Tensor]) -> None:
        """What the step revealed is kept. logits: of rows [N] of the forward."""
        for sequence, block, first_row, shift, masked in observed:
            length = len(masked)
            # of as many rows as graphs have, whose kernels are compiled
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
        """Of each position of its open blocks, where it is revealed, the tokens' log-probabilities and ranks, by id;
        None where nobody asked. Waits for the device."""
        number = sequence.params.logprobs
        if number is None:
            return None
        positions = []
        kept = torch.cat([self._kept_of(sequence, block) for block in sequence.window])
        for rank, *values in kept.tolist():
            ids, logprobs = [int(i) for i in values[: number + 1]], values[number + 1 :]
            # the token's own last, in place of what it is among the likeliest
            tokens = dict(zip(ids[1:], zip(logprobs[1:], range(1, number + 1), strict=True), strict=True))
            positions.append(tokens | {ids[0]: (logprobs[0], int(rank))})
        return positions

    def _kept_of(self, sequence: Sequence, block: OpenBlock) -> torch.Tensor:
        kept = self._kept[sequence.slot]
        first = block.start - sequence.prompt_len if sequence.has_several_blocks else 0
        return kept[first : first + block.stop - block.start]

    def _logprobs(self, logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        """[N, vocabulary's size], of the distribution that the step reveals from: what is no candidate is -inf."""
        size, mask_token_id, eos_ids, _ = self._vocabulary
        logits = logits[:, :size].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        logits[:, mask_token_id : mask_token_id + 1] = -torch.inf
        if sequence.params.logits_eos_inf:
            logits[:, eos_ids] = -torch.inf
        return logits.log_softmax(dim=-1)


def _likeliest(logprobs: torch.Tensor, tokens: torch.Tensor, number: int) -> torch.Tensor:
    """logprobs [N, V], tokens [N] -> [N, 2 number + 3], as `RevealedLogprobs` keeps them."""
    # a position that is masked still has no token here
    own = logprobs.gather(1, tokens.clamp(max=logprobs.shape[1] - 1)[:, None])
    rank = (logprobs > own).sum(dim=1, keepdim=True) + 1
    values, ids = logprobs.topk(number, dim=1)
    return torch.cat([x.double() for x in (rank, tokens[:, None], ids, own, values)], dim=1)
