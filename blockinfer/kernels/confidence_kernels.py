"""The kernels of `kernels.confidence`, which launches them and has their twin.

They read the logits once: each tile of columns leaves its largest logit and the sums that a softmax relative to it
needs, which a last kernel combines (online softmax, arXiv 1805.02867) before it reads the token's tile once more. The
tiles depend on the columns alone, so the rows beside a row change no bit of its result.
"""

import triton
import triton.language as tl

from blockinfer.kernels import philox
from blockinfer.kernels.backend import begin

NO_TOKEN = tl.constexpr(2**31 - 1)
# stands for -inf where 0 times it must be 0: its exponential is 0 beside any logit above -1e30
_LOW = tl.constexpr(-1e30)

# What a tile leaves: of the tokens with a share in the softmax the largest logit m, sum e^(x - m), and the sum of
# (x - m) e^(x - m); of all candidates the largest logit, and whether one is NaN. What a program of the noise kernel
# leaves: its largest noisy logit and the lowest id with it.
_LARGEST, _TOTAL, _WEIGHTED, _BEST, _HAS_NAN, _NOISY, _TOKEN, PARTS = (tl.constexpr(i) for i in range(8))

# What a shard of the vocabulary leaves (kernels.sharded_confidence).
SHARD_LARGEST, SHARD_TOTAL, SHARD_WEIGHTED, SHARD_OTHERS, SHARD_BEST = (tl.constexpr(i) for i in range(5))
SHARD_KEY, SHARD_TOKEN, SHARD_HAS_SHARE, SHARD_HAS_NAN, SHARD_FIELDS = (tl.constexpr(i) for i in range(5, 10))


@triton.jit
def below_largest(x, largest):
    """x - largest for x <= largest: 0 where both are the same infinity, at least -128, whose float32 exponential is 0.

    Halves are subtracted, since the difference of two finite numbers may overflow.
    """
    same = x == largest
    half = 0.5 * x - 0.5 * tl.where(same, 0.0, largest)
    return tl.where(same, 0.0, 2.0 * tl.maximum(half, -64.0))


@triton.jit
def _read_tile(
    start,
    logits_ptr,
    row_stride,
    vocab_size,
    mask_token_id,
    forbid_eos_ptr,
    eos_ids_ptr,
    num_eos,
    BLOCK: tl.constexpr,
):
    """Of this program's row: the logits of BLOCK ids from start on, -inf where there is no candidate."""
    x = _read_ordinary(start, logits_ptr, row_stride, vocab_size, mask_token_id, BLOCK)
    if tl.load(forbid_eos_ptr + tl.program_id(0).to(tl.int64)):
        token_id = start + tl.arange(0, BLOCK)
        for i in range(num_eos):
            # a broken model's NaN or +inf there is still noticed
            forbidden = tl.where(x < float("inf"), -float("inf"), float("nan"))
            x = tl.where(token_id == tl.load(eos_ids_ptr + i), forbidden, x)
    return x


@triton.jit
def _read_ordinary(
    start, logits_ptr, row_stride, vocab_size, mask_token_id, BLOCK: tl.constexpr, NONE: tl.constexpr = -float("inf")
):
    """The same where EOS tokens are candidates, and with NONE where there is no candidate. Which ids are candidates is
    asked only where some are not: it takes as many registers as the logits themselves."""
    token_id = start + tl.arange(0, BLOCK)
    at = logits_ptr + tl.program_id(0).to(tl.int64) * row_stride + token_id
    if (start + BLOCK <= vocab_size) & ((mask_token_id < start) | (mask_token_id >= start + BLOCK)):
        x = tl.load(at).to(tl.float32)
    else:
        # reading the mask token too keeps the loads of its neighbours together
        inside = token_id < vocab_size
        x = tl.where(inside, tl.load(at, mask=inside, other=0.0).to(tl.float32), NONE)
        x = tl.where(token_id == mask_token_id, NONE, x)
    return x


