"""Writes checkpoints of LLaDA's relatives, with random weights, in their published formats."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.checkpoints import save_shards

ILLADA = {
    "architectures": ["ILLaDAForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM"},
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": None,
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "model_type": "illada",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.57.1",
    "vocab_size": 61,
}


LLADA_MOE = {
    "architectures": ["LLaDAMoEModelLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "dense_intermediate_size": 64,
    "expert_intermediate_size": 24,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "max_position_embeddings": 256,
    "model_type": "llada",
    "moe_layer_freq": [1, 1],
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": None,
    "num_attention_heads": 4,
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 1,
    "router_aux_loss_coef": 0.01,
    "router_num_group": None,
    "router_topk_group": None,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": False,
    "vocab_size": 61,
}

LLADA2 = {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "dtype": "float32",
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "max_window_layers": 28,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": 56,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "rotary_dim": 8,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "transformers_version": "4.57.1",
    "use_bias": False,
    "use_cache": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False,
    "vocab_size": 61,
}


class Draw:
    """Random matrices [out, in] of deviation gain / sqrt(in), and norms about 1."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, rows: int, columns: int, gain: float = 1.5) -> torch.Tensor:
        return torch.randn(rows, columns, generator=self.generator) * gain / columns**0.5

    def norm(self, size: int) -> torch.Tensor:
        return 1 + 0.2 * torch.randn(size, generator=self.generator)


def illada_tensors(config: dict, seed: int) -> dict[str, torch.Tensor]:
    draw, d, mlp = Draw(seed), config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    tensors = {"model.embed_tokens.weight": draw.matrix(config["vocab_size"], d, 3.0)}
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm": draw.norm(d), "post_attention_layernorm": draw.norm(d)}
        layer |= {f"self_attn.{x}_proj": draw.matrix(rows, d) for x, rows in (("q", d), ("k", kv), ("v", kv), ("o", d))}
        layer |= {"mlp.gate_proj": draw.matrix(mlp, d), "mlp.up_proj": draw.matrix(mlp, d)}
        layer["mlp.down_proj"] = draw.matrix(d, mlp)
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    tensors["model.norm.weight"] = draw.norm(d)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], d, 3.0)
    return tensors


def llada_moe_tensors(config: dict, seed: int) -> dict[str, torch.Tensor]:
    draw, d, hidden = Draw(seed), config["hidden_size"], config["expert_intermediate_size"]
    D = d // config["num_attention_heads"]
    kv = D * config["num_key_value_heads"]
    tensors = {"model.embed_tokens": draw.matrix(config["vocab_size"], d, 3.0)}
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm": draw.norm(d), "post_attention_layernorm": draw.norm(d)}
        layer |= {f"self_attn.{x}_proj": draw.matrix(rows, d) for x, rows in (("q", d), ("k", kv), ("v", kv), ("o", d))}
        layer |= {f"self_attn.{x}_norm": draw.norm(D) for x in "qk"}
        layer["mlp.gate"] = draw.matrix(config["num_experts"], d)
        for j in range(config["num_experts"]):
            layer |= {f"mlp.experts.{j}.{x}_proj": draw.matrix(hidden, d) for x in ("gate", "up")}
            layer[f"mlp.experts.{j}.down_proj"] = draw.matrix(d, hidden)
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    tensors |= {"model.norm": draw.norm(d), "lm_head": draw.matrix(config["vocab_size"], d, 3.0)}
    return {f"{name}.weight": tensor for name, tensor in tensors.items()}


def llada2_tensors(config: dict, seed: int) -> dict[str, torch.Tensor]:
    draw, d, D = Draw(seed), config["hidden_size"], config["head_dim"]
    experts = config["num_experts"]
    fused = d + 2 * D * config["num_key_value_heads"]
    tensors = {"model.word_embeddings.weight": draw.matrix(config["vocab_size"], d, 3.0)}

    def swiglu(name: str, hidden: int) -> dict[str, torch.Tensor]:
        parts = {f"{name}.{x}_proj.weight": draw.matrix(hidden, d) for x in ("gate", "up")}
        return parts | {f"{name}.down_proj.weight": draw.matrix(d, hidden)}

    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        layer = {"input_layernorm": draw.norm(d), "post_attention_layernorm": draw.norm(d)}
        layer |= {"attention.query_key_value": draw.matrix(fused, d), "attention.dense": draw.matrix(d, d)}
        layer |= {"attention.query_layernorm": draw.norm(D), "attention.key_layernorm": draw.norm(D)}
        tensors |= {f"{name}{key}.weight": tensor for key, tensor in layer.items()}
        if i < config["first_k_dense_replace"]:
            tensors |= swiglu(f"{name}mlp", config["intermediate_size"])
            continue
        tensors[f"{name}mlp.gate.weight"] = draw.matrix(experts, d)
        tensors[f"{name}mlp.gate.expert_bias"] = 0.3 * draw.matrix(1, experts, experts**0.5)[0]
        for j in range(experts):
            tensors |= swiglu(f"{name}mlp.experts.{j}", config["moe_intermediate_size"])
        if config["num_shared_experts"]:
            tensors |= swiglu(f"{name}mlp.shared_experts", config["moe_intermediate_size"])
    tensors |= {"model.norm.weight": draw.norm(d), "lm_head.weight": draw.matrix(config["vocab_size"], d, 3.0)}
    return tensors


TENSORS = {
    "ILLaDAForCausalLM": illada_tensors,
    "LLaDAMoEModelLM": llada_moe_tensors,
    "LLaDAMoEModel": llada_moe_tensors,
    "LLaDA2MoeModelLM": llada2_tensors,
}


def write_family(
    folder: str | Path, config: dict, *, shards: int = 1, seed: int = 0, says: dict | None = None, **changes
) -> Path:
    """The config with `changes`, and tensors of its torch_dtype that belong to it. says: what config.json alone says;
    a field of None is null there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config | changes
    dtype = getattr(torch, config.get("torch_dtype") or config["dtype"])
    tensors = TENSORS[config["architectures"][0]](config, seed)
    tensors = {name: tensor if name.endswith("expert_bias") else tensor.to(dtype) for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config | (says or {}), indent=2))
    save_shards(folder, tensors, shards)
    return folder


def write_tokenizer(folder: Path, special: dict[str, int], size: int, **settings) -> None:
    """A byte-level tokenizer without merges of `size` tokens, these special ones among them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (c not in "ĠĊ", not c.isascii(), c))
    free = [i for i in range(size) if i not in special.values()]
    vocabulary = dict(zip(alphabet, free, strict=False)) | special
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted(special, key=special.get))
    tokenizer.save(str(folder / "tokenizer.json"))
    known = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(known | settings))
