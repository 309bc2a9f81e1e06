"""Copies from host to device, without waiting."""

from collections.abc import Sequence as Items

import numpy as np
import torch


def _pinned(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """values on the CPU, pinned so that a copy to the device need not be waited for.

    torch's allocator reuses the memory only after copies from it are done.
    """
    return values.pin_memory() if device.type == "cuda" else values


def write(target: torch.Tensor, values: Items[int] | np.ndarray) -> None:
    """Copies int64 values into the target of the same shape, after the device's queued work, without waiting."""
    values = torch.as_tensor(values, dtype=torch.int64)
    target.copy_(_pinned(values, target.device), non_blocking=True)


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device."""
    return _pinned(torch.from_numpy(values), device).to(device, non_blocking=True)
