"""Residual addition and RMSNorm (arXiv 1910.07467), as LLaDA computes it: in float32, cast back, then the weight."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, d], weight [d] -> [T, d] in x's dtype. The mean square is taken in float32 (float64 for float64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [T, d] -> (rms_norm(x + residual), x + residual). residual is overwritten with the sum."""
    residual.add_(x)
    return rms_norm(residual, weight, eps), residual
