"""What a checkpoint's config.json says of tensors that are stored in FP8, and what they stand for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from blockinfer.checks import shown
from blockinfer.kernels.quantize import QuantizedWeight

QUANTIZATIONS = ("fp8",)


@dataclass(frozen=True)
class StoredQuantization:
    """How a checkpoint keeps its layers' matrices: F8_E4M3 values, which are multiplied by scales of their own tensor.

    suffix: what follows a weight's name in that tensor's. block: the rows and columns of one scale; None where a scale
    is of an output channel, or of the whole matrix.
    """

    suffix: str
    block: tuple[int, int] | None = None

    def scale_name(self, weight: str) -> str:
        return weight + self.suffix

    def scale_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Those that the scales of a matrix of this shape may have; the first is the usual one."""
        if self.block:
            return (tuple(-(-size // part) for size, part in zip(shape, self.block, strict=True)),)
        return (shape[0], 1), (shape[0],), (1,), ()

    def load(
        self,
        target: torch.Tensor | QuantizedWeight,
        values: torch.Tensor,
        scale: torch.Tensor,
        share: tuple[slice, ...] | None = None,
    ) -> None:
        """Into a quantised weight as they are, if scales are of its rows; those of blocks are rounded once more, to its
        rows' scales. Into a plain tensor what they stand for. share: the rows and columns of the matrix that the values
        are, if not all; the scale is of the whole."""
        first_row, first_column = (part.start or 0 for part in share or (slice(None), slice(None)))
        scale = scale.float()
        if self.block:
            rows, columns = (torch.arange(size) for size in values.shape)
            rows, columns = (rows + first_row) // self.block[0], (columns + first_column) // self.block[1]
            target.copy_(values.float() * scale[rows[:, None], columns])
            return
        scale = scale.reshape(-1, 1)
        scale = scale[first_row : first_row + len(values)] if len(scale) > 1 else scale
        if isinstance(target, QuantizedWeight):
            target.values.copy_(values)
            target.scale.copy_(scale)
        else:
            target.copy_(values.float() * scale)


def read_quantization(raw: Mapping[str, Any], source: str) -> StoredQuantization | None:
    """Of a config.json's content: None where its tensors are plain. `source` names it in errors.

    compressed-tensors' `float-quantized` and transformers' `fp8` with blocks are read: F8_E4M3 weights, and activations
    that are quantised as they come. Raises ValueError for every other.
    """
    given = raw.get("quantization_config")
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else None
    found = _READERS[method](given) if isinstance(method, str) and method in _READERS else None
    if found is None:
        raise ValueError(
            f"{source}: quantization_config={shown(given)} is not implemented, only weights in FP8 (E4M3) with dynamic "
            "activations are: quant_method 'compressed-tensors' of format 'float-quantized', or 'fp8' with a "
            "weight_block_size"
        )
    return found


def _read_compressed_tensors(given: dict[str, Any]) -> StoredQuantization | None:
    groups = given.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    if given.get("format") != "float-quantized" or given.get("kv_cache_scheme") is not None or len(groups) != 1:
        return None
    group = groups[0] if isinstance(groups[0], dict) else {}
    weights, activations = group.get("weights"), group.get("input_activations")
    if not (_is_fp8(weights) and _is_fp8(activations) and activations.get("dynamic") is True):
        return None
    if weights.get("dynamic") or group.get("output_activations") is not None:
        return None
    if weights.get("strategy") == "block":
        block = _block(weights.get("block_structure"))
        return block and StoredQuantization("_scale", block)
    return StoredQuantization("_scale") if weights.get("strategy") in ("channel", "tensor") else None


def _is_fp8(scheme: Any) -> bool:
    """Symmetric, which is what a scheme that does not say is."""
    if not isinstance(scheme, dict):
        return False
    return (scheme.get("num_bits"), scheme.get("type"), scheme.get("symmetric", True)) == (8, "float", True)


def _read_fp8(given: dict[str, Any]) -> StoredQuantization | None:
    block = _block(given.get("weight_block_size"))
    dynamic = given.get("activation_scheme", "dynamic") == "dynamic"
    plain = given.get("fmt", "e4m3") == "e4m3" and given.get("scale_fmt", "float") in (None, "float")
    return StoredQuantization("_scale_inv", block) if block and dynamic and plain else None


def _block(given: Any) -> tuple[int, int] | None:
    if not isinstance(given, list) or len(given) != 2 or not all(type(size) is int and size > 0 for size in given):
        return None
    return given[0], given[1]


_READERS = {"compressed-tensors": _read_compressed_tensors, "fp8": _read_fp8}
