"""Muon, the optimizer of the blocks' matrices."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by a quintic Newton-Schulz iteration (K. Jordan, 2024).

    Matrices of one shape are stacked, so that a step is a few batched products. Scaled to Adam's update size. The rate
    `lr` is a tensor of no dimensions, so that a CUDA graph of the step can be given another.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: Tensor, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                self._update(params, group)

    def _update(self, params: list[nn.Parameter], group: dict) -> None:
        grads = torch.stack([p.grad for p in params])
        state = self.state[params[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grads)
        momentum = state["momentum"]
        momentum.lerp_(grads, 1 - group["momentum"])
        iterate = _compiled() if grads.is_cuda else orthogonal
        update = iterate(grads.lerp(momentum, group["momentum"]))
        scale = 0.2 * max(update.shape[-2:]) ** 0.5
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(params, list((update.to(params[0].dtype) * (group["lr"] * scale)).unbind()))


@cache
def _compiled() -> Callable[[Tensor], Tensor]:
    """Cached: wrapping it again takes the host a millisecond."""
    return torch.compile(orthogonal)


def orthogonal(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices of g [n, rows, columns], roughly: singular values in about (.7, 1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x if wide else x.mT
