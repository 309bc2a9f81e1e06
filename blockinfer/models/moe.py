"""Layers of mixture-of-experts networks: attention with per-head norms, and the MLPs."""

from functools import partial

import torch
from torch import nn

from blockinfer.kernels.attention import attention
from blockinfer.kernels.experts import mixture
from blockinfer.kernels.kv_store import HeadNorms, rope_tables
from blockinfer.kernels.linear import gated_linear, linear, linear_parts
from blockinfer.kernels.norm import add_rms_norm
from blockinfer.kernels.router import route
from blockinfer.kernels.segments import SegmentTable
from blockinfer.models.moe_config import MoEConfig
from blockinfer.models.transformer import Transformer, unfilled


class DenseMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MoEConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up_proj = unfilled(2 * config.mlp_hidden_size, config.d_model, dtype=dtype, device=device)
        self.down_proj = unfilled(config.d_model, config.mlp_hidden_size, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, d] -> [T, d], or parts [S, T, d]."""
        return linear_parts(gated_linear(x, self.gate_up_proj), self.down_proj)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names that both families use."""
        gate, up = self.gate_up_proj.chunk(2)
        return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": self.down_proj}


class Mixture(nn.Module):
    """Experts and their router. A shared expert, which serves all rows, is stored after the others."""

    def __init__(self, config: MoEConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        weight = partial(unfilled, dtype=dtype, device=device)
        self.rule = config.rule
        self.gate = weight(config.num_experts, config.d_model)
        # added to the scores in float32, whatever the network's dtype
        bias = unfilled(config.num_experts, dtype=torch.float32, device=device)
        self.bias = bias if config.router_bias else None
        self.gate_up = weight(config.all_experts, 2 * config.expert_hidden_size, config.d_model)
        self.down = weight(config.all_experts, config.d_model, config.expert_hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, d] -> [T, d], or parts [S, T, d]."""
        return mixture(x, route(x, self.gate, self.bias, self.rule), self.gate_up, self.down)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names that both families use."""
        tensors = {"gate.weight": self.gate}
        if self.bias is not None:
            tensors["gate.expert_bias"] = self.bias
        names = [f"experts.{i}" for i in range(len(self.gate))] + ["shared_experts"] * self.rule.shared
        for name, gate_up, down in zip(names, self.gate_up, self.down, strict=True):
            gate, up = gate_up.chunk(2)
            tensors |= {f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up}
            tensors[f"{name}.down_proj.weight"] = down
        return tensors


def mlp_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of `DenseMLP`, or of one expert."""
    return {
        "gate_proj.weight": (hidden, width),
        "up_proj.weight": (hidden, width),
        "down_proj.weight": (width, hidden),
    }


class MoELayer(nn.Module):
    """One transformer block; the first dense_layers have a dense MLP. q, k and v are one matrix."""

    def __init__(self, config: MoEConfig, index: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        weight = partial(unfilled, dtype=dtype, device=device)
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        self.attn_norm = weight(config.d_model)
        self.qkv_proj = weight((config.n_heads + 2 * config.n_kv_heads) * config.head_dim, config.d_model)
        self.q_norm, self.k_norm = weight(config.head_dim), weight(config.head_dim)
        self.attn_out = weight(config.d_model, config.d_model)
        self.ff_norm = weight(config.d_model)
        self.mlp = (DenseMLP if index < config.dense_layers else Mixture)(config, dtype, device)

    def attend(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        kv_pages: torch.Tensor,
        table: SegmentTable,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `models.llada.LLaDALayer.attend`."""
        x, residual = add_rms_norm(x, residual, self.attn_norm, self.eps)
        qkv = linear(x, self.qkv_proj).unflatten(-1, (-1, self.head_dim))
        norms = HeadNorms(self.q_norm, self.k_norm, self.eps)
        out = None if out is None else out.unflatten(-1, (-1, self.head_dim))
        return attention(qkv, cos_sin, kv_pages, table, out, norms).flatten(1)

    def finish(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """As `models.llada.LLaDALayer.finish`."""
        x, _ = add_rms_norm(linear_parts(attended, self.attn_out), residual, self.ff_norm, self.eps)
        return self.mlp(x)


class MoETransformer(Transformer):
    """A network of `MoELayer`s; RoPE's cos and sin are rounded to the network's dtype."""

    def __init__(self, config: MoEConfig, dtype: torch.dtype, device: torch.device, max_model_len: int) -> None:
        layers = (MoELayer(config, i, dtype, device) for i in range(config.n_layers))
        cos_sin = rope_tables(config.rotary_dim, max_model_len, config.rope_theta, dtype, device).to(dtype)
        super().__init__(config, layers, cos_sin, dtype, device)
