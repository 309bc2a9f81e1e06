"""iLLaDA (arXiv 2606.25331): LLaDA's layers under the names of Hugging Face's Llama, with grouped-query attention.

Besides names and shapes, rounding differs: RoPE rotates q and k in the model's dtype, by float32 angles.
"""

from collections.abc import Mapping
from typing import Any

import torch

from blockinfer.kernels.kv_store import rope_tables
from blockinfer.kernels.quantize import QuantizedWeight
from blockinfer.kernels.ranks import ALONE, Ranks
from blockinfer.model_config import ModelConfig, check_tokens, if_embedded
from blockinfer.models.hf_config import hf_reader, read_hf_shape
from blockinfer.models.llada import LLaDALayer
from blockinfer.models.published import TensorGroup
from blockinfer.models.transformer import Transformer

# The shape of GSAI-ML/iLLaDA-8B-Instruct. rope_theta is LLaDA's: it does not affect speed.
ILLADA_8B: dict[str, Any] = {
    "architectures": ["ILLaDAForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 155136,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
# Neither its config nor its tokenizer names it.
_MASK = 5
_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "layer_norm_eps": (None,),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
}


class ILLaDA(Transformer):
    EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
    TIED_BY = "tie_word_embeddings"
    QUANTIZES = IS_SHARED = True
    BY_COLUMNS = "self_attn.o_proj.weight", "mlp.down_proj.weight"

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
        cos_sin = rope_tables(config.head_dim, max_model_len, config.rope_theta, dtype, device).to(dtype)
        super().__init__(config, layers, cos_sin, dtype, device, ranks)

    @staticmethod
    def read_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
        read = hf_reader(raw, source)
        read.refuse_others(_IMPLEMENTED)
        shape = read_hf_shape(read, mlp_size="intermediate_size", tied=True)
        config = ModelConfig(**shape, usual_mask_token_id=if_embedded(_MASK, shape["embedding_size"]))
        check_tokens(source, config)
        return config

    @staticmethod
    def published(config: ModelConfig) -> list[TensorGroup]:
        d, kv_rows, mlp = config.d_model, config.n_kv_heads * config.head_dim, config.mlp_hidden_size
        model = {"model.embed_tokens.weight": (config.embedding_size, d), "model.norm.weight": (d,)}
        if not config.weight_tying:
            model["lm_head.weight"] = (config.embedding_size, d)
        layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (d, d)}
        layer |= {"self_attn.k_proj": (kv_rows, d), "self_attn.v_proj": (kv_rows, d), "self_attn.o_proj": (d, d)}
        layer |= {"mlp.gate_proj": (mlp, d), "mlp.up_proj": (mlp, d), "mlp.down_proj": (d, mlp)}
        of_layer = {f"{name}.weight": shape for name, shape in layer.items()}
        asked = f"num_hidden_layers={config.n_layers}"
        return [
            TensorGroup("", (), model),
            TensorGroup("model.layers.{}.", (range(config.n_layers),), of_layer, asked),
        ]

    def checkpoint_tensors(self) -> dict[str, torch.Tensor | QuantizedWeight]:
        tensors = {"model.embed_tokens": self.wte, "model.norm": self.ln_f}
        if not self.config.weight_tying:
            tensors["lm_head"] = self.lm_head
        for i, layer in enumerate(self.layers):
            q, k, v, gate, up = layer.split()
            parts = {"input_layernorm": layer.attn_norm, "post_attention_layernorm": layer.ff_norm}
            parts |= {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
            parts |= {"self_attn.o_proj": layer.attn_out, "mlp.gate_proj": gate, "mlp.up_proj": up}
            parts["mlp.down_proj"] = layer.ff_out
            tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in parts.items()}
        return {f"{name}.weight": tensor for name, tensor in tensors.items()}
