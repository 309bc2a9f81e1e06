"""Classifier-free guidance of logits (arXiv 2207.12598), as LLaDA's generate.py has it."""

from typing import NamedTuple

import torch


class Guidance(NamedTuple):
    """Of each row, [N]: how many rows further its shadow's is, int64, and cfg_scale, float64; both 0 of a row that is
    not guided."""

    shift: torch.Tensor
    scale: torch.Tensor


def guide(logits: torch.Tensor, shadow: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """logits with the prompt and shadow without it, [N, V]; scale [N] -> shadow + (scale + 1) (logits - shadow), [N, V]
    in their dtype, computed in at least float32; where the scale is 0, the logits unchanged."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    apart = logits.to(wide) - shadow.to(wide)
    guided = apart.mul_((scale[:, None] + 1).to(wide)).add_(shadow)
    return torch.where(scale[:, None] > 0, guided.to(logits.dtype), logits)
