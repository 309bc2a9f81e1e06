"""The config.json of dense LLaDA checkpoints."""

from collections.abc import Mapping
from typing import Any

from blockinfer.model_config import MAX_LAYERS, ModelConfig, architecture, check_heads, check_tokens
from blockinfer.models.hf_config import hf_reader
from blockinfer.quantization import read_quantization

# Values that the network implements. A config with other values is refused; missing fields are accepted.
_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "activation_type": ("silu",),
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "clip_qkv": (None,),
    # compressed-tensors' name for quantization_config before it joined transformers
    "compression_config": (None,),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False, None),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "partial_rotary_factor": (1.0, None),
    "rope": (True,),
    "rope_full_precision": (True,),
    "scale_logits": (False, None),
    "sliding_window": (False, None),
}

# The published config of GSAI-ML/LLaDA-8B-Instruct.
LLADA_8B: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "weight_tying": False,
    "eos_token_id": 126081,
    "mask_token_id": 126336,
    "torch_dtype": "bfloat16",
}


def read_llada_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """Reads a config.json's content; `source` names it in errors.

    Raises ValueError for a missing or impossible size and for a value that the network does not implement.
    """
    # transformers 5 writes rope_parameters beside these fields
    read = hf_reader(raw, source)
    read.refuse_others(_IMPLEMENTED)
    n_heads = read.integer("n_heads")
    n_kv_heads = raw.get("n_kv_heads")
    if n_kv_heads is None:
        n_kv_heads = 1 if raw.get("multi_query_attention") else n_heads
    else:
        n_kv_heads = read.integer("n_kv_heads")
    d_model = read.integer("d_model")
    vocab_size = read.integer("vocab_size")
    has_mlp_size = raw.get("mlp_hidden_size") is not None
    config = ModelConfig(
        architecture=architecture(raw, source),
        d_model=d_model,
        n_layers=read.integer("n_layers", MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        mlp_hidden_size=read.integer("mlp_hidden_size") if has_mlp_size else d_model * read.integer("mlp_ratio"),
        vocab_size=vocab_size,
        embedding_size=vocab_size if raw.get("embedding_size") is None else read.integer("embedding_size"),
        max_sequence_length=read.integer("max_sequence_length"),
        rope_theta=read.positive("rope_theta"),
        rms_norm_eps=read.positive("rms_norm_eps"),
        weight_tying=read.boolean("weight_tying"),
        eos_token_ids=read.token_ids("eos_token_id"),
        mask_token_id=read.mask_token_id(),
        dtype=read.dtype(),
        quantization=read_quantization(raw, source),
    )
    check_heads(source, ("d_model", "n_heads", "n_kv_heads"), d_model, n_heads, n_kv_heads)
    if config.embedding_size < config.vocab_size:
        raise ValueError(f"{source}: embedding_size={config.embedding_size} is below vocab_size={config.vocab_size}")
    check_tokens(source, config)
    return config
