"""Dense LLaDA (arXiv 2502.09992): a pre-norm transformer with RMSNorm, RoPE and SwiGLU, and no causal mask."""

import math
from functools import partial

import torch
from torch import nn

from blockinfer.config import ModelConfig
from blockinfer.kernels.kv_store import rope_store_kv, rope_tables
from blockinfer.kernels.linear import gated_linear, linear, linear_parts
from blockinfer.kernels.norm import add_rms_norm
from blockinfer.kernels.paged_attention import SegmentTable, paged_attention


class LLaDALayer(nn.Module):
    """One transformer block. q, k, v are one matrix, gate and up another."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        weight = partial(_weight, dtype=dtype, device=device)
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        self.attn_norm = weight(config.d_model)
        self.qkv_proj = weight((config.n_heads + 2 * config.n_kv_heads) * config.head_dim, config.d_model)
        self.attn_out = weight(config.d_model, config.d_model)
        self.ff_norm = weight(config.d_model)
        self.gate_up_proj = weight(2 * config.mlp_hidden_size, config.d_model)
        self.ff_out = weight(config.d_model, config.mlp_hidden_size)

    def attend(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        kv_pages: torch.Tensor,
        table: SegmentTable,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, d], or parts of it [S, T, d]: the previous layer's output, which is added to residual [T, d] -> what
        the heads attended to, [T, d], in `out` where it is given.

        kv_pages [2, pages, P, HK, D]: this layer's cache. All K and V are written before any attention reads them.
        """
        x, residual = add_rms_norm(x, residual, self.attn_norm, self.eps)
        qkv = linear(x, self.qkv_proj).unflatten(-1, (-1, self.head_dim))
        q = rope_store_kv(qkv, cos_sin, kv_pages[0], kv_pages[1], table.kv_slots)
        out = None if out is None else out.unflatten(-1, (-1, self.head_dim))
        return paged_attention(q, kv_pages[0], kv_pages[1], table, out).flatten(1)

    def finish(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """attended [T, d], residual [T, d], to which the attention's output is added -> the layer's output, [T, d], or
        parts of it [S, T, d], not yet added."""
        x = linear_parts(attended, self.attn_out)
        x, residual = add_rms_norm(x, residual, self.ff_norm, self.eps)
        return linear_parts(gated_linear(x, self.gate_up_proj), self.ff_out)


class LLaDA(nn.Module):
    """The model over a paged KV cache; logits at a position predict the token at that position, without a shift."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, max_model_len: int) -> None:
        super().__init__()
        self.config = config
        self.wte = _weight(config.embedding_size, config.d_model, dtype=dtype, device=device)
        self.layers = nn.ModuleList(LLaDALayer(config, dtype, device) for _ in range(config.n_layers))
        self.ln_f = _weight(config.d_model, dtype=dtype, device=device)
        tied = config.weight_tying
        self.lm_head = self.wte if tied else _weight(*self.wte.shape, dtype=dtype, device=device)
        self.cos_sin = rope_tables(config.head_dim, max_model_len, config.rope_theta, dtype, device)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_pages: torch.Tensor,
        table: SegmentTable,
        attended: torch.Tensor,
        residual: torch.Tensor,
    ) -> None:
        """token_ids, positions [T] int64; kv_pages [layers, 2, pages, P, HK, D], written. All up to the last layer's
        attention, which every row needs; what `logits` goes on with, attended and residual [T, d], is written."""
        torch.index_select(self.wte, 0, token_ids, out=residual)
        x = torch.zeros_like(residual)
        cos_sin = self.cos_sin[positions]
        *others, last = zip(self.layers, kv_pages, strict=True)
        for layer, layer_pages in others:
            x = layer.finish(layer.attend(x, residual, cos_sin, layer_pages, table), residual)
        last[0].attend(x, residual, cos_sin, last[1], table, attended)

    def logits(self, attended: torch.Tensor, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """attended, residual [T, d], as `forward` wrote them; rows [N] int64 -> their logits, [N, embedding_size]."""
        attended, residual = attended[rows], residual[rows]
        x = self.layers[-1].finish(attended, residual)
        return linear(add_rms_norm(x, residual, self.ln_f, self.config.rms_norm_eps)[0], self.lm_head)

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        """The published tensor names and the part of a parameter that each fills, in the published shape."""
        tensors = {"wte": self.wte, "ln_f": self.ln_f}
        if not self.config.weight_tying:
            tensors["ff_out"] = self.lm_head
        q_rows = self.config.d_model
        kv_rows = self.config.n_kv_heads * self.config.head_dim
        for i, layer in enumerate(self.layers):
            q, k, v = layer.qkv_proj.split([q_rows, kv_rows, kv_rows])
            gate, up = layer.gate_up_proj.chunk(2)
            parts = {"attn_norm": layer.attn_norm, "ff_norm": layer.ff_norm, "q_proj": q, "k_proj": k, "v_proj": v}
            parts |= {"attn_out": layer.attn_out, "ff_proj": gate, "up_proj": up, "ff_out": layer.ff_out}
            tensors |= {f"blocks.{i}.{name}": tensor for name, tensor in parts.items()}
        return {f"model.transformer.{name}.weight": tensor for name, tensor in tensors.items()}


def published_shapes(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """What `LLaDA.checkpoint_tensors` has, by arithmetic alone: of the model, and of each layer."""
    d, kv_rows, mlp = config.d_model, config.n_kv_heads * config.head_dim, config.mlp_hidden_size
    model = {"wte": (config.embedding_size, d), "ln_f": (d,)}
    if not config.weight_tying:
        model["ff_out"] = model["wte"]
    layer = {"attn_norm": (d,), "ff_norm": (d,), "q_proj": (d, d), "k_proj": (kv_rows, d), "v_proj": (kv_rows, d)}
    layer |= {"attn_out": (d, d), "ff_proj": (mlp, d), "up_proj": (mlp, d), "ff_out": (d, mlp)}
    return model, layer


def num_parameters(config: ModelConfig) -> int:
    model, layer = (sum(map(math.prod, shapes.values())) for shapes in published_shapes(config))
    return model + config.n_layers * layer


def _weight(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Unfilled: `weights.py` fills it."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
