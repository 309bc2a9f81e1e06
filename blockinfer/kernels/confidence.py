"""The token each position predicts and the model's confidence in it.

Confidence is given as the probability of all *other* tokens: near certainty, 1 - p has digits left in float32 where p
has none, so that positions keep an order.
"""

from typing import NamedTuple

import torch
import triton

from blockinfer.kernels import philox
from blockinfer.kernels.backend import launch_options, runs_triton
from blockinfer.kernels.confidence_kernels import PARTS, _combine_kernel, _noise_kernel, _tile_kernel

_NOISE_PROGRAMS = 16  # the most that share a row's tiles


class RowOptions(NamedTuple):
    """What each row of logits asks for, each [N] and contiguous.

    temperature: float64, finite. seed, position, step: of its noise, int64; position is that in the output. forbid_eos,
    bool: the EOS tokens are no candidates. eos_last, bool: EOS and end-of-turn tokens have no share in the softmax.
    """

    temperature: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor
    step: torch.Tensor
    forbid_eos: torch.Tensor
    eos_last: torch.Tensor


class Vocabulary(NamedTuple):
    """The candidates are the ids below size but for mask_token_id. eos_ids, last_ids, int64 tensors, perhaps empty:
    what forbid_eos and eos_last mean."""

    size: int
    mask_token_id: int
    eos_ids: torch.Tensor
    last_ids: torch.Tensor


class Confidence(NamedTuple):
    """Per row of logits, each [N].

    token_ids int64. others float32: the probability of all other tokens, 1 minus the token's. entropy float32, in nats.
    Both are infinite for a token that has no share in the softmax. finite, bool: no candidate is NaN and the largest is
    finite. Where it is False, the token means nothing.
    """

    token_ids: torch.Tensor
    others: torch.Tensor
    entropy: torch.Tensor
    finite: torch.Tensor


def token_confidence(logits: torch.Tensor, vocabulary: Vocabulary, options: RowOptions) -> Confidence:
    """logits [N, V], V at least vocabulary.size, float64 (the PyTorch twin's), float32 or narrower.

    NaN counts as -inf. The token is the argmax of the logits, of logits + temperature * Gumbel noise (in float64: lower
    precision distorts the distribution, arXiv 2409.02908) where the temperature is above 0; the lowest id wins a tie.
    others and entropy are those of the noiseless softmax at temperature 1, computed in float32 (float64 for float64
    logits), of the tokens that have a share in it: that is how LLaDA's confidence_eos_eot_inf works at temperature 0
    (generate.py of its repository), here at every temperature. A row whose maximum is shared by k candidates at +inf,
    or in which all k candidates are at -inf, gives each of them 1 / k.
    """
    implementation = token_confidence_triton if runs_triton(logits) else token_confidence_torch
    return implementation(logits, vocabulary, options)


def token_confidence_torch(logits: torch.Tensor, vocabulary: Vocabulary, options: RowOptions) -> Confidence:
    """The twin."""
    size, mask_token_id, _, last_ids = vocabulary
    logits = candidates_torch(logits, vocabulary, options)
    finite = logits.amax(dim=-1).isfinite()
    sound = finite.all()
    if not sound:
        logits.masked_fill_(logits.isnan(), -torch.inf)
    token_ids = logits.argmax(dim=-1, keepdim=True)
    # few rows at a time: their noise takes ten times the memory of their logits
    for noisy in options.temperature.nonzero()[:, 0].split(32):
        draws = philox.gumbel(*(tensor[noisy] for tensor in options[1:4]), size)
        token_ids[noisy] = (logits[noisy] + options.temperature[noisy, None] * draws).argmax(dim=-1, keepdim=True)
    if not sound:
        # candidates that share an infinite maximum share all of the probability
        infinite = logits.amax(dim=-1).isinf().nonzero()[:, 0]
        ties = logits[infinite] == logits[infinite].amax(dim=-1, keepdim=True)
        ties[:, mask_token_id : mask_token_id + 1] = False
        token_ids[infinite] = ties.int().argmax(dim=-1, keepdim=True)
        logits[infinite] = torch.where(ties, 0.0, -torch.inf).to(logits.dtype)
    without = options.eos_last & torch.isin(token_ids[:, 0], last_ids)
    if options.eos_last.any():
        logits[options.eos_last.nonzero(), last_ids] = -torch.inf
    probabilities = logits.softmax(dim=-1)
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    # the sum of the others, not 1 minus the token's, which would lose small ones
    others = probabilities.scatter_(1, token_ids, 0.0).sum(dim=-1)
    others, entropy = (x.masked_fill(without, torch.inf).float() for x in (others, entropy))
    return Confidence(token_ids[:, 0], others, entropy, finite)


