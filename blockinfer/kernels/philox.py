"""Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A sample is a function of (seed, purpose, position in the output, step in the block, vocabulary id) alone, so neither
the batch nor a preemption nor the device changes it.
"""

import torch
import triton
import triton.language as tl

TOKEN_NOISE, RULE_NOISE = 0, 1

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


def philox4x32(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Ten rounds over four counter words and two key words: int64 tensors holding 32-bit values, broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps in int64, but its 64 bits are right: the mask drops the sign that the shift brings in.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW32) ^ c1 ^ k0, p1 & _LOW32, (p0 >> 32 & _LOW32) ^ c3 ^ k1, p0 & _LOW32
        k0, k1 = k0 + _WEYL[0] & _LOW32, k1 + _WEYL[1] & _LOW32
    return [c0, c1, c2, c3]


def uniform(
    seed: torch.Tensor, purpose: int, position: torch.Tensor, step: torch.Tensor, token_id: torch.Tensor
) -> torch.Tensor:
    """float64 in (0, 1) with 53 random bits. All arguments int64, broadcast together; seed's 64 bits as int64."""
    key = [seed & _LOW32, seed >> 32 & _LOW32]
    w0, w1, _, _ = philox4x32([token_id, position, step, torch.full_like(step, purpose)], key)
    bits = (w0 >> 5) * 2**26 + (w1 >> 6)
    return bits.clamp(min=1).double() * 2.0**-53


def gumbel(
    seed: torch.Tensor, position: torch.Tensor, step: torch.Tensor, vocabulary: int, first: int = 0
) -> torch.Tensor:
    """Standard Gumbel noise [N, vocabulary] float64 for rows with the given seed, position and step, each [N] int64, of
    the ids from `first` on."""
    token_ids = torch.arange(first, first + vocabulary, device=seed.device)
    return -(-uniform(seed[:, None], TOKEN_NOISE, position[:, None], step[:, None], token_ids).log()).log()


@triton.jit
def uniform_triton(seed, purpose, position, step, token_id):
    """The numbers of `uniform`, bit for bit, inside a kernel: purpose a constant, the others integer tensors."""
    c3 = tl.full((1,), purpose, tl.uint32)
    w0, w1, _, _ = tl.philox(seed, token_id.to(tl.uint32), position.to(tl.uint32), step.to(tl.uint32), c3)
    bits = (w0 >> 5).to(tl.float64) * 67108864.0 + (w1 >> 6).to(tl.float64)  # 2**26
    return tl.maximum(bits, 1.0) * 1.1102230246251565e-16  # 2**-53
