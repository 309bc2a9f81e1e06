"""The log-probability of a given token per row, reading the logits once (online softmax, arXiv 1805.02867)."""

import torch
import triton
import triton.language as tl

from blockinfer.kernels.backend import begin, launch_options, runs_triton
from blockinfer.kernels.confidence import check_logits


def log_probability(logits: torch.Tensor, token_ids: torch.Tensor, size: int) -> torch.Tensor:
    """logits [N, V], float64 (the PyTorch twin's), float32 or narrower; token_ids [N] int64 below size -> [N] float64.

    The softmax is over the ids below `size`, including the mask token, as in LLaDA's likelihood; it is computed in at
    least float32. NaN where a logit is NaN or the largest is infinite.
    """
    implementation = log_probability_triton if runs_triton(logits) else log_probability_torch
    return implementation(logits, token_ids, size)


def log_probability_torch(logits: torch.Tensor, token_ids: torch.Tensor, size: int) -> torch.Tensor:
    """The twin."""
    logits = logits[:, :size].to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.amax(dim=-1)
    total = (logits - largest[:, None]).exp().sum(dim=-1)
    return (logits.gather(1, token_ids[:, None])[:, 0] - largest - total.log()).double()


def log_probability_triton(logits: torch.Tensor, token_ids: torch.Tensor, size: int, block: int = 2048) -> torch.Tensor:
    """The kernel, a program for each row, which walks its columns `block` at a time, a power of two.

    Raises ValueError where logits are not [N, V] with adjacent columns and V at least size, or token_ids not [N].
    """
    check_logits(logits, size)
    if token_ids.shape != logits.shape[:1] or not token_ids.is_contiguous():
        raise ValueError(f"token_ids must be contiguous, [{len(logits)}], got {tuple(token_ids.shape)}")
    out = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    options = dict(BLOCK=block, num_warps=8, **launch_options(logits.device))
    _log_probability_kernel[(len(logits),)](logits, logits.stride(0), token_ids, out, size, **options)
    return out


@triton.jit
def _log_probability_kernel(
    logits_ptr, row_stride, token_ids_ptr, out_ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)  # grid (N,)
    logits_row = logits_ptr + row * row_stride
    n = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, size, BLOCK):
        x = tl.load(logits_row + start + n, mask=start + n < size, other=-float("inf")).to(tl.float32)
        # NaN is never the maximum, but makes the total NaN
        higher = tl.maximum(largest, x)
        reference = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)
        total = total * tl.exp(largest - reference) + tl.exp(x - reference)
        largest = higher
    top = tl.max(largest, axis=0)
    infinite = tl.abs(top) == float("inf")
    top = tl.where(infinite, 0.0, top)
    total = tl.sum(total * tl.exp(tl.minimum(largest - top, 0.0)), axis=0)
    token_id = tl.load(token_ids_ptr + row)
    x = tl.load(logits_row + token_id).to(tl.float32)
    value = x - top - tl.log(tl.where(infinite, 1.0, total))
    tl.store(out_ptr + row, tl.where(infinite, float("nan"), value).to(tl.float64))
