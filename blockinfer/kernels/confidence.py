"""The token each position predicts and how sure the model is of it."""

from typing import NamedTuple

import torch

from blockinfer.kernels import philox


class RowNoise(NamedTuple):
    """Per row of logits, each [N]: temperature float64; seed, output position and step of its noise, int64."""

    temperature: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor
    step: torch.Tensor


def token_confidence(
    logits: torch.Tensor,
    vocab_size: int,
    mask_token_id: int,
    noise: RowNoise | None = None,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """logits [N, V] -> token_ids [N] int64, confidence [N] float32, entropy [N] float32. logits are overwritten.

    The candidates are the ids below vocab_size but for mask_token_id; NaN counts as -inf. The token is the argmax of
    the logits, of logits + temperature * Gumbel noise (in float64: lower precision distorts the distribution, arXiv
    2409.02908) where noise is given; the lowest id wins a tie. The confidence is the token's probability under the
    noiseless softmax at temperature 1, computed in float32 (float64 for float64 logits). A row whose maximum is shared
    by k candidates at +inf, or in which all k candidates are at -inf, has confidence 1 / k. The entropy is that of the
    same distribution, in nats; None where it is not asked for.
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
    probabilities = logits.softmax(dim=-1)
    infinite = logits.amax(dim=-1).isinf()
    if infinite.any():
        ties = _infinite_ties(logits[infinite], mask_token_id)
        token_ids[infinite] = ties.int().argmax(dim=-1, keepdim=True)
        probabilities[infinite] = ties / ties.sum(dim=-1, keepdim=True, dtype=logits.dtype)
    confidence = probabilities.gather(1, token_ids)[:, 0].float()
    entropy = torch.special.entr(probabilities).sum(dim=-1).float() if with_entropy else None
    return token_ids[:, 0], confidence, entropy


def _infinite_ties(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Rows [N, V] whose maximum is +inf, or whose candidates are all at -inf -> the equal maxima, bool."""
    ties = logits == logits.amax(dim=-1, keepdim=True)
    ties[:, mask_token_id : mask_token_id + 1] = False
    return ties
