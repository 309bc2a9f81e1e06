"""LLaDA2.0 and 2.1 (arXiv 2512.15745): partial RoPE, per-head norms, and experts in groups, one of them shared.

Router scores are sigmoids of logits in float32. Experts are chosen by score plus bias from the best groups; their
weights are the scores, divided by their sum and scaled.
"""

from collections.abc import Mapping
from typing import Any

import torch

from blockinfer.kernels.router import RouterRule
from blockinfer.model_config import ModelConfig, check_tokens, if_embedded
from blockinfer.models.hf_config import hf_reader, read_hf_shape
from blockinfer.models.llada_moe import EOS, MASK
from blockinfer.models.moe import MoETransformer, mlp_shapes
from blockinfer.models.moe_config import MoEConfig, check_router, read_experts, read_rotary_size
from blockinfer.models.published import TensorGroup

# The published config of inclusionAI/LLaDA2.0-mini, which 2.1-mini shares.
LLADA2_MINI: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 4,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "vocab_size": 157184,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
# All were trained with it; their configs do not say so.
BLOCK_LENGTH = 32
_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    # a checkpoint tuned to another block length
    "block_length": (BLOCK_LENGTH, None),
    "block_size": (BLOCK_LENGTH, None),
    # LLaDA2.2, under the same architecture name: experts are chosen per block, and tokens can move others
    "delete_token_id": (None,),
    "expert_capacity": (None,),
    "moe_router_enable_expert_bias": (True,),
    "norm_head": (False, None),
    "norm_softmax": (False, None),
    "norm_topk_prob": (True,),
    "num_shared_experts": (1, 0, None),
    "router_dtype": ("fp32", None),
    "score_function": ("sigmoid",),
    "split_token_id": (None,),
    "use_bias": (False, None),
    "use_qk_norm": (True,),
    "use_qkv_bias": (False, None),
    "use_rmsnorm": (True,),
    "using_split_qkv_in_self_attention": (False, None),
}


class LLaDA2(MoETransformer):
    EMBEDDINGS, HEAD = "model.word_embeddings.weight", "lm_head.weight"
    TIED_BY = "tie_word_embeddings"

    @staticmethod
    def read_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
        read = hf_reader(raw, source)
        read.refuse_others(_IMPLEMENTED)
        shape = read_hf_shape(read, mlp_size="intermediate_size", tied=False)
        experts = read_experts(read, "moe_intermediate_size")
        rule = RouterRule(
            top_k=read.integer("num_experts_per_tok"),
            sigmoid=True,
            groups=read.integer("n_group"),
            groups_kept=read.integer("topk_group"),
            # a single score is not normalized
            normalized=read.integer("num_experts_per_tok") > 1,
            scale=read.positive("routed_scaling_factor"),
            shared=read.integer("num_shared_experts", default=0, minimum=0),
        )
        check_router(source, experts["num_experts"], rule, ("n_group", "topk_group"))
        config = MoEConfig(
            **shape,
            **experts,
            usual_mask_token_id=if_embedded(MASK, shape["embedding_size"]),
            usual_eos_token_id=if_embedded(EOS, shape["embedding_size"]),
            dense_layers=read.integer("first_k_dense_replace", shape["n_layers"], default=0, minimum=0),
            rule=rule,
            router_bias=True,
            block_length=BLOCK_LENGTH,
            rotary_size=read_rotary_size(read, shape["d_model"] // shape["n_heads"], 0.5),
        )
        check_tokens(source, config)
        return config

    @staticmethod
    def published(config: MoEConfig) -> list[TensorGroup]:
        d, kv_rows, D = config.d_model, config.n_kv_heads * config.head_dim, config.head_dim
        model = {"model.word_embeddings.weight": (config.embedding_size, d), "model.norm.weight": (d,)}
        if not config.weight_tying:
            model["lm_head.weight"] = (config.embedding_size, d)
        layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,), "attention.dense": (d, d)}
        layer |= {"attention.query_layernorm": (D,), "attention.key_layernorm": (D,)}
        layer["attention.query_key_value"] = (d + 2 * kv_rows, d)
        of_layer = {f"{name}.weight": shape for name, shape in layer.items()}
        of_router = {"gate.weight": (config.num_experts, d), "gate.expert_bias": (config.num_experts,)}
        of_dense, of_expert = mlp_shapes(d, config.mlp_hidden_size), mlp_shapes(d, config.expert_hidden_size)
        if config.rule.shared:
            of_router |= {f"shared_experts.{name}": shape for name, shape in of_expert.items()}
        dense, sparse = range(config.dense_layers), range(config.dense_layers, config.n_layers)
        asked = f"num_hidden_layers={config.n_layers}"
        of_experts = f"{asked} of num_experts={config.num_experts}"
        return [
            TensorGroup("", (), model),
            TensorGroup("model.layers.{}.", (range(config.n_layers),), of_layer, asked),
            TensorGroup("model.layers.{}.mlp.", (dense,), of_dense, asked),
            TensorGroup("model.layers.{}.mlp.", (sparse,), of_router, asked),
            TensorGroup("model.layers.{}.mlp.experts.{}.", (sparse, range(config.num_experts)), of_expert, of_experts),
        ]

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {"model.word_embeddings.weight": self.wte, "model.norm.weight": self.ln_f}
        if not self.config.weight_tying:
            tensors["lm_head.weight"] = self.lm_head
        for i, layer in enumerate(self.layers):
            parts = {"input_layernorm": layer.attn_norm, "post_attention_layernorm": layer.ff_norm}
            parts |= {"attention.query_key_value": layer.qkv_proj, "attention.dense": layer.attn_out}
            parts |= {"attention.query_layernorm": layer.q_norm, "attention.key_layernorm": layer.k_norm}
            tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in parts.items()}
            tensors |= {f"model.layers.{i}.mlp.{name}": tensor for name, tensor in layer.mlp.tensors().items()}
        return tensors
