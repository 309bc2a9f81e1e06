"""Shared by `linear` and `fp8_linear` besides their kernels: outputs, and parts of a split depth (split-K)."""

import torch
import triton


def empty_product(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, splits: int, gated: bool) -> torch.Tensor:
    """x [T, K], weight [N, K], of a gated product [2 * N, K] -> [splits, T, N], unwritten: of dtype if there is one
    part, else float32. Raises ValueError if shapes do not fit, and for a gate that is split."""
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1] != x.shape[1] or (gated and weight.shape[0] % 2):
        raise ValueError(f"x [T, K] and weight [N, K] do not fit: {tuple(x.shape)} and {tuple(weight.shape)}")
    if gated and splits > 1:
        raise ValueError(f"a gated product cannot be added up from parts, got splits={splits}")
    shape = splits, x.shape[0], weight.shape[0] // (2 if gated else 1)
    return torch.empty(shape, dtype=dtype if splits == 1 else torch.float32, device=x.device)


def choose_splits(tiles: int, depth: int, processors: int) -> int:
    """As many parts as give each processor a tile, of a depth of 1,024 at least."""
    return max(1, min(processors // tiles, depth // 1024))


def part_of_depth(depth: int, block_k: int, splits: int) -> int:
    """The depth of each part but the last, a multiple of block_k."""
    return triton.cdiv(triton.cdiv(depth, block_k), splits) * block_k
