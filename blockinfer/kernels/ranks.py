"""The ranks that share a model, one process each, and what they tell each other within a step (arXiv 1909.08053)."""

import ctypes
from collections.abc import Callable

import torch
import torch.distributed as dist

from blockinfer.kernels.norm import add_rms_norm
from blockinfer.kernels.parts import sum_parts
from blockinfer.kernels.quantize import QuantizedRows
from blockinfer.kernels.ranks_norm import sum_rms_norm_triton
from blockinfer.kernels.symmetric_memory import SymmetricBuffer

# named all_gather_into_tensor until torch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """One rank alone, which has all of the model: each operation returns what it is given."""

    rank = 0
    size = 1
    _buffer: SymmetricBuffer | None = None

    def add_rms_norm(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        quantized: bool = False,
        whole: bool = False,
    ) -> torch.Tensor | QuantizedRows:
        """`kernels.norm.add_rms_norm` of the sum of all ranks' x -> what is normed; it holds until the next call.

        x [T, d], parts of it [S, T, d], or None, for 0. residual [T, d] is overwritten with the sum: on each rank
        perhaps only in some rows, which are the same ones for the same T, unless `whole`. It must be equal on all ranks
        where it was not overwritten like that.
        """
        if x is not None and self.sum_out(len(residual)) is not None:
            return sum_rms_norm_triton(x, residual, weight, eps, self._buffer.memory, quantized, whole)
        x = None if x is None else self._all_reduce(x, residual.dtype)
        return add_rms_norm(x, residual, weight, eps, quantized)[0]

    def sum_out(self, rows: int) -> torch.Tensor | None:
        """[rows, d], from which `add_rms_norm` need not copy x; None if there is no such buffer."""
        return None if self._buffer is None else self._buffer.rows(rows)

    def _all_reduce(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x [T, d], or parts of it [S, T, d] -> the sum of all ranks', in `dtype`, perhaps still in parts."""
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x of one shape on all ranks -> [size, ...]."""
        return x[None]

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C] -> [N, size * C], the first rank's columns first."""
        return x

    def wait(self, done: torch.cuda.Event | None = None) -> None:
        """Waits until the GPU's work is done, or the event; a caller that reads a result waits for it anyway."""


ALONE = Ranks()


class RankGroup(Ranks):
    """The ranks of torch.distributed's default group.

    store: of all ranks. wait_for: waits for an event, or says what keeps it from coming.
    """

    def __init__(self, device: torch.device, store: dist.Store, wait_for: Callable[[torch.cuda.Event], None]) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device
        self._store = store
        self._wait_for = wait_for

    def reserve(self, width: int, dtype: torch.dtype) -> None:
        """Allocates memory for sums of rows this wide, if the ranks can reach each other's; all ranks call it together.
        Not for float64, which no kernel computes."""
        if self._device.type == "cuda" and dtype != torch.float64:
            self._buffer = SymmetricBuffer.make(width, dtype, self._device, self._store)

    def let_go(self, is_done: Callable[[], bool], seconds: float) -> bool:
        """If another rank is gone: `SymmetricBuffer.let_go`."""
        return is_done() if self._buffer is None else self._buffer.let_go(is_done, seconds)

    def release(self, leave_behind: bool = False) -> None:
        """Frees that memory. leave_behind: for a GPU that may never be done: it is not freed, as torch would wait for
        the GPU."""
        if leave_behind and self._buffer is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._buffer))
        self._buffer = None

    def _all_reduce(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = sum_parts(x, dtype)
        dist.all_reduce(x)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        _all_gather(out.flatten(0, 1), x.contiguous())
        return out

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        return self.gather(x).movedim(0, 1).flatten(1)

    def wait(self, done: torch.cuda.Event | None = None) -> None:
        if self._device.type != "cuda":
            return
        if done is None:
            done = torch.cuda.Event()
            done.record()
        self._wait_for(done)
