"""LLaDA-MoE (arXiv 2509.24389): bidirectional, with per-head norms and a mixture of experts in every layer.

The published network takes the softmax over all experts in float32, of logits in its own dtype, and uses the weights of
the best experts unnormalized. norm_topk_prob has no effect there, and none here.
"""

from collections.abc import Mapping
from typing import Any

import torch

from blockinfer.checks import shown
from blockinfer.kernels.router import RouterRule
from blockinfer.model_config import ModelConfig, check_tokens, if_embedded
from blockinfer.models.hf_config import hf_reader, read_hf_shape
from blockinfer.models.moe import MoETransformer, mlp_shapes
from blockinfer.models.moe_config import MoEConfig, check_router, read_experts, read_rotary_size
from blockinfer.models.published import TensorGroup

# The shape of inclusionAI/LLaDA-MoE-7B-A1B-Instruct.
LLADA_MOE_7B: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "expert_intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "qk_layernorm": True,
    "vocab_size": 157184,
    "max_position_embeddings": 8192,
    "rope_theta": 50000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# The config names neither.
MASK, EOS = 156895, 156892
_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_score_function": ("softmax", None),
    "qk_layernorm": (True,),
    "routed_scaling_factor": (1.0, None),
    # -2 is the published config class's default
    "router_num_group": (None, 0, 1, -2),
    "router_topk_group": (None, 0, 1, -2),
    "shared_expert_intermediate_size": (None, 0),
}


class LLaDAMoE(MoETransformer):
    EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
    TIED_BY = "tie_word_embeddings"

    @staticmethod
    def read_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
        read = hf_reader(raw, source)
        read.refuse_others(_IMPLEMENTED)
        shape = read_hf_shape(read, mlp_size=None, tied=False)
        _check_frequency(read.raw.get("moe_layer_freq"), shape["n_layers"], source)
        experts = read_experts(read, "expert_intermediate_size")
        rule = RouterRule(top_k=read.integer("num_experts_per_tok"), sigmoid=False, rounded=True)
        check_router(source, experts["num_experts"], rule, ("router_num_group", "router_topk_group"))
        config = MoEConfig(
            **shape,
            **experts,
            usual_mask_token_id=if_embedded(MASK, shape["embedding_size"]),
            usual_eos_token_id=if_embedded(EOS, shape["embedding_size"]),
            dense_layers=0,
            rule=rule,
            router_bias=False,
            rotary_size=read_rotary_size(read, shape["d_model"] // shape["n_heads"], 1.0),
        )
        check_tokens(source, config)
        return config

    @staticmethod
    def published(config: MoEConfig) -> list[TensorGroup]:
        d, kv_rows = config.d_model, config.n_kv_heads * config.head_dim
        model = {"model.embed_tokens.weight": (config.embedding_size, d), "model.norm.weight": (d,)}
        if not config.weight_tying:
            model["lm_head.weight"] = (config.embedding_size, d)
        layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (d, d)}
        layer |= {"self_attn.k_proj": (kv_rows, d), "self_attn.v_proj": (kv_rows, d), "self_attn.o_proj": (d, d)}
        layer |= {"self_attn.q_norm": (config.head_dim,), "self_attn.k_norm": (config.head_dim,)}
        layer["mlp.gate"] = (config.num_experts, d)
        of_layer = {f"{name}.weight": shape for name, shape in layer.items()}
        layers, experts = range(config.n_layers), range(config.num_experts)
        of_expert = mlp_shapes(d, config.expert_hidden_size)
        asked = f"num_hidden_layers={config.n_layers}"
        return [
            TensorGroup("", (), model),
            TensorGroup("model.layers.{}.", (layers,), of_layer, asked),
            TensorGroup(
                "model.layers.{}.mlp.experts.{}.",
                (layers, experts),
                of_expert,
                f"{asked} of num_experts={config.num_experts}",
            ),
        ]

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {"model.embed_tokens.weight": self.wte, "model.norm.weight": self.ln_f}
        if not self.config.weight_tying:
            tensors["lm_head.weight"] = self.lm_head
        kv_rows = self.config.n_kv_heads * self.config.head_dim
        for i, layer in enumerate(self.layers):
            q, k, v = layer.qkv_proj.split([self.config.d_model, kv_rows, kv_rows])
            parts = {"input_layernorm": layer.attn_norm, "post_attention_layernorm": layer.ff_norm}
            parts |= {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
            parts |= {"self_attn.o_proj": layer.attn_out, "self_attn.q_norm": layer.q_norm}
            parts["self_attn.k_norm"] = layer.k_norm
            tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in parts.items()}
            tensors |= {f"model.layers.{i}.mlp.{name}": tensor for name, tensor in layer.mlp.tensors().items()}
        return tensors


def _check_frequency(frequency: object, layers: int, source: str) -> None:
    """moe_layer_freq must be 1 for every layer, or missing."""
    if frequency is not None and frequency not in (1, [1] * layers):
        raise ValueError(
            f"{source}: moe_layer_freq={shown(frequency)} is not implemented, only 1 for each of the {layers} layers is"
        )
