"""The token each position predicts and how sure the model is of it.

The kernel reads the logits once: each tile of columns leaves its largest logit and the sums that a softmax relative to
it needs, which a second kernel combines (online softmax, arXiv 1805.02867) before it looks for the token in the tile
with the largest of all. The tiles depend on the columns alone, so the rows beside a row change no bit of its result.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from blockinfer.kernels import philox
from blockinfer.kernels.backend import begin, launch_options, runs_triton


class RowNoise(NamedTuple):
    """Per row of logits, each [N]: temperature float64, finite; seed, output position and step of its noise, int64."""

    temperature: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor
    step: torch.Tensor


class Confidence(NamedTuple):
    """Per row of logits, each [N]: token_ids int64, confidence float32, entropy float32 (None where not asked for).

    finite, bool: no candidate is NaN and the largest is finite. Where it is False, the token means nothing.
    """

    token_ids: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor | None
    finite: torch.Tensor


def token_confidence(
    logits: torch.Tensor,
    vocab_size: int,
    mask_token_id: int,
    noise: RowNoise | None = None,
    with_entropy: bool = False,
) -> Confidence:
    """logits [N, V], V at least vocab_size, float64 (the PyTorch twin's), float32 or narrower.

    The candidates are the ids below vocab_size but for mask_token_id; NaN counts as -inf. The token is the argmax of
    the logits, of logits + temperature * Gumbel noise (in float64: lower precision distorts the distribution, arXiv
    2409.02908) where noise is given; the lowest id wins a tie. The confidence is the token's probability under the
    noiseless softmax at temperature 1, computed in float32 (float64 for float64 logits). A row whose maximum is shared
    by k candidates at +inf, or in which all k candidates are at -inf, has confidence 1 / k. The entropy is that of the
    same distribution, in nats.
    """
    implementation = token_confidence_triton if runs_triton(logits) else token_confidence_torch
    return implementation(logits, vocab_size, mask_token_id, noise, with_entropy)


def token_confidence_torch(
    logits: torch.Tensor,
    vocab_size: int,
    mask_token_id: int,
    noise: RowNoise | None = None,
    with_entropy: bool = False,
) -> Confidence:
    """The twin."""
    logits = logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    logits[:, mask_token_id : mask_token_id + 1] = -torch.inf
    finite = logits.amax(dim=-1).isfinite()
    logits.masked_fill_(logits.isnan(), -torch.inf)
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
    return Confidence(token_ids[:, 0], confidence, entropy, finite)


def _infinite_ties(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Rows [N, V] whose maximum is +inf, or whose candidates are all at -inf -> the equal maxima, bool."""
    ties = logits == logits.amax(dim=-1, keepdim=True)
    ties[:, mask_token_id : mask_token_id + 1] = False
    return ties


def token_confidence_triton(
    logits: torch.Tensor,
    vocab_size: int,
    mask_token_id: int,
    noise: RowNoise | None = None,
    with_entropy: bool = False,
    block: int = 2048,
) -> Confidence:
    """The kernel, in tiles of `block` columns, a power of two, at least 2.

    Raises ValueError where logits are not [N, V] with adjacent columns and a V that vocab_size fits, where there is no
    candidate, or where noise is not four contiguous tensors [N].
    """
    if logits.ndim != 2 or logits.shape[1] < vocab_size or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"logits must be [N, V], V at least {vocab_size} and its stride 1, got {tuple(logits.shape)} with strides "
            f"{logits.stride()}"
        )
    if vocab_size <= (0 <= mask_token_id < vocab_size):
        raise ValueError(f"vocab_size {vocab_size} has no candidate but the mask token {mask_token_id}")
    rows = logits.shape[0]
    if noise is not None and any(tensor.shape != (rows,) or not tensor.is_contiguous() for tensor in noise):
        raise ValueError(f"noise must be contiguous tensors [{rows}], got {[tuple(tensor.shape) for tensor in noise]}")
    tiles = triton.cdiv(vocab_size, block)
    # float64 holds what a tile leaves exactly, be it float32, float64 or a token id
    parts = torch.empty((_PARTS.value, rows, tiles), dtype=torch.float64, device=logits.device)
    token_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    confidence = torch.empty(rows, dtype=torch.float32, device=logits.device)
    entropy = torch.empty(rows, dtype=torch.float32, device=logits.device) if with_entropy else None
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    _tile_kernel[(rows, tiles)](
        logits,
        logits.stride(0),
        vocab_size,
        mask_token_id,
        *(noise or (None,) * 4),
        parts,
        NOISE=noise is not None,
        PURPOSE=philox.TOKEN_NOISE,
        WITH_ENTROPY=with_entropy,
        BLOCK=block,
        num_warps=4 if noise is None else 8,
        **launch_options(logits.device),
    )
    _combine_kernel[(rows,)](
        logits,
        logits.stride(0),
        vocab_size,
        mask_token_id,
        parts,
        tiles,
        token_ids,
        confidence,
        entropy,
        finite,
        NOISE=noise is not None,
        WITH_ENTROPY=with_entropy,
        BLOCK=block,
        BLOCK_TILES=triton.next_power_of_2(tiles),
        num_warps=4 if noise is None else 1,
        **launch_options(logits.device),
    )
    return Confidence(token_ids, confidence, entropy, finite)


