"""Memory of the paged KV cache."""

import math

import torch

from blockinfer.config import EngineConfig
from blockinfer.models.transformer import Transformer


def allocate_pages(model: Transformer, config: EngineConfig, num_pages: int) -> torch.Tensor:
    """[layers, 2, pages, P, HK, D], uninitialized, with this rank's heads and config.dtype. Raises ValueError if the
    memory cannot be allocated."""
    layers, head_dim = model.config.n_layers, model.config.head_dim
    shape = (layers, 2, num_pages, config.page_size, model.n_kv_heads, head_dim)
    try:
        return torch.empty(shape, dtype=config.dtype, device=config.device)
    except RuntimeError as error:
        size = math.prod(shape) * config.dtype.itemsize
        raise ValueError(
            f"the KV cache of {size} bytes cannot be allocated on {config.device}; lower kv_cache_memory, or "
            f"max_num_seqs={config.max_num_seqs} and max_model_len={config.max_model_len}: {error}"
        ) from error
