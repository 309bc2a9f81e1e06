"""From the host to the device, without waiting."""

from collections.abc import Sequence as Items

import numpy as np
import torch


def _pinned(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """values on the CPU, from where a copy to the device need not be waited for.

    The memory is torch's own, which gives it out again only when the copies from it are done.
    """
    return values.pin_memory() if device.type == "cuda" else values


def write(target: torch.Tensor, values: Items[int] | np.ndarray) -> None:
    """Copies int64 values of its shape into the target, behind what the device has yet to do, and waits for nothing."""
    values = torch.as_tensor(values, dtype=torch.int64)
    target.copy_(_pinned(values, target.device), non_blocking=True)


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy there."""
    return _pinned(torch.from_numpy(values), device).to(device, non_blocking=True)
