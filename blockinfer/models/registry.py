"""Which class serves which checkpoint, by the config's `architectures`, and shapes known by name."""

from typing import Any

from blockinfer.checks import shown
from blockinfer.models.llada import LLaDA

MODELS: dict[str, type[LLaDA]] = {"LLaDAModelLM": LLaDA}

# The published config of GSAI-ML/LLaDA-8B-Instruct, for random weights of its shape (load_format="dummy").
SHAPES: dict[str, dict[str, Any]] = {
    "llada-8b": {
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
}


def model_class(architecture: str, source: str) -> type[LLaDA]:
    """Raises ValueError for an architecture that is not implemented, naming those that are."""
    if architecture not in MODELS:
        # no nearest name: a checkpoint's is hardly mistyped, and LLaDA's relatives differ in one syllable
        raise ValueError(
            f"{source}: architecture {shown(architecture)} is not implemented, only {', '.join(MODELS)} is"
        )
    return MODELS[architecture]