_NO_TOKEN = tl.constexpr(2**31 - 1)

# What a tile leaves: its largest logit m, sum e^(x - m), sum (x - m) e^(x - m), whether a candidate is NaN, and with
# noise its largest noisy logit and the lowest id of that.
_LARGEST, _TOTAL, _WEIGHTED, _HAS_NAN, _NOISY, _TOKEN, _PARTS = (tl.constexpr(i) for i in range(7))


@triton.jit
def _below(x, largest):
    """x - largest for x <= largest: 0 where both are the same infinity, at least -128, whose float32 exponential is 0.

    Halves are subtracted, since the difference of two finite numbers may overflow.
    """
    same = x == largest
    half = 0.5 * x - 0.5 * tl.where(same, 0.0, largest)
    return tl.where(same, 0.0, 2.0 * tl.maximum(half, -64.0))


@triton.jit
def _tile_kernel(
    logits_ptr,
    row_stride,
    vocab_size,
    mask_token_id,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    step_ptr,
    parts_ptr,
    NOISE: tl.constexpr,
    PURPOSE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)  # grid (N, tiles)
    tile = tl.program_id(1)
    token_id = tile * BLOCK + tl.arange(0, BLOCK)
    inside = token_id < vocab_size
    # read with the mask token, which would keep its neighbours from being loaded together
    x = tl.load(logits_ptr + row * row_stride + token_id, mask=inside, other=-float("inf")).to(tl.float32)
    if (mask_token_id >= tile * BLOCK) & (mask_token_id < (tile + 1) * BLOCK):
        x = tl.where(token_id == mask_token_id, -float("inf"), x)

    # x is -inf where there is no candidate. What is rare is done apart, so that others need not wait for it: a largest
    # logit that is infinite or nearly so, and NaN, which shows in the total.
    known = tl.where(x == x, x, -float("inf"))
    largest = tl.max(known, axis=0)
    total, weighted, has_nan = largest, largest, False
    ordinary = tl.abs(largest) < 1e30
    if ordinary:
        below = x - largest
        weight = tl.exp(below)
        total = tl.sum(weight, axis=0)
        if WITH_ENTROPY:
            weighted = tl.sum(tl.maximum(below, -128.0) * weight, axis=0)  # of -128 the float32 exponential is 0
        ordinary = total == total
    if not ordinary:
        has_nan = tl.max((x != x).to(tl.int32), axis=0) > 0
        below = _below(known, largest)
        weight = tl.where(inside & (token_id != mask_token_id), tl.exp(below), 0.0)
        total = tl.sum(weight, axis=0)
        if WITH_ENTROPY:
            weighted = tl.sum(below * weight, axis=0)

    plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    part = parts_ptr + row * tl.num_programs(1) + tile
    tl.store(part + _LARGEST * plane, largest.to(tl.float64))
    tl.store(part + _TOTAL * plane, total.to(tl.float64))
    tl.store(part + _HAS_NAN * plane, tl.where(has_nan, 1.0, 0.0).to(tl.float64))
    if WITH_ENTROPY:
        tl.store(part + _WEIGHTED * plane, weighted.to(tl.float64))
    if NOISE:
        u = philox.uniform_triton(
            tl.load(seed_ptr + row), PURPOSE, tl.load(position_ptr + row), tl.load(step_ptr + row), token_id
        )
        noisy = known.to(tl.float64) - tl.load(temperature_ptr + row) * tl.log(-tl.log(u))
        best = tl.max(noisy, axis=0)
        # among candidates alone, since all of them may be at -inf
        candidate = inside & (token_id != mask_token_id)
        token = tl.min(tl.where(candidate & (noisy == best), token_id, _NO_TOKEN), axis=0)
        tl.store(part + _NOISY * plane, best.to(tl.float64))
        tl.store(part + _TOKEN * plane, token.to(tl.float64))