@triton.jit
def _has_share(start, vocab_size, mask_token_id, eos_last_ptr, last_ids_ptr, num_last, BLOCK: tl.constexpr):
    """Which of BLOCK ids from start on have a share in the softmax of this program's row."""
    token_id = start + tl.arange(0, BLOCK)
    share = (token_id < vocab_size) & (token_id != mask_token_id)
    if tl.load(eos_last_ptr + tl.program_id(0).to(tl.int64)):
        for i in range(num_last):
            share &= token_id != tl.load(last_ids_ptr + i)
    return share


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _rare_tile(
    start,
    logits_ptr,
    row_stride,
    vocab_size,
    mask_token_id,
    forbid_eos_ptr,
    eos_ids_ptr,
    num_eos,
    eos_last_ptr,
    last_ids_ptr,
    num_last,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of BLOCK ids from start on: the largest logit of all candidates and of those with a share in the softmax, the two
    sums relative to that, and whether a candidate is NaN. CHUNK at a time, since few registers are to spare."""
    best = tl.full([], -float("inf"), tl.float32)
    largest = best
    total = tl.zeros([], tl.float32)
    weighted = total
    has_nan = tl.zeros([], tl.int32)
    for at in tl.range(start, start + BLOCK, CHUNK):
        x = _read_tile(
            *(at, logits_ptr, row_stride, vocab_size, mask_token_id, forbid_eos_ptr, eos_ids_ptr, num_eos, CHUNK)
        )
        has_nan = tl.maximum(has_nan, tl.max((x != x).to(tl.int32), axis=0))
        x = tl.where(x == x, x, -float("inf"))
        best = tl.maximum(best, tl.max(x, axis=0))
        share = _has_share(at, vocab_size, mask_token_id, eos_last_ptr, last_ids_ptr, num_last, CHUNK)
        known = tl.where(share, x, -float("inf"))
        new = tl.maximum(largest, tl.max(known, axis=0))
        below = below_largest(largest, new)
        shrink = tl.exp(below)
        difference = below_largest(known, new)
        weight = tl.where(share, tl.exp(difference), 0.0)
        weighted = (weighted + below * total) * shrink + tl.sum(difference * weight, axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        largest = new
    return best, largest, total, weighted, has_nan


@triton.jit
def _tile_kernel(
    logits_ptr,
    row_stride,
    vocab_size,
    mask_token_id,
    forbid_eos_ptr,
    eos_ids_ptr,
    num_eos,
    eos_last_ptr,
    last_ids_ptr,
    num_last,
    parts_ptr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)  # grid (N, tiles)
    # special tokens come last in most vocabularies: the slower tiles start first
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    start = tile * BLOCK
    forbid_eos, eos_last = tl.load(forbid_eos_ptr + row), tl.load(eos_last_ptr + row)
    x = _read_ordinary(start, logits_ptr, row_stride, vocab_size, mask_token_id, BLOCK, NONE=_LOW)
    # Rare cases are handled apart, so that others need not wait for them: a token here that is no candidate or has no
    # share in the softmax, a largest logit that is infinite or nearly so, -inf, and NaN, which the maximum ignores and
    # the sum of products shows.
    ordinary = True
    if forbid_eos:
        for i in range(num_eos):
            token = tl.load(eos_ids_ptr + i)
            ordinary &= (token < start) | (token >= start + BLOCK)
    if eos_last:
        for i in range(num_last):
            token = tl.load(last_ids_ptr + i)
            ordinary &= (token < start) | (token >= start + BLOCK)
    best = tl.max(x, axis=0)
    largest, total, weighted, has_nan = best, best, best, tl.zeros([], tl.int32)
    ordinary &= tl.abs(best) < 1e30
    if ordinary:
        # in powers of two
        exponent = (x - best) * 1.4426950408889634
        weight = tl.exp2(exponent)
        total, weighted = tl.reduce((weight, exponent * weight), 0, _add_pairs)
        weighted *= 0.6931471805599453
        ordinary = weighted == weighted
    if not ordinary:
        best, largest, total, weighted, has_nan = _rare_tile(
            *(start, logits_ptr, row_stride, vocab_size, mask_token_id, forbid_eos_ptr, eos_ids_ptr, num_eos),
            *(eos_last_ptr, last_ids_ptr, num_last, BLOCK, BLOCK // 8 if BLOCK >= 128 else BLOCK),
        )

    plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    part = parts_ptr + row * tl.num_programs(1) + tile
    tl.store(part + _LARGEST * plane, largest.to(tl.float64))
    tl.store(part + _TOTAL * plane, total.to(tl.float64))
    tl.store(part + _WEIGHTED * plane, weighted.to(tl.float64))
    tl.store(part + _BEST * plane, best.to(tl.float64))
    tl.store(part + _HAS_NAN * plane, has_nan.to(tl.float64))


@triton.jit
def _noise_kernel(
    logits_ptr,
    row_stride,
    vocab_size,
    mask_token_id,
    forbid_eos_ptr,
    eos_ids_ptr,
    num_eos,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    step_ptr,
    parts_ptr,
    tiles,
    noise_tiles,
    first_id,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)  # grid (N, programs)
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0:
        return
    seed, position, step = tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(step_ptr + row)
    best = tl.full([BLOCK], -float("inf"), tl.float64)
    token = tl.full([BLOCK], NO_TOKEN, tl.int32)
    for tile in tl.range(tl.program_id(1), noise_tiles, tl.num_programs(1)):
        start = tile * BLOCK
        x = _read_tile(
            *(start, logits_ptr, row_stride, vocab_size, mask_token_id, forbid_eos_ptr, eos_ids_ptr, num_eos, BLOCK)
        )
        token_id = start + tl.arange(0, BLOCK)
        u = philox.uniform_triton(seed, PURPOSE, position, step, first_id + token_id)
        noisy = tl.where(x == x, x, -float("inf")).to(tl.float64) - temperature * tl.log(-tl.log(u))
        # among candidates alone, since all of them may be at -inf
        candidate = (token_id < vocab_size) & (token_id != mask_token_id)
        better = candidate & ((noisy > best) | (token == NO_TOKEN))
        best = tl.where(better, noisy, best)
        token = tl.where(better, token_id, token)
    largest = tl.max(best, axis=0)
    token = tl.min(tl.where(best == largest, token, NO_TOKEN), axis=0)
    plane = tl.num_programs(0).to(tl.int64) * tiles
    part = parts_ptr + row * tiles + tl.program_id(1)
    tl.store(part + _NOISY * plane, largest)
    tl.store(part + _TOKEN * plane, token.to(tl.float64))


@triton.jit
def _combine_kernel(
    logits_ptr,
    row_stride,
    vocab_size,
    mask_token_id,
    forbid_eos_ptr,
    eos_ids_ptr,
    num_eos,
    eos_last_ptr,
    last_ids_ptr,
    num_last,
    temperature_ptr,
    parts_ptr,
    tiles,
    noise_programs,
    summary_ptr,
    token_id_ptr,
    others_ptr,
    entropy_ptr,
    finite_ptr,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    OF_SHARD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of each row what `Confidence` has; OF_SHARD: what `kernels.sharded_confidence` goes on with."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)  # grid (N,)
    tile = tl.arange(0, BLOCK_TILES)
    inside = tile < tiles
    plane = tl.num_programs(0).to(tl.int64) * tiles
    part = parts_ptr + row * tiles + tile
    tile_largest = tl.load(part + _LARGEST * plane, mask=inside, other=-float("inf")).to(tl.float32)
    tile_total = tl.load(part + _TOTAL * plane, mask=inside, other=0.0).to(tl.float32)
    tile_weighted = tl.load(part + _WEIGHTED * plane, mask=inside, other=0.0).to(tl.float32)
    tile_best = tl.load(part + _BEST * plane, mask=inside, other=-float("inf")).to(tl.float32)
    has_nan = tl.max(tl.load(part + _HAS_NAN * plane, mask=inside, other=0.0), axis=0)
    forbid_eos, eos_last = tl.load(forbid_eos_ptr + row), tl.load(eos_last_ptr + row)
    noisy = tl.load(temperature_ptr + row) > 0
    largest = tl.max(tile_largest, axis=0)
    best = tl.max(tile_best, axis=0)

    # the token, or the tile to look for it: the first of those with the largest logit; tile 0 has a candidate even if
    # all are at -inf
    home = tl.min(tl.where(inside & (tile_best == best), tile, BLOCK_TILES), axis=0)
    token = tl.full([], NO_TOKEN, tl.int32)
    key = best.to(tl.float64)
    if noisy:
        made = tile < noise_programs
        noise_best = tl.load(part + _NOISY * plane, mask=made, other=-float("inf"))
        tokens = tl.load(part + _TOKEN * plane, mask=made, other=NO_TOKEN).to(tl.int32)
        key = tl.max(noise_best, axis=0)
        token = tl.min(tl.where(noise_best == key, tokens, NO_TOKEN), axis=0)
        home = token // BLOCK
    start = home * BLOCK
    # relative to the largest of all tiles; the token's tile without the token, so that small values in it are not lost
    beside = tl.zeros([], tl.float32)
    has_share = tl.full([], 1, tl.int32)
    if forbid_eos | eos_last | (tl.abs(best) >= 1e30):
        token, beside, has_share = _rare_home(
            *(token, noisy, best, largest, start, logits_ptr, row_stride, vocab_size, mask_token_id, forbid_eos_ptr),
            *(eos_ids_ptr, num_eos, eos_last_ptr, last_ids_ptr, num_last, BLOCK, BLOCK // 8 if BLOCK >= 128 else BLOCK),
        )
    else:
        x = _read_ordinary(start, logits_ptr, row_stride, vocab_size, mask_token_id, BLOCK)
        x = tl.where(x == x, x, -float("inf"))
        token_id = start + tl.arange(0, BLOCK)
        if not noisy:
            token = tl.min(tl.where(x == best, token_id, NO_TOKEN), axis=0)
        beside = tl.sum(tl.where(token_id == token, 0.0, tl.exp(x - largest)), axis=0)

    below = below_largest(tile_largest, largest)
    scale = tl.exp(below)
    total = tl.sum(tile_total * scale, axis=0)
    others = tl.sum(tl.where(tile == home, 0.0, tile_total * scale), axis=0) + beside
    # the sum of (x - largest) e^(x - largest): each tile's sum uses differences from its own largest
    weighted = tl.sum((tile_weighted + below * tile_total) * scale, axis=0)
    if OF_SHARD:
        rows = tl.num_programs(0).to(tl.int64)
        summary = summary_ptr + row
        tl.store(summary + SHARD_LARGEST * rows, largest.to(tl.float64))
        tl.store(summary + SHARD_TOTAL * rows, total.to(tl.float64))
        tl.store(summary + SHARD_WEIGHTED * rows, weighted.to(tl.float64))
        tl.store(summary + SHARD_OTHERS * rows, others.to(tl.float64))
        tl.store(summary + SHARD_BEST * rows, best.to(tl.float64))
        tl.store(summary + SHARD_KEY * rows, key)
        tl.store(summary + SHARD_TOKEN * rows, token.to(tl.float64))
        tl.store(summary + SHARD_HAS_SHARE * rows, has_share.to(tl.float64))
        tl.store(summary + SHARD_HAS_NAN * rows, has_nan)
    else:
        total = tl.where(total > 0, total, 1.0)  # 0 where no token has a share
        tl.store(token_id_ptr + row, token.to(tl.int64))
        tl.store(others_ptr + row, tl.where(has_share > 0, others / total, float("inf")))
        tl.store(entropy_ptr + row, tl.where(has_share > 0, tl.log(total) - weighted / total, float("inf")))
        tl.store(finite_ptr + row, (has_nan == 0) & (tl.abs(best) != float("inf")))


@triton.jit
def _rare_home(
    token,
    noisy,
    best,
    largest,
    start,
    logits_ptr,
    row_stride,
    vocab_size,
    mask_token_id,
    forbid_eos_ptr,
    eos_ids_ptr,
    num_eos,
    eos_last_ptr,
    last_ids_ptr,
    num_last,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of the token's tile, the BLOCK ids from start on: the token, unless it is noisy and known; the weights of all
    others; and whether the token has a share in the softmax. CHUNK at a time, as `_rare_tile`."""
    if not noisy:
        for at in tl.range(start, start + BLOCK, CHUNK):
            x = _read_tile(
                *(at, logits_ptr, row_stride, vocab_size, mask_token_id, forbid_eos_ptr, eos_ids_ptr, num_eos, CHUNK)
            )
            x = tl.where(x == x, x, -float("inf"))
            token_id = at + tl.arange(0, CHUNK)
            candidate = (token_id < vocab_size) & (token_id != mask_token_id)
            token = tl.minimum(token, tl.min(tl.where(candidate & (x == best), token_id, NO_TOKEN), axis=0))
    beside = tl.zeros([], tl.float32)
    has_share = tl.zeros([], tl.int32)
    for at in tl.range(start, start + BLOCK, CHUNK):
        x = _read_tile(
            *(at, logits_ptr, row_stride, vocab_size, mask_token_id, forbid_eos_ptr, eos_ids_ptr, num_eos, CHUNK)
        )
        x = tl.where(x == x, x, -float("inf"))
        token_id = at + tl.arange(0, CHUNK)
        share = _has_share(at, vocab_size, mask_token_id, eos_last_ptr, last_ids_ptr, num_last, CHUNK)
        weight = tl.where(share, tl.exp(below_largest(x, largest)), 0.0)
        beside += tl.sum(tl.where(token_id == token, 0.0, weight), axis=0)
        has_share = tl.maximum(has_share, tl.max((share & (token_id == token)).to(tl.int32), axis=0))
    return token, beside, has_share
