"""What config.json files in Hugging Face's own naming have in common."""

from collections.abc import Mapping
from typing import Any

from blockinfer.checks import shown
from blockinfer.model_config import MAX_LAYERS, ConfigReader, architecture, check_heads

# Values that all of these networks implement.
_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "clip_qkv": (None,),
    # compressed-tensors' name for quantization_config before it joined transformers
    "compression_config": (None,),
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "use_sliding_window": (False, None),
}
# RoPE as implemented: the values allowed in rope_scaling, or in rope_parameters, as transformers 5 writes it.
_PLAIN_ROPE: dict[str, tuple[object, ...]] = {"rope_type": ("default",), "type": ("default",), "factor": (1.0, None)}


def hf_reader(raw: Mapping[str, Any], source: str) -> ConfigReader:
    """A reader that sees the entries of rope_parameters as fields of the config, as in transformers 4.

    Raises ValueError for RoPE of another type.
    """
    lifted = dict(raw)
    for name in ("rope_scaling", "rope_parameters"):
        fields = {} if raw.get(name) is None else raw[name]
        if not isinstance(fields, dict):
            raise ValueError(f"{source}: {name} must be an object or null, got {shown(fields)}")
        for key, value in fields.items():
            if key in ("rope_theta", "partial_rotary_factor"):
                if raw.get(key) not in (None, value):
                    raise ValueError(f"{source}: {key} is {shown(raw[key])}, and in {name} {shown(value)}")
                lifted[key] = value
            elif value not in _PLAIN_ROPE.get(key, ()):
                raise ValueError(f"{source}: {name}={shown(fields)} is not implemented, only RoPE of type 'default' is")
    return ConfigReader(lifted, source)


def read_hf_shape(read: ConfigReader, *, mlp_size: str | None, tied: bool) -> dict[str, Any]:
    """The fields of ModelConfig. mlp_size: the config's name for the width of a dense MLP, None if there is none. tied:
    whether head and embeddings are tied if the config does not say.

    Raises ValueError as a family's `read_config` does.
    """
    raw, source = read.raw, read.source
    read.refuse_others(_IMPLEMENTED)
    if raw.get("sliding_window") is not None and raw.get("use_sliding_window") is not False:
        raise ValueError(f"{source}: sliding_window={shown(raw['sliding_window'])} is not implemented, only None is")
    d_model, n_heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    n_kv_heads = read.integer("num_key_value_heads", default=n_heads)
    check_heads(source, ("hidden_size", "num_attention_heads", "num_key_value_heads"), d_model, n_heads, n_kv_heads)
    if raw.get("head_dim") not in (None, d_model // n_heads):
        raise ValueError(
            f"{source}: head_dim={shown(raw['head_dim'])} is not implemented, only hidden_size / num_attention_heads, "
            f"{d_model // n_heads}, is"
        )
    vocab_size = read.integer("vocab_size")
    return dict(
        architecture=architecture(raw, source),
        d_model=d_model,
        n_layers=read.integer("num_hidden_layers", MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        mlp_hidden_size=0 if mlp_size is None else read.integer(mlp_size),
        vocab_size=vocab_size,
        embedding_size=vocab_size,
        max_sequence_length=read.integer("max_position_embeddings"),
        rope_theta=read.positive("rope_theta"),
        rms_norm_eps=read.positive("rms_norm_eps"),
        weight_tying=tied if raw.get("tie_word_embeddings") is None else read.boolean("tie_word_embeddings"),
        eos_token_ids=read.token_ids("eos_token_id"),
        mask_token_id=read.mask_token_id(),
        dtype=read.dtype(),
    )
