"""Redundant tensors in a checkpoint: which are allowed, and the check that they change nothing.

A head stored beside tied embeddings is harmless if it equals them; RoPE frequencies, which older versions of
transformers stored with each layer, if they are those of the config's rope_theta.
"""

import torch

from blockinfer.kernels.kv_store import rope_frequencies
from blockinfer.model_config import ModelConfig
from blockinfer.models.registry import model_class
from blockinfer.models.transformer import Transformer

_FREQUENCIES = "rotary_emb.inv_freq"


def harmless_shape(name: str, config: ModelConfig) -> tuple[int, ...] | None:
    """The shape that a redundant tensor of this name must have; None if none is allowed."""
    if config.weight_tying and name == model_class(config.architecture, "").HEAD:
        return config.embedding_size, config.d_model
    if f".{name}".endswith(f".{_FREQUENCIES}"):
        return (config.rotary_dim // 2,)
    return None


def check_harmless(name: str, stored: torch.Tensor, model: Transformer) -> None:
    """Raises ValueError if its values differ from what the network computes with."""
    config = model.config
    if name == model.HEAD:
        if not torch.equal(stored.to(model.wte), model.wte):
            raise ValueError(f"{name} differs from {model.EMBEDDINGS}, and the config's {model.TIED_BY} is true")
        return
    right = rope_frequencies(config.rotary_dim, config.rope_theta, torch.float64, stored.device)
    # the error that a power may have in the stored precision
    if not torch.allclose(stored.double(), right, rtol=16 * torch.finfo(stored.dtype).eps, atol=0.0):
        raise ValueError(f"{name} differs from the frequencies of the config's rope_theta={config.rope_theta:g}")
