"""The ranks that share one model, as torch.distributed has them: who is which, and what the first tells the others."""

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

# Between two requests a rank may wait for as long as nobody asks for anything.
_FOREVER = timedelta(days=3650)
# A process that is not back from its GPU so long after another rank has died will not be.
_GRACE = 15.0
# Seconds for the end of what a communicator's abort lets go on.
_ABORT, _DONE = 5.0, 1.0


class FirstRankGone(RuntimeError):
    """Nobody will tell this rank anything any more."""


class Place(NamedTuple):
    """Of a process: its rank among `size`, and the number of its GPU on this host."""

    rank: int
    size: int
    gpu: int


class Group:
    """This process's end of it. failure: why the ranks can do nothing more together, once that is so. told_steps: how
    many the first rank has told the others to make and has not made itself. stuck: why this process's GPU will never be
    done, once that is so, whatever becomes of the group."""

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
        """From the first rank to the others."""
        content = pickle.dumps(message)
        dist.broadcast(torch.tensor([len(content)]), 0, group=self._control)
        dist.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8), 0, group=self._control)

    def tell_steps(self, number: int) -> None:
        """The same, of that many steps, in one broadcast."""
        dist.broadcast(torch.tensor([-number]), 0, group=self._control)
        self.told_steps = number

    def hear(self) -> Any:
        """What the first rank tells next, or how many steps. Raises FirstRankGone where that one is."""
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
        """What each rank gives, the first rank's first."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def check(self) -> None:
        """Raises RuntimeError where the ranks can do nothing more together."""
        if self.failure is not None:
            self._calling = False
            raise RuntimeError(f"{self.failure}; this LLM is of no more use: close it, and load it anew")

    def begin_call(self) -> None:
        self.check()
        self._calling = True

    def end_call(self) -> None:
        self._calling = False

    def fail(self, reason: str) -> None:
        """For good; the first reason is what is told. A call that does not come back from its GPU ends the process."""
        if self.failure is None:
            self.failure = reason
            threading.Thread(target=self._end_what_hangs, daemon=True).start()

    def wait_for_failure(self, reason: str) -> None:
        """After an error of torch's: what it comes from is soon known, or else it is this reason."""
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
        """Out of torch.distributed; where the ranks have failed, without waiting for the others. drop_graphs: the
        communicators that graphs have captured end after these."""
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

        # what waits in symmetric memory is let go; a kernel of NCCL's is ended by its communicator's abort, and that
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
        """With all that it was given; not where it will not be within a second, or has failed for good."""
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
