"""The ranks that share one model, over torch.distributed: their numbering, and what the first tells the others."""

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist

from blockinfer.kernels.ranks import RankGroup
from blockinfer.parallel.watch import Watch

# Between requests a rank may wait indefinitely.
_FOREVER = timedelta(days=3650)
# Seconds after a rank has died: a call that has not returned from its GPU by then never will.
_GRACE = 15.0
# Seconds to wait for what a communicator's abort releases.
_ABORT, _DONE = 5.0, 1.0


class FirstRankGone(RuntimeError):
    """The first rank is gone and will tell this rank nothing more."""


class Place(NamedTuple):
    """A process's rank among `size`, and the number of its GPU on this host."""

    rank: int
    size: int
    gpu: int


class Group:
    """This process's membership. failure: why the ranks can no longer work together, once that is so. told_steps: steps
    that the first rank has broadcast and not yet made itself. stuck: why this process's GPU will never finish, once
    that is so, whatever becomes of the group."""

    stuck: ClassVar[str | None] = None

    def __init__(self, place: Place, store: dist.Store, on_gpu: bool) -> None:
        self.rank, self.size = place.rank, place.size
        self.on_gpu = on_gpu
        self.failure: str | None = None
        self.told_steps = 0
        self._calling = False
        self._gpu = place.gpu
        if on_gpu:
            torch.cuda.set_device(place.gpu)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size)
        self._control = dist.new_group(backend="gloo", timeout=_FOREVER)
        device = torch.device("cuda", place.gpu) if on_gpu else torch.device("cpu")
        self.ranks = RankGroup(device, store, self._wait_for)
        self._watch: Watch | None = None

    def watch(self) -> None:
        """From now on the end of another rank is a failure. All ranks call it together."""
        self._watch = Watch(_FOREVER, self.fail)

    def tell(self, message: Any) -> None:
        """Broadcasts a message from the first rank."""
        content = pickle.dumps(message)
        dist.broadcast(torch.tensor([len(content)]), 0, group=self._control)
        dist.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8), 0, group=self._control)

    def tell_steps(self, number: int) -> None:
        """Broadcasts from the first rank that `number` steps follow."""
        dist.broadcast(torch.tensor([-number]), 0, group=self._control)
        self.told_steps = number

    def hear(self) -> Any:
        """The next message from the first rank, or a number of steps. Raises FirstRankGone if that rank is gone."""
        length = torch.zeros(1, dtype=torch.int64)
        try:
            dist.broadcast(length, 0, group=self._control)
        except RuntimeError as error:
            raise FirstRankGone(f"the first of this rank's group of {self.size} has ended without a word") from error
        if length < 0:
            return -int(length)
        content = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self._control)
        return pickle.loads(content.numpy().tobytes())

    def exchange(self, value: Any) -> list[Any]:
        """The values of all ranks, the first rank's first."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def check(self) -> None:
        """Raises RuntimeError if the ranks can no longer work together."""
        if self.failure is not None:
            self._calling = False
            raise RuntimeError(f"{self.failure}; this LLM is of no more use: close it, and load it anew")

    def begin_call(self) -> None:
        self.check()
        self._calling = True

    def end_call(self) -> None:
        self._calling = False

    def fail(self, reason: str) -> None:
        """Permanent; the first reason is kept. A call that does not return from its GPU ends the process."""
        if self.failure is None:
            self.failure = reason
            threading.Thread(target=self._end_what_hangs, daemon=True).start()

    def wait_for_failure(self, reason: str) -> None:
        """After an error from torch: waits briefly for its cause, and otherwise fails for this reason."""
        if not self.fails_soon():
            self.fail(reason)

    def fails_soon(self) -> bool:
        """Whether it has failed, or does within three seconds."""
        end = time.monotonic() + 3
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.01)
        return self.failure is not None

    def _end_what_hangs(self) -> None:
        end = time.monotonic() + _GRACE
        while self._calling and time.monotonic() < end:
            time.sleep(0.1)
        if self._calling:
            print(
                f"blockinfer: {self.failure}, and a GPU of this process waits for it: ending",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    def _wait_for(self, done: torch.cuda.Event) -> None:
        while not done.query():
            self.check()
            time.sleep(20e-6)

    def leave(self, drop_graphs: Callable[[], None] = lambda: None) -> None:
        """Leaves torch.distributed; if the ranks have failed, without waiting for the others. drop_graphs: called
        first, since communicators must outlive the graphs that captured them."""
        if not dist.is_initialized():
            return
        if self.failure is None or not self.on_gpu:
            drop_graphs()
            self.ranks.release()
            if self._watch is not None and self.failure is None:
                self._watch.leave()
            dist.destroy_process_group()
            return

        def abort() -> None:
            with suppress(RuntimeError):
                drop_graphs()
                dist.distributed_c10d._abort_process_group()

        # kernels waiting in symmetric memory are released; NCCL's are ended by their communicator's abort, which
        # waits for the GPU
        with suppress(RuntimeError):
            self.ranks.let_go(self._gpu_is_idle, _DONE)
        aborting = threading.Thread(target=abort, daemon=True)
        aborting.start()
        aborting.join(_ABORT)
        if not self.gpu_is_done():
            Group.stuck = self.failure
        self.ranks.release(leave_behind=Group.stuck is not None)

    def gpu_is_done(self) -> bool:
        """Whether the GPU has finished its work; False if it does not within a second, or has failed for good."""
        end = time.monotonic() + _DONE
        while not self._gpu_is_idle() and time.monotonic() < end:
            time.sleep(0.01)
        return self._gpu_is_idle()

    def _gpu_is_idle(self) -> bool:
        if not self.on_gpu:
            return True
        try:
            with torch.cuda.device(self._gpu):
                return torch.cuda.current_stream().query()
        except RuntimeError:
            return False