@triton.jit
def _combine_kernel(
    logits_ptr,
    row_stride,
    vocab_size,
    mask_token_id,
    parts_ptr,
    tiles,
    token_id_ptr,
    confidence_ptr,
    entropy_ptr,
    finite_ptr,
    NOISE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)  # grid (N,)
    tile = tl.arange(0, BLOCK_TILES)
    inside = tile < tiles
    plane = tl.num_programs(0).to(tl.int64) * tiles
    part = parts_ptr + row * tiles + tile
    tile_largest = tl.load(part + _LARGEST * plane, mask=inside, other=-float("inf")).to(tl.float32)
    tile_total = tl.load(part + _TOTAL * plane, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tile_largest, axis=0)
    below = _below(tile_largest, largest)
    scale = tl.exp(below)
    total = tl.sum(tile_total * scale, axis=0)

    if NOISE:
        best = tl.load(part + _NOISY * plane, mask=inside, other=-float("inf"))
        tile_token = tl.load(part + _TOKEN * plane, mask=inside, other=_NO_TOKEN).to(tl.int32)
        token = tl.min(tl.where(best == tl.max(best, axis=0), tile_token, _NO_TOKEN), axis=0)
        chosen = tl.load(logits_ptr + row * row_stride + token).to(tl.float32)
        chosen = tl.where(chosen != chosen, -float("inf"), chosen)
    else:
        # in the first tile of those with the largest logit: tile 0 has a candidate even if all are at -inf
        first = tl.min(tl.where(inside & (tile_largest == largest), tile, BLOCK_TILES), axis=0)
        token_id = first * BLOCK + tl.arange(0, BLOCK)
        candidate = (token_id < vocab_size) & (token_id != mask_token_id)
        x = tl.load(logits_ptr + row * row_stride + token_id, mask=candidate, other=-float("inf")).to(tl.float32)
        x = tl.where(x != x, -float("inf"), x)
        token = tl.min(tl.where(candidate & (x == largest), token_id, _NO_TOKEN), axis=0)
        chosen = largest
    tl.store(token_id_ptr + row, token.to(tl.int64))
    tl.store(confidence_ptr + row, tl.exp(_below(chosen, largest)) / total)
    if WITH_ENTROPY:
        tile_weighted = tl.load(part + _WEIGHTED * plane, mask=inside, other=0.0).to(tl.float32)
        # the sum of (x - largest) e^(x - largest): each tile's is of differences to its own largest
        weighted = tl.sum((tile_weighted + below * tile_total) * scale, axis=0)
        tl.store(entropy_ptr + row, tl.log(total) - weighted / total)
    has_nan = tl.max(tl.load(part + _HAS_NAN * plane, mask=inside, other=0.0), axis=0)
    tl.store(finite_ptr + row, (has_nan == 0) & (tl.abs(largest) != float("inf")))
