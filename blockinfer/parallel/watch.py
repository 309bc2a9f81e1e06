"""Detects that another rank is gone if its process was not started here: srun does not report it."""

import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist


class Watch:
    """The first rank watches all others, and they watch the first: a closed connection shows that a rank has ended.

    All ranks make one together. on_death: called with a message.
    """

    def __init__(self, forever: timedelta, on_death: Callable[[str], None]) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._on_death = on_death
        self._group = dist.new_group(backend="gloo", timeout=forever)
        self._others = range(1, self._size) if self._rank == 0 else [0]
        self._threads = [threading.Thread(target=self._look, args=(other,), daemon=True) for other in self._others]
        for thread in self._threads:
            thread.start()

    def _look(self, other: int) -> None:
        try:
            # the last message of a rank that leaves
            dist.recv(torch.zeros(1), other, group=self._group)
        except RuntimeError:
            self._on_death(f"rank {other} of {self._size} has ended")

    def leave(self) -> None:
        """All ranks call it together; nothing is reported then."""
        for other in self._others:
            dist.send(torch.zeros(1), other, group=self._group)
        for thread in self._threads:
            thread.join()
