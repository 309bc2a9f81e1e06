"""Quantised weights as the tests compare them."""

import torch

from blockinfer.kernels.quantize import QuantizedWeight


def dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """[N, K]; the scale is applied in `dtype`, float32 or wider."""
    return weight.values.to(dtype) * weight.scale.to(dtype)
