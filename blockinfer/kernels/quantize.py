"""float8_e4m3fn with one scale per output channel of a weight and per row of activations: a product is scaled once, at
its end."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import nn

from blockinfer.kernels.backend import begin, compute_capability, launch_options, runs_triton

FP8 = torch.float8_e4m3fn
_LARGEST = 448.0  # the largest value of FP8
# the least magnitude assumed for a row: its scale stays a normal number, and zeros stay zeros
_SMALLEST = 1e-12
_LARGEST_IN_KERNELS, _SMALLEST_IN_KERNELS = tl.constexpr(_LARGEST), tl.constexpr(_SMALLEST)


class QuantizedRows(NamedTuple):
    """values [T, K] FP8, scale [T] float32, of what stands for values * scale[:, None] in `dtype`."""

    values: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype


class QuantizedWeight(nn.Module):
    """A matrix [N, K] as values [N, K] FP8 times scale [N, 1] float32. Its rows can be taken apart like a tensor's."""

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> "QuantizedWeight":
        values = torch.empty((rows, columns), dtype=FP8, device=device)
        return cls(values, torch.empty((rows, 1), dtype=torch.float32, device=device))

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def numel(self) -> int:
        return self.values.numel()

    def split(self, sizes: Sequence[int]) -> list["QuantizedWeight"]:
        """Parts with these numbers of rows, which share this one's memory."""
        return list(map(QuantizedWeight, self.values.split(sizes), self.scale.split(sizes)))

    def chunk(self, parts: int) -> list["QuantizedWeight"]:
        return list(map(QuantizedWeight, self.values.chunk(parts), self.scale.chunk(parts)))

    def copy_(self, weight: torch.Tensor) -> None:
        """Quantises weight [N, K], of any floating point type: the scale maps a row's largest value to FP8's. Where a
        row has a NaN or an infinity, so has its scale."""
        wide = weight.to(self.scale.device).float()
        scale = _scale(wide.abs().amax(1, keepdim=True).clamp(min=_SMALLEST))
        self.scale.copy_(scale)
        self.values.copy_(wide / scale)

    def is_finite(self) -> bool:
        is_nan = self.values.view(torch.uint8).bitwise_and(0x7F) == 0x7F
        return bool(self.scale.isfinite().all() and not is_nan.any())


def runs_fp8(x: torch.Tensor) -> bool:
    """Whether FP8 kernels run on x: on a GPU that multiplies FP8, except in float64."""
    return runs_triton(x) and multiplies_fp8(x.device)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device multiplies FP8: GPUs of compute capability 8.9 or more do."""
    return compute_capability(device) >= (8, 9)


def quantize_rows(x: torch.Tensor) -> QuantizedRows:
    """x [T, K], of any floating point type; each row is scaled by its own largest value."""
    return quantize_rows_triton(x) if runs_fp8(x) else quantize_rows_torch(x)


def quantize_rows_torch(x: torch.Tensor) -> QuantizedRows:
    """The twin."""
    wide = x.float()
    largest = wide.abs().amax(1).clamp(min=_SMALLEST)
    inverse = torch.full_like(largest, _LARGEST) / largest
    return QuantizedRows((wide * inverse[:, None]).to(FP8), _scale(largest), x.dtype)


def _scale(largest: torch.Tensor) -> torch.Tensor:
    # torch divides tensors exactly; a tensor by a number, or the reverse, on some devices through a reciprocal
    return largest / torch.full_like(largest, _LARGEST)


def quantize_rows_triton(x: torch.Tensor) -> QuantizedRows:
    """The kernel: a row, which a program holds whole. Raises ValueError where x is not a contiguous [T, K]."""
    if x.ndim != 2 or not x.is_contiguous():
        raise ValueError(f"x must be a contiguous [T, K], got {tuple(x.shape)}")
    rows, columns = x.shape
    values = torch.empty((rows, columns), dtype=FP8, device=x.device)
    scale = torch.empty((rows,), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _quantize_rows_kernel[(rows,)](
        x,
        values,
        scale,
        columns,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
        **launch_options(x.device),
    )
    return QuantizedRows(values, scale, x.dtype)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    columns,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)  # grid (T,)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    store_quantized(x, inside, values_ptr + row * columns + column, scale_ptr + row)


@triton.jit
def store_quantized(x, inside, values_ptr, scale_ptr):
    """A whole row x, float32, 0 where it is not inside: to values_ptr, as wide as x, and its scale to scale_ptr."""
    values, largest = quantized_row(x)
    tl.store(values_ptr, values, mask=inside)
    tl.store(scale_ptr, scale_of(largest))


@triton.jit
def quantized_row(x):
    """A whole row x, float32, 0 past its columns -> its values, and its largest, of which its scale is made."""
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), _SMALLEST_IN_KERNELS)
    return (x * tl.div_rn(_LARGEST_IN_KERNELS, largest)).to(tl.float8e4nv), largest


@triton.jit
def scale_of(largest):
    return tl.div_rn(largest, _LARGEST_IN_KERNELS)
