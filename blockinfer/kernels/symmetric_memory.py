"""Memory of each rank that the other ranks of the host can reach: torch's symmetric memory.

Multicast (NVLink SHARP) is not used: not every machine has it, and where it is shared among tenants it may be switched
off.
"""

import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from blockinfer.kernels.ranks_norm import Layout, RankMemory, num_programs

# Before torch allocates any symmetric memory.
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

# Bytes of the rows that the ranks sum together: as many as the largest CUDA graph of LLaDA-8B has; NCCL sums more.
SUM_BYTES = 1 << 24
# More than any signal of the kernel, in each half of it.
_LAST_SIGNAL = 0x7FFFFFFF


class SymmetricBuffer:
    """Rows of one width, which the ranks sum and norm together."""

    def __init__(self, memory: RankMemory, dtype: torch.dtype, kept: tuple[object, ...]) -> None:
        self.memory = memory
        self._dtype = dtype
        # objects that torch finds by name, and does not keep alive
        self._kept = kept

    @classmethod
    def make(cls, width: int, dtype: torch.dtype, device: torch.device, store: dist.Store) -> "SymmetricBuffer | None":
        """None if one of the ranks cannot reach the others' memory. store: of all ranks."""
        # torch caches what it has exchanged under a group's name: this name is new
        told = [("", "")] * dist.get_world_size()
        dist.all_gather_object(told, (socket.gethostname(), f"blockinfer-{uuid.uuid4()}"))
        name, one_host = told[0][1], len({host for host, _ in told}) == 1
        rows, programs = SUM_BYTES // (width * dtype.itemsize), num_programs(device)
        layout = Layout.of(rows, width, dtype.itemsize, len(told), programs)
        store = FromNowOn(store, name)
        made = _allocate(layout, name, store) if one_host else None
        everywhere = torch.tensor(int(made is not None), device=device)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        if not everywhere.item():
            return None
        addresses = torch.tensor(made.addresses, dtype=torch.int64, device=device)
        calls = torch.zeros(programs, dtype=torch.int64, device=device)
        memory = RankMemory(made.own, addresses, calls, dist.get_rank(), layout)
        return cls(memory, dtype, (made, store))

    def rows(self, number: int) -> torch.Tensor | None:
        """Its first rows, [number, d], where a product need not be copied from; None if it has fewer."""
        return self.memory.sums(number, self._dtype) if 0 < number <= self.memory.layout.rows else None

    def let_go(self, is_done: Callable[[], bool], seconds: float) -> bool:
        """Releases a GPU that waits for a rank which is gone, until it is done or for so many seconds -> whether it is
        done. What it computes then means nothing.

        It gets more signals than it waits for, again and again: a rank that is still there may send lower ones.
        """
        end = time.monotonic() + seconds
        signals = self.memory.signals.view(torch.uint32)
        stream = torch.cuda.Stream(signals.device)
        while not is_done() and time.monotonic() < end:
            with torch.cuda.stream(stream):
                set_signals(signals, _LAST_SIGNAL)
                stream.synchronize()
        return is_done()


class FromNowOn(dist.Store):
    """A store in which torch's symmetric memory numbers its exchanges from 0.

    torch counts the exchanges of a process's whole life, so one that has met other ranks before would wait for ever for
    new ones, as it would for a rank that has died: here it gives up after `seconds`. torch does not keep it alive.
    """

    def __init__(self, store: dist.Store, name: str, seconds: float = 60.0) -> None:
        super().__init__()
        self._store = dist.PrefixStore(name, store)
        self._seconds = seconds
        self._first: int | None = None

    def _renumbered(self, key: str) -> str:
        """key: a prefix and the exchange's number, and perhaps more."""
        prefix, number, rest = re.fullmatch(r"([^/]*)/(\d+)(.*)", key).groups()
        self._first = int(number) if self._first is None else self._first
        return f"{prefix}/{int(number) - self._first}{rest}"

    def set(self, key: str, value: bytes) -> None:
        self._store.set(self._renumbered(key), value)

    def add(self, key: str, value: int) -> int:
        return self._store.add(self._renumbered(key), value)

    def check(self, keys: list[str]) -> bool:
        return self._store.check([self._renumbered(key) for key in keys])

    def wait(self, keys: list[str], timeout: object = None) -> None:
        end = time.monotonic() + self._seconds
        while not self.check(keys):
            if time.monotonic() > end:
                raise RuntimeError(f"no other rank has answered for {self._seconds:.0f} s")
            time.sleep(0.002)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._store.get(self._renumbered(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]


def set_signals(signals: torch.Tensor, value: int) -> None:
    """Sets all of them, uint32, without a kernel: a GPU that waits for a signal may start no other."""
    from torch._C._distributed_c10d import _SymmetricMemory

    _SymmetricMemory.memset32(signals, 0, value, len(signals))


class _Allocated(NamedTuple):
    """own: this rank's memory; addresses: of each rank's; rendezvous and group: what torch needs to keep it."""

    own: torch.Tensor
    addresses: list[int]
    rendezvous: object
    group: dist.ProcessGroup


def _allocate(layout: Layout, name: str, store: dist.Store) -> _Allocated | None:
    """Memory of all ranks, with signals of 0."""
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        from torch._C._distributed_c10d import _SymmetricMemory

        group = _name_group(name, store)
        # outside the caller's inference mode, which the memory outlives
        with torch.inference_mode(False):
            own = _SymmetricMemory.empty_strided_p2p((layout.end,), (1,), torch.uint8, device)
            # before the others can reach them
            set_signals(own[layout.signals :].view(torch.uint32), 0)
            if own.is_cuda:
                torch.cuda.synchronize(device)
            rendezvous = _SymmetricMemory.rendezvous(own, name)
        return _Allocated(own, list(rendezvous.buffer_ptrs), rendezvous, group)
    except (ImportError, RuntimeError, AttributeError, TypeError):
        # no peer access, or a torch without it
        return None


def _name_group(name: str, store: dist.Store) -> dist.ProcessGroup:
    """All ranks once more, as a group that torch's symmetric memory finds by this name: torch takes from it the rank
    and the store."""
    from torch._C._distributed_c10d import _register_process_group

    group = dist.ProcessGroup(store, dist.get_rank(), dist.get_world_size())
    # torch may ask for its backend's name, and uses nothing else of it
    cpu = torch.device("cpu")
    group._register_backend(cpu, dist.ProcessGroup.BackendType.GLOO, dist.group.WORLD._get_backend(cpu))
    _register_process_group(name, group)
    return group
