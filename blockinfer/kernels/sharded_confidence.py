"""`kernels.confidence` where each rank has the logits of its share of the vocabulary, which are not gathered.

For each row a rank sends nine numbers: its largest logit and the sums relative to it that a softmax needs, as a tile
does there, the best of its candidates and, with noise, that one's noisy logit. All ranks merge them in the same way.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from blockinfer.kernels import philox
from blockinfer.kernels.backend import begin, launch_options, runs_triton
from blockinfer.kernels.confidence import Confidence, RowOptions, Vocabulary, candidates_torch, read_tiles
from blockinfer.kernels.confidence_kernels import (
    NO_TOKEN,
    SHARD_BEST,
    SHARD_FIELDS,
    SHARD_HAS_NAN,
    SHARD_HAS_SHARE,
    SHARD_KEY,
    SHARD_LARGEST,
    SHARD_OTHERS,
    SHARD_TOKEN,
    SHARD_TOTAL,
    SHARD_WEIGHTED,
    below_largest,
)
from blockinfer.kernels.ranks import Ranks


class Shard(NamedTuple):
    """A rank's columns: the ids from `first` on. vocabulary: the shard's part of it, with ids counted from `first`."""

    vocabulary: Vocabulary
    first: int

    @classmethod
    def of(cls, whole: Vocabulary, columns: int, rank: int) -> "Shard":
        """The rank-th `columns` ids."""
        first = rank * columns
        size = min(max(whole.size - first, 0), columns)
        mask = whole.mask_token_id - first
        ids = [ids[(ids >= first) & (ids < first + size)] - first for ids in (whole.eos_ids, whole.last_ids)]
        # a mask token in another shard gets an id past all columns here
        return cls(Vocabulary(size, mask if 0 <= mask < size else columns, *ids), first)

    @property
    def has_candidates(self) -> bool:
        return self.vocabulary.size > (self.vocabulary.mask_token_id < self.vocabulary.size)


def sharded_confidence(logits: torch.Tensor, shard: Shard, options: RowOptions, ranks: Ranks) -> Confidence:
    """logits [N, columns] of this rank's shard -> what `token_confidence` gives for the whole vocabulary, on each rank
    the same."""
    return merge(ranks.gather(summary(logits, shard, options)), logits.shape[1], runs_triton(logits))


def summary(logits: torch.Tensor, shard: Shard, options: RowOptions) -> torch.Tensor:
    """logits [N, columns] -> [SHARD_FIELDS, N] float64: largest logit with a share in the softmax; sum e^(x - largest);
    sum (x - largest) e^(x - largest); the first of these sums without the token; largest logit of a candidate; what the
    token was chosen by; the token, in columns; whether it has a share, and whether a candidate is NaN, 0 or 1."""
    if not shard.has_candidates:
        nothing = torch.zeros((SHARD_FIELDS.value, len(logits)), dtype=torch.float64, device=logits.device)
        nothing[[SHARD_LARGEST.value, SHARD_BEST.value, SHARD_KEY.value]] = -torch.inf
        nothing[SHARD_TOKEN.value] = NO_TOKEN.value
        return nothing
    return (summary_triton if runs_triton(logits) else summary_torch)(logits, shard, options)


def merge(summaries: torch.Tensor, columns: int, in_triton: bool) -> Confidence:
    """summaries [ranks, SHARD_FIELDS, N], each of `columns` ids."""
    return (merge_triton if in_triton else merge_torch)(summaries, columns)


def summary_torch(logits: torch.Tensor, shard: Shard, options: RowOptions) -> torch.Tensor:
    """The twin."""
    size, mask_token_id, _, last_ids = shard.vocabulary
    logits = candidates_torch(logits, shard.vocabulary, options)
    has_nan = logits.isnan().any(dim=-1)
    logits.masked_fill_(logits.isnan(), -torch.inf)
    best = logits.amax(dim=-1)
    chosen_by, keys, tokens = logits, best.double(), logits.argmax(dim=-1)
    for noisy in options.temperature.nonzero()[:, 0].split(32):
        draws = philox.gumbel(*(tensor[noisy] for tensor in options[1:4]), size, shard.first)
        chosen_by = logits[noisy] + options.temperature[noisy, None] * draws
        keys[noisy], tokens[noisy] = chosen_by.amax(dim=-1).double(), chosen_by.argmax(dim=-1)
    # if all candidates are at -inf, the first of them
    tokens[best == -torch.inf] = 1 if mask_token_id == 0 else 0
    share = torch.ones_like(logits, dtype=torch.bool)
    share[:, mask_token_id : mask_token_id + 1] = False
    share[options.eos_last.nonzero(), last_ids] = False
    largest = logits.masked_fill(~share, -torch.inf).amax(dim=-1)
    difference = torch.where(logits == largest[:, None], 0.0, logits - largest[:, None])
    weights = torch.where(share, difference.exp(), 0.0)
    weighted = torch.where(weights > 0, difference * weights, 0.0).sum(dim=-1)
    has_share = share.gather(1, tokens[:, None])[:, 0]
    total = weights.sum(dim=-1)
    others = weights.scatter(1, tokens[:, None], 0.0).sum(dim=-1)
    fields = largest, total, weighted, others, best, keys, tokens, has_share, has_nan
    return torch.stack([field.double() for field in fields])


def merge_torch(summaries: torch.Tensor, columns: int) -> Confidence:
    """The twin."""
    largest, total, weighted, others, best, keys, tokens, has_share, has_nan = summaries.unbind(1)  # each [ranks, N]
    tokens = tokens.long()
    ids = tokens + columns * torch.arange(len(tokens), device=tokens.device)[:, None]
    ids = torch.where(tokens == NO_TOKEN.value, tokens, ids)
    token_ids = torch.where(keys == keys.amax(dim=0), ids, NO_TOKEN.value).amin(dim=0)
    wins = ids == token_ids
    top = largest.amax(dim=0)
    below = torch.where(largest == top, 0.0, largest - top)
    scale = below.exp()
    others = (torch.where(wins, others, total) * scale).sum(dim=0)
    weighted = torch.where(scale > 0, (weighted + below * total) * scale, 0.0).sum(dim=0)
    total = (total * scale).sum(dim=0)
    total = torch.where(total > 0, total, 1.0)
    without = ~(wins & (has_share > 0)).any(dim=0)
    others, entropy = (
        x.masked_fill(without, torch.inf).float() for x in (others / total, total.log() - weighted / total)
    )
    return Confidence(token_ids, others, entropy, (has_nan == 0).all(dim=0) & best.amax(dim=0).isfinite())


def summary_triton(logits: torch.Tensor, shard: Shard, options: RowOptions, block: int = 4096) -> torch.Tensor:
    """The kernels of `token_confidence_triton`; raises what that does."""
    read = read_tiles(logits, shard.vocabulary, options, block, shard.first)
    out = torch.empty((SHARD_FIELDS.value, len(logits)), dtype=torch.float64, device=logits.device)
    # fields that only a whole vocabulary's row has are not written
    read.combine(out, out, out, out, out, of_shard=True)
    return out


def merge_triton(summaries: torch.Tensor, columns: int) -> Confidence:
    """The kernel: a program for each row."""
    ranks, _, rows = summaries.shape
    device = summaries.device
    token_ids = torch.empty(rows, dtype=torch.int64, device=device)
    others, entropy = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    finite = torch.empty(rows, dtype=torch.bool, device=device)
    out = token_ids, others, entropy, finite
    block = triton.next_power_of_2(ranks)
    _merge_kernel[(rows,)](summaries, columns, ranks, *out, BLOCK=block, num_warps=1, **launch_options(device))
    return Confidence(*out)


@triton.jit
def _merge_kernel(
    summaries_ptr,
    columns,
    ranks,
    token_id_ptr,
    others_ptr,
    entropy_ptr,
    finite_ptr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)  # grid (N,)
    rows = tl.num_programs(0).to(tl.int64)
    rank = tl.arange(0, BLOCK)
    inside = rank < ranks
    field = summaries_ptr + rank * SHARD_FIELDS * rows + row
    largest = tl.load(field + SHARD_LARGEST * rows, mask=inside, other=-float("inf")).to(tl.float32)
    total = tl.load(field + SHARD_TOTAL * rows, mask=inside, other=0.0).to(tl.float32)
    weighted = tl.load(field + SHARD_WEIGHTED * rows, mask=inside, other=0.0).to(tl.float32)
    others = tl.load(field + SHARD_OTHERS * rows, mask=inside, other=0.0).to(tl.float32)
    best = tl.load(field + SHARD_BEST * rows, mask=inside, other=-float("inf")).to(tl.float32)
    key = tl.load(field + SHARD_KEY * rows, mask=inside, other=-float("inf"))
    token = tl.load(field + SHARD_TOKEN * rows, mask=inside, other=NO_TOKEN).to(tl.int32)
    has_share = tl.load(field + SHARD_HAS_SHARE * rows, mask=inside, other=0.0) > 0
    has_nan = tl.load(field + SHARD_HAS_NAN * rows, mask=inside, other=0.0) > 0

    # the lowest id of the best; a rank without candidates has none
    token = tl.where(token == NO_TOKEN, NO_TOKEN, token + rank * columns)
    token_id = tl.min(tl.where(key == tl.max(key, axis=0), token, NO_TOKEN), axis=0)
    wins = inside & (token == token_id)
    below = below_largest(largest, tl.max(largest, axis=0))
    scale = tl.exp(below)
    weighted = tl.sum((weighted + below * total) * scale, axis=0)
    others = tl.sum(tl.where(wins, others, total) * scale, axis=0)
    total = tl.sum(total * scale, axis=0)
    total = tl.where(total > 0, total, 1.0)
    known = tl.max((wins & has_share).to(tl.int32), axis=0) > 0
    tl.store(token_id_ptr + row, token_id.to(tl.int64))
    tl.store(others_ptr + row, tl.where(known, others / total, float("inf")))
    tl.store(entropy_ptr + row, tl.where(known, tl.log(total) - weighted / total, float("inf")))
    broken = (tl.max(has_nan.to(tl.int32), axis=0) > 0) | (tl.abs(tl.max(best, axis=0)) == float("inf"))
    tl.store(finite_ptr + row, broken == 0)
