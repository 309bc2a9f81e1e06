"""Unmasking rules: which masked positions of a block a step reveals.

A rule works on blocks padded to one width: scores [B, L] float32, masked [B, L] bool, and a number or an option for
each block [B]. It reveals at least one masked position of every block that has one, and nothing else. The higher score
goes first; among equal scores the lowest position does.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

Select = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Rule(NamedTuple):
    """select(scores [B, L], masked [B, L], count [B], value [B]) -> the positions to reveal, [B, L] bool.

    score: what the scores are: the confidence of each position's token, its certainty (the negative entropy of its
    distribution, in nats), a uniform random number, or its position, the leftmost highest.
    count is the schedule's number for this step, value the rule's option. scheduled: the schedule decides alone, so
    that the number of steps is known beforehand. option, default: the name of the SamplingParams field it reads.
    """

    select: Select
    score: Literal["confidence", "certainty", "random", "position"]
    scheduled: bool
    option: str | None = None
    default: float = 0.0


def scheduled_count(length: int, steps: int, step: int) -> int:
    """Positions that step `step` (from 0) of `steps` reveals in a block of `length`: as even as can be, more first.

    LLaDA's schedule (arXiv 2502.09992, get_num_transfer_tokens). Past the last step nothing is left: 0.
    """
    return length // steps + (step < length % steps) if step < steps else 0


def _order(scores: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Positions [B, L] by falling score, the unmasked ones last, whatever their scores."""
    lowest = torch.finfo(scores.dtype).min
    return scores.clamp(min=lowest).masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def _first(order: torch.Tensor, masked: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The first count [B] positions of an order [B, L], as far as they are masked."""
    places = torch.arange(order.shape[-1], device=order.device)
    return torch.zeros_like(masked).scatter_(-1, order, places < count[:, None]) & masked


def _top_count(scores, masked, count, value):
    """The `count` best (LLaDA's remasking rules, arXiv 2502.09992, section 2.4)."""
    return _first(_order(scores, masked), masked, count)


def _threshold(scores, masked, count, value):
    """Every position at or above the threshold, and always the best one (Fast-dLLM, arXiv 2505.22618, section 3.3)."""
    best = _first(_order(scores, masked), masked, torch.ones_like(count))
    return best | (masked & (scores >= value[:, None]))


def _factor(scores, masked, count, value):
    """The longest run of the n best in which the i-th is at least 1 - factor / (i + 1), for i >= 2, and at least one.

    Fast-dLLM's factor rule (arXiv 2505.22618, section 3.3): with factor 1 its Theorem 1, for each n.
    """
    order = _order(scores, masked)
    ranks = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    enough = scores.gather(-1, order) >= 1 - value[:, None] / (ranks + 1)
    enough[:, 0] = True
    return _first(order, masked, enough.cumprod(dim=-1).sum(dim=-1))


def _entropy_bound(scores, masked, count, value):
    """The most certain positions whose entropies, but for the largest, sum to at most the bound (arXiv 2505.24857)."""
    order = _order(scores, masked)
    entropy = -scores.gather(-1, order).double()
    before = torch.cat([torch.zeros_like(entropy[:, :1]), entropy[:, :-1].cumsum(dim=-1)], dim=-1)
    enough = (before <= value[:, None]) & entropy.isfinite()
    enough[:, 0] = True
    return _first(order, masked, enough.cumprod(dim=-1).sum(dim=-1))


RULES: dict[str, Rule] = {
    "low_confidence": Rule(_top_count, "confidence", scheduled=True),
    "random": Rule(_top_count, "random", scheduled=True),
    "sequential": Rule(_top_count, "position", scheduled=True),
    "threshold": Rule(_threshold, "confidence", scheduled=False, option="threshold", default=0.9),
    "factor": Rule(_factor, "confidence", scheduled=False, option="factor", default=1.0),
    "entropy": Rule(_entropy_bound, "certainty", scheduled=False, option="entropy_bound", default=0.15),
}
