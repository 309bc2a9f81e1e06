"""How a config.json describes tensors stored in FP8, and how to load them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from blockinfer.checks import shown
from blockinfer.kernels.quantize import QuantizedWeight

QUANTIZATIONS = ("fp8",)


@dataclass(frozen=True)
class StoredQuantization:
    """How a checkpoint stores its layers' matrices: F8_E4M3 values, multiplied by scales from a separate tensor.

    suffix: appended to a weight's name to name its scales. block: the rows and columns that share a scale; None if
    there is one per output channel or per matrix.
    """

    suffix: str
    block: tuple[int, int] | None = None

    def scale_name(self, weight: str) -> str:
        return weight + self.suffix

    def scale_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The shapes that the scales of a matrix of this shape may have; the first is the usual one."""
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
        """Into a quantised weight: copied as they are if the scales are per row; with block scales rounded once more,
        to per-row scales. Into a plain tensor: dequantised. share: the rows and columns of the matrix that `values`
        holds, if not all; `scale` is always of the whole matrix."""
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
    """Reads a config.json's content; None if its tensors are plain. `source` names it in errors.

    Supports compressed-tensors' `float-quantized` and transformers' `fp8` with blocks: F8_E4M3 weights, with
    activations quantised on the fly. Raises ValueError for any other.
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
    """A scheme that does not say counts as symmetric."""
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
