"""Memory that a model needs and memory that is free, in bytes, computed before anything is allocated."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from blockinfer.config import EngineConfig, ModelConfig
from blockinfer.kernels.quantize import multiplies_fp8
from blockinfer.models.published import num_parameters
from blockinfer.models.registry import model_class, published

# Python's bookkeeping for a page and for a slot; a layer's modules.
_PAGE_HOST_BYTES, _SLOT_HOST_BYTES, _LAYER_HOST_BYTES = 64, 512, 12_000
# Per token of the vocabulary: the rows that go through the LM head at once, times three.
_COLUMN_BYTES = 3 * 1024


def check_fits(model: ModelConfig, config: EngineConfig) -> None:
    """Raises ValueError if weights, KV cache and working memory exceed the free memory. The cache counts
    kv_cache_memory or, without it, one page."""
    ranks, free = config.tensor_parallel_size, free_memory(config.device) // _ranks_beside(config)
    weights = weight_bytes(model, config) + model.n_layers * _LAYER_HOST_BYTES
    working = _working_bytes(model, config)
    pages = num_pages(model, config, max(0, free - weights - working)) if config.kv_cache_memory else 1
    cache = pages * page_bytes(model, config)
    if weights + working + cache > free:
        dtype = str(config.dtype).removeprefix("torch.") + f" and {config.quantization}" * bool(config.quantization)
        raise ValueError(
            f"{config.model} needs {_gb(weights + working + cache)} on {config.device}"
            f"{f' for each of {ranks} ranks' * (ranks > 1)}, {_gb(free)} are free: "
            f"{_gb(weights)} for the weights in {dtype} (dtype), "
            f"{_gb(cache)} for the KV cache (kv_cache_memory, page_size), "
            f"{_gb(working)} to work with (max_num_seqs={config.max_num_seqs}, max_model_len={config.max_model_len}, "
            f"max_num_batched_tokens={config.max_num_batched_tokens})"
        )


def weight_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Of one rank. A quantised layer's matrices take a byte per value and 4 bytes per output channel; a rank that
    splits a matrix by columns keeps all its channels' scales."""
    groups, itemsize, ranks = published(model), config.dtype.itemsize, config.tensor_parallel_size
    of_model = model_class(model.architecture, "")
    total = itemsize * num_parameters(groups, ranks, {of_model.EMBEDDINGS})
    for group in groups:
        if config.quantization and group.indices:
            matrices = ((name, shape) for name, shape in group.shapes.items() if len(shape) == 2)
            saved = sum(
                rows * columns // ranks * (itemsize - 1) - 4 * rows // (1 if name in of_model.BY_COLUMNS else ranks)
                for name, (rows, columns) in matrices
            )
            total -= math.prod(map(len, group.indices)) * saved
    return total


def num_pages(model: ModelConfig, config: EngineConfig, free: int) -> int:
    """Pages of the KV cache: what max_num_seqs requests of max_model_len can ever need, within kv_cache_memory bytes.
    Without it the limit is, on a GPU, 90 % of `free` less what a step needs, and on a CPU half of `free`, shared by the
    ranks.

    free: bytes, after the weights are loaded. Raises ValueError if that is less than one page.
    """
    memory = config.kv_cache_memory or _default_cache(model, config, free)
    size = page_bytes(model, config)
    pages = min(memory // size, config.max_num_seqs * -(-config.max_model_len // config.page_size))
    if pages < 1:
        raise ValueError(f"a KV cache of {memory} bytes holds no page; one of {config.page_size} tokens takes {size}")
    return pages


def page_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """K and V of page_size tokens in all layers, for one rank's heads."""
    width = model.n_kv_heads // config.tensor_parallel_size * model.head_dim
    return 2 * model.n_layers * config.page_size * width * config.dtype.itemsize


def free_memory(device: torch.device) -> int:
    """What can still be allocated: on the GPU, or in the machine and within its cgroups' limits."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return max(0, min([_machine_free(), *_cgroups_free()]))


def _default_cache(model: ModelConfig, config: EngineConfig, free: int) -> int:
    if config.device.type == "cuda":
        return max(0, int(free * 0.9) - _step_bytes(model, config))
    return free // 2 // _ranks_beside(config)


def _ranks_beside(config: EngineConfig) -> int:
    """How many ranks use the same memory; on GPUs each has its own."""
    return 1 if config.device.type == "cuda" else config.tensor_parallel_size


def _step_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """The peak of a layer, with an FP8 matrix dequantised where it cannot be multiplied directly, and that of the LM
    head."""
    numbers = config.max_num_batched_tokens * model.step_width
    if config.quantization and not multiplies_fp8(config.device):
        numbers += 2 * model.mlp_hidden_size * model.d_model
    columns = model.embedding_size // config.tensor_parallel_size
    return numbers * config.dtype.itemsize + columns * _COLUMN_BYTES


def _working_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """The state kept for positions and slots, plus what the largest step takes."""
    slots, length = config.max_num_seqs + 1, config.max_model_len
    # per position: the token, whether it is masked, and the result; per page: its number
    state = slots * (length * 17 + -(-length // config.page_size) * (8 + _PAGE_HOST_BYTES) + _SLOT_HOST_BYTES)
    rotations = length * model.head_dim * max(4, config.dtype.itemsize)
    return state + rotations + _step_bytes(model, config)


def _machine_free() -> int:
    """Linux's own estimate, including caches that it would give up; elsewhere all memory."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroups_free(root: Path = Path("/")) -> Iterator[int]:
    """What each cgroup above this process (version 1 or 2, also in a container) leaves: its limit minus its usage
    without file caches."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            top, limit, used, total = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            total = "total_"
        else:
            continue
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(top):
                try:
                    stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                    cached = int(stat[f"{total}inactive_file"]) + int(stat[f"{total}active_file"])
                    yield int((place / limit).read_text()) - int((place / used).read_text()) + cached
                except (OSError, ValueError, KeyError):  # no such group here, or "max": no limit
                    continue


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
