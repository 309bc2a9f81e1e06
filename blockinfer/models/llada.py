"""Dense LLaDA (arXiv 2502.09992): a pre-norm transformer with RMSNorm, RoPE and SwiGLU, and no causal mask."""

from functools import partial

import torch
from torch import nn

from blockinfer.kernels.attention import attention
from blockinfer.kernels.kv_store import rope_tables
from blockinfer.kernels.linear import Weight, gated_linear, linear, linear_parts
from blockinfer.kernels.quantize import QuantizedWeight
from blockinfer.kernels.ranks import ALONE, Ranks
from blockinfer.kernels.segments import SegmentTable
from blockinfer.model_config import ModelConfig
from blockinfer.models.llada_config import read_llada_config
from blockinfer.models.published import TensorGroup
from blockinfer.models.transformer import Transformer, unfilled


class LLaDALayer(nn.Module):
    """One transformer block. q, k and v are one matrix, gate and up another.

    Each rank has whole heads and a share of the MLP: rows of these two matrices, and columns of those that lead back to
    d_model, whose products are all-reduced (arXiv 1909.08053).
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        weight = partial(unfilled, dtype=dtype, device=device)
        matrix = partial(QuantizedWeight.empty, device=device) if quantization else weight
        self.quantized = quantization is not None
        self.ranks = ranks
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        width, hidden = config.d_model // ranks.size, config.mlp_hidden_size // ranks.size
        kv_width = config.n_kv_heads // ranks.size * config.head_dim
        self.attn_norm = weight(config.d_model)
        self.qkv_proj = matrix(width + 2 * kv_width, config.d_model)
        self.attn_out = matrix(config.d_model, width)
        self.ff_norm = weight(config.d_model)
        self.gate_up_proj = matrix(2 * hidden, config.d_model)
        self.ff_out = matrix(config.d_model, hidden)

    def attend(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        kv_pages: torch.Tensor,
        table: SegmentTable,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x: the previous layer's output as `finish` returned it, None in the first layer; it is added to residual [T,
        d] -> the attention's output for this rank's heads, [T, heads * D].

        kv_pages [2, pages, P, HK, D]: this layer's KV cache. out: given to the last layer, for its output; only then
        all rows of residual are up to date on every rank (`Ranks.add_rms_norm`).
        """
        x = self.ranks.add_rms_norm(x, residual, self.attn_norm, self.eps, self.quantized, whole=out is not None)
        qkv = linear(x, self.qkv_proj).unflatten(-1, (-1, self.head_dim))
        out = None if out is None else out.unflatten(-1, (-1, self.head_dim))
        return attention(qkv, cos_sin, kv_pages, table, out).flatten(1)

    def finish(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """attended [T, heads * D]; residual [T, d], to which the attention's output projection is added -> this rank's
        share of the layer's output, [T, d] or parts [S, T, d], not yet added to the residual."""
        x = self._share(attended, self.attn_out)
        x = self.ranks.add_rms_norm(x, residual, self.ff_norm, self.eps, self.quantized)
        return self._share(gated_linear(x, self.gate_up_proj), self.ff_out)

    def _share(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """x [T, K]: this rank's share of the inner dimension -> its share of the product, [T, d] or parts [S, T, d]."""
        return linear_parts(x, weight, self.ranks.sum_out(len(x)))

    def split(self) -> list[torch.Tensor | QuantizedWeight]:
        """Views of q, k, v, gate and up as separate matrices."""
        kv_rows = (self.qkv_proj.shape[0] - self.attn_out.shape[1]) // 2
        return [*self.qkv_proj.split([self.attn_out.shape[1], kv_rows, kv_rows]), *self.gate_up_proj.chunk(2)]


class LLaDA(Transformer):
    """Published names: `ff_out` is the head and, inside a block, the MLP's last matrix."""

    EMBEDDINGS, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
    TIED_BY = "weight_tying"
    QUANTIZES = IS_SHARED = True
    BY_COLUMNS = "attn_out.weight", "ff_out.weight"
    read_config = staticmethod(read_llada_config)

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        quantization: str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        layers = (LLaDALayer(config, dtype, device, quantization, ranks) for _ in range(config.n_layers))
        cos_sin = rope_tables(config.head_dim, max_model_len, config.rope_theta, dtype, device)
        super().__init__(config, layers, cos_sin, dtype, device, ranks)

    @staticmethod
    def published(config: ModelConfig) -> list[TensorGroup]:
        d, kv_rows, mlp = config.d_model, config.n_kv_heads * config.head_dim, config.mlp_hidden_size
        model = {"wte": (config.embedding_size, d), "ln_f": (d,)}
        if not config.weight_tying:
            model["ff_out"] = model["wte"]
        layer = {"attn_norm": (d,), "ff_norm": (d,), "q_proj": (d, d), "k_proj": (kv_rows, d), "v_proj": (kv_rows, d)}
        layer |= {"attn_out": (d, d), "ff_proj": (mlp, d), "up_proj": (mlp, d), "ff_out": (d, mlp)}
        of_model, of_layer = ({f"{k}.weight": v for k, v in shapes.items()} for shapes in (model, layer))
        asked = f"n_layers={config.n_layers}"
        return [
            TensorGroup("model.transformer.", (), of_model),
            TensorGroup("model.transformer.blocks.{}.", (range(config.n_layers),), of_layer, asked),
        ]

    def checkpoint_tensors(self) -> dict[str, torch.Tensor | QuantizedWeight]:
        tensors = {"wte": self.wte, "ln_f": self.ln_f}
        if not self.config.weight_tying:
            tensors["ff_out"] = self.lm_head
        for i, layer in enumerate(self.layers):
            q, k, v, gate, up = layer.split()
            parts = {"attn_norm": layer.attn_norm, "ff_norm": layer.ff_norm, "q_proj": q, "k_proj": k, "v_proj": v}
            parts |= {"attn_out": layer.attn_out, "ff_proj": gate, "up_proj": up, "ff_out": layer.ff_out}
            tensors |= {f"blocks.{i}.{name}": tensor for name, tensor in parts.items()}
        return {f"model.transformer.{name}.weight": tensor for name, tensor in tensors.items()}
