"""The token each position predicts and how sure the model is of it."""

from typing import NamedTuple

import torch

from blockinfer.kernels import philox


class RowNoise(NamedTuple):
    """Per row of logits, each [N]: temperature float64, and what names its noise: seed, output position, step, int64."""

    temperature: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor
    step: torch.Tensor


def token_confidence(
    logits: torch.Tensor, vocab_size: int, mask_token_id: int, noise: RowNoise | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [N, V] -> token_ids [N] int64, confidence [N] float32. logits are overwritten.

    The candidates are the ids below vocab_size but for mask_token_id; NaN counts as -inf. The token is the argmax of the
    logits, of logits + temperature * Gumbel noise (in float64: lower precision distorts the distribution, arXiv
    2409.02908) where noise is given; the lowest id wins a tie. The confidence is the token's probability under the
    noiseless softmax at temperature 1, computed in float32 (float64 for float64 logits). A row whose maximum is shared
    by k candidates at +inf, or in which all k candidates are at -inf, has confidence 1 / k.
    """
    logits = logits[:, :vocab_size]
    if mask_token_id < vocab_size:
        logits[:, mask_token_id] = -torch.inf
    logits = logits.masked_fill_(logits.isnan(), -torch.inf).to(torch.promote_types(logits.dtype, torch.float32))
    noisy = logits
    if noise is not None:
        draws = philox.gumbel(noise.seed, noise.position, noise.step, vocab_size)
        noisy = logits.double() + noise.temperature[:, None] * draws
    token_ids = noisy.argmax(dim=-1, keepdim=True)
    best = noisy.gather(1, token_ids)[:, 0]
    confidence = logits.softmax(dim=-1).gather(1, token_ids)[:, 0]
    token_ids = token_ids[:, 0]
    infinite = best.isinf()
    if infinite.any():
        token_ids, confidence = _infinite_rows(logits, mask_token_id, infinite, token_ids, confidence)
    return token_ids, confidence.float()


def _infinite_rows(logits, mask_token_id, infinite, token_ids, confidence):
    """Rows whose maximum is +inf, or whose candidates are all at -inf: a uniform choice among the equal maxima."""
    candidate = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    candidate[mask_token_id : mask_token_id + 1] = False
    ties = (logits == logits.amax(dim=-1, keepdim=True)) & candidate
    token_ids = torch.where(infinite, ties.int().argmax(dim=-1), token_ids)
    return token_ids, torch.where(infinite, 1.0 / ties.sum(dim=-1), confidence)