def candidates_torch(logits: torch.Tensor, vocabulary: Vocabulary, options: RowOptions) -> torch.Tensor:
    """A copy of the logits of ids below vocabulary.size, in float32 at least: -inf where there is no candidate."""
    size, mask_token_id, eos_ids, _ = vocabulary
    logits = logits[:, :size].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if options.forbid_eos.any():
        # added, not assigned: a broken model's NaN or +inf there becomes NaN and is still noticed
        logits[:, eos_ids] += torch.where(options.forbid_eos, -torch.inf, 0.0)[:, None].to(logits.dtype)
    logits[:, mask_token_id : mask_token_id + 1] = -torch.inf
    return logits


def token_confidence_triton(
    logits: torch.Tensor, vocabulary: Vocabulary, options: RowOptions, block: int = 4096
) -> Confidence:
    """The kernels, in tiles of `block` columns, a power of two, at least 2; those of noise have 2,048 at most.

    Raises ValueError where logits are not [N, V] with adjacent columns and a V that the vocabulary fits, where there is
    no candidate, or where the options are not contiguous tensors [N].
    """
    read = read_tiles(logits, vocabulary, options, block)
    rows, device = logits.shape[0], logits.device
    token_ids = torch.empty(rows, dtype=torch.int64, device=device)
    others = torch.empty(rows, dtype=torch.float32, device=device)
    entropy = torch.empty(rows, dtype=torch.float32, device=device)
    finite = torch.empty(rows, dtype=torch.bool, device=device)
    read.combine(read.parts, token_ids, others, entropy, finite, of_shard=False)
    return Confidence(token_ids, others, entropy, finite)


def check_logits(logits: torch.Tensor, size: int) -> None:
    """Raises ValueError where logits are not what the kernels expect: [N, V], V at least size, adjacent columns."""
    if logits.ndim != 2 or logits.shape[1] < size or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"logits must be [N, V], V at least {size} and its stride 1, got {tuple(logits.shape)} with strides "
            f"{logits.stride()}"
        )


class ReadTiles(NamedTuple):
    """What each tile of the logits left, [parts, N, tiles] float64, and what `_combine_kernel` takes with it."""

    parts: torch.Tensor
    arguments: tuple
    launch: dict[str, int | bool]

    def combine(self, *out: torch.Tensor, of_shard: bool) -> None:
        """out: a shard's summary, and the four of `Confidence`; what is not asked for may be anything."""
        _combine_kernel[(self.parts.shape[1],)](*self.arguments, *out, OF_SHARD=of_shard, **self.launch)


def read_tiles(
    logits: torch.Tensor, vocabulary: Vocabulary, options: RowOptions, block: int, first_id: int = 0
) -> ReadTiles:
    """The kernels that read all logits. first_id: the id of the first column, for its noise. Raises ValueError like
    `token_confidence_triton`."""
    size, mask_token_id, eos_ids, last_ids = vocabulary
    check_logits(logits, size)
    if size <= (0 <= mask_token_id < size):
        raise ValueError(f"vocab_size {size} has no candidate but the mask token {mask_token_id}")
    rows, device = logits.shape[0], logits.device
    if any(tensor.shape != (rows,) or not tensor.is_contiguous() for tensor in options):
        shapes = [tuple(tensor.shape) for tensor in options]
        raise ValueError(f"options must be contiguous tensors [{rows}], got {shapes}")
    tiles = triton.cdiv(size, block)
    # float64 holds what a tile leaves exactly, whether float32, float64 or a token id
    parts = torch.empty((PARTS.value, rows, tiles), dtype=torch.float64, device=device)
    row = (logits, logits.stride(0), size, mask_token_id, options.forbid_eos, eos_ids, len(eos_ids))
    last = (options.eos_last, last_ids, len(last_ids))
    launch = dict(BLOCK=block, **launch_options(device))
    _tile_kernel[(rows, tiles)](*row, *last, parts, **launch)
    # most often no row asks for noise: with many rows, fewer programs a row then have to find that out
    programs = max(1, min(tiles, _NOISE_PROGRAMS, 1024 // max(1, rows)))
    noise_block = min(block, 2048)
    _noise_kernel[(rows, programs)](
        *row,
        *options[:4],
        parts,
        tiles,
        triton.cdiv(size, noise_block),
        first_id,
        PURPOSE=philox.TOKEN_NOISE,
        num_warps=8,
        **launch | dict(BLOCK=noise_block),
    )
    arguments = (*row, *last, options.temperature, parts, tiles, programs)
    return ReadTiles(parts, arguments, dict(BLOCK_TILES=triton.next_power_of_2(tiles), num_warps=8, **launch))
