"""Unmasking rules: which masked positions of a block a step reveals.

A rule works on blocks padded to one width: scores [B, L] float32, masked [B, L] bool, and a number or an option for each
block [B]. It reveals at least one masked position of every block that has one, and nothing else. The higher score goes
first; among equal scores the lowest position does.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Rule(NamedTuple):
    """reveal(confidence [B, L], masked [B, L], count [B], value [B]) -> [B, L] bool.

    count is the schedule's number for this step, value the rule's option. scheduled: the schedule decides alone, so that
    the number of steps is known beforehand. option, default: the name of the SamplingParams field it reads.
    """

    reveal: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    scheduled: bool
    option: str | None = None
    default: float = 0.0
    reads_confidence: bool = True


def scheduled_count(length: int, steps: int, step: int) -> int:
    """Positions that step `step` (from 0) of `steps` reveals in a block of `length`: as even as can be, more first.

    LLaDA's schedule (arXiv 2502.09992, get_num_transfer_tokens). Past the last step nothing is left: 0.
    """
    return length // steps + (step < length % steps) if step < steps else 0


def rank(scores: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """The place [B, L] of each position when masked ones are sorted by falling score; unmasked ones come last."""
    lowest = torch.finfo(scores.dtype).min
    order = scores.clamp(min=lowest).masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _low_confidence(confidence, masked, count, value):
    """The `count` most confident positions (LLaDA's low-confidence remasking, arXiv 2502.09992, section 2.4)."""
    return masked & (rank(confidence, masked) < count[:, None])


def _threshold(confidence, masked, count, value):
    """Every position at or above the threshold, and always the most confident one (Fast-dLLM, arXiv 2505.22618)."""
    return masked & ((confidence >= value[:, None]) | (rank(confidence, masked) == 0))


RULES: dict[str, Rule] = {
    "low_confidence": Rule(_low_confidence, scheduled=True),
    "threshold": Rule(_threshold, scheduled=False, option="threshold", default=0.9),
}
