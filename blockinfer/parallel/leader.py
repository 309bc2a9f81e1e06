"""The first rank's side: the other ranks are found or started, load with it, and end with it."""

import atexit
import threading
import weakref
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist

from blockinfer.checks import reason
from blockinfer.config import EngineConfig, find_device
from blockinfer.engine.model_runner import ModelRunner
from blockinfer.loading import Loaded, Prepared, prepare
from blockinfer.parallel.engine import LeadingEngine, draw_engine_seed, load_share
from blockinfer.parallel.follow import follow
from blockinfer.parallel.followers import Followers, place_outside, store_outside
from blockinfer.parallel.group import FirstRankGone, Group, Place
from blockinfer.parallel.interrupts import undivided

# torch.distributed has one default group per process.
_one_at_a_time = threading.Lock()
# Ranks started from outside serve one LLM after another.
_outside: Group | None = None
# Ends the Leader that is open, or was open last.
_abandon_open: weakref.finalize | None = None


class Leader:
    """An LLM's connection to its other ranks, from `open` until `close`. If it is not closed, they end with `owner`."""

    def __init__(self, config: EngineConfig, owner: object) -> None:
        """Raises ValueError for what cannot be loaded, before another process is started, and if the ranks are not
        available; ChildProcessError if one ends. On a rank that is not the first of its group it follows the first, and
        raises SystemExit when that one is done."""
        self._followers: Followers | None = None
        self._group: Group | None = None
        self._runner: Callable[[], ModelRunner | None] = lambda: None
        self._config = config
        size, on_gpu = config.tensor_parallel_size, _is_on_gpu(config)
        place = place_outside(size, on_gpu)
        if place is not None and on_gpu:
            torch.cuda.set_device(place.gpu)
        self._prepared: Prepared | None = prepare(config)
        if Group.stuck is not None:
            raise ValueError(f"{Group.stuck}, for which a GPU of this process waits still: load it in a new process")
        if place is None and on_gpu and torch.cuda.device_count() < size:
            raise ValueError(
                f"tensor_parallel_size={size} takes a GPU for each rank, and there are {torch.cuda.device_count()}"
            )
        if place is not None and place.rank > 0:
            _serve(place, on_gpu)
        if not _one_at_a_time.acquire(blocking=False):
            raise ValueError("another LLM with tensor_parallel_size is open in this process: close() it first")
        global _abandon_open
        self._abandon = _abandon_open = weakref.finalize(owner, self._end_without_a_word)
        try:
            self._meet(place, size, on_gpu)
        except BaseException:
            self._abandon()
            raise

    def _meet(self, place: Place | None, size: int, on_gpu: bool) -> None:
        global _outside
        if place is not None and _outside is not None:
            self._group = _outside
            return
        _refuse_initialized()
        if place is None:
            self._followers = Followers(size, on_gpu)
            self._group = Group(Place(0, size, 0), self._followers.store, on_gpu)
            self._followers.on_death = self._group.fail
            return
        self._group = _outside = Group(place, store_outside(size), on_gpu)
        _outside.watch()
        atexit.register(_dismiss, _outside)

    def open(self) -> tuple[Loaded, LeadingEngine]:
        """Raises as `LLM` does, after cleaning up."""
        group, prepared, seed = self._group, self._prepared, draw_engine_seed()
        self._prepared = None
        group.begin_call()
        try:
            group.tell(("load", (self._config, seed), {}))
            loaded, engine = load_share(group, lambda: prepared, seed, LeadingEngine)
            self._runner = weakref.ref(engine.runner)
            return loaded, engine
        except RuntimeError as error:
            group.wait_for_failure(f"the ranks have lost each other: {reason(error)}")
            self._abandon()
            raise ChildProcessError(group.failure) from error
        except BaseException:
            self._abandon()
            raise
        finally:
            group.end_call()

    @property
    def failed(self) -> bool:
        """Whether the ranks can no longer work together; a GPU may then never finish."""
        return self._group.failure is not None

    def close(self) -> None:
        """Call it after the engine is dropped here. Closing twice is fine."""
        if not self._abandon.alive:
            return
        if self.failed:
            self._abandon()
            return
        with undivided():
            self._abandon.detach()
            try:
                self._tell_end()
            except RuntimeError as error:
                # a rank has just ended: there is nobody to tell
                self._group.failure = reason(error)
                self._group.leave(self._drop_graphs)
            finally:
                if self._followers is not None:
                    self._followers.end(10.0 if not self.failed else 0.0)
                    self._followers.clean()
                _one_at_a_time.release()

    def _tell_end(self) -> None:
        if self._followers is None:
            self._drop_graphs()
            self._group.tell(("close", (), {}))
            return
        self._followers.expect_end()
        self._group.tell(("end", (), {}))
        self._group.leave(self._drop_graphs)

    def _end_without_a_word(self) -> None:
        if self._followers is not None:
            if self._group is not None and not self.failed:
                # the ranks finish the steps already broadcast: a GPU would hang if one were ended within an all-reduce
                self._group.gpu_is_done()
            self._followers.end()
            if self._group is not None:
                self._group.failure = self._group.failure or "the LLM was closed"
                self._group.leave(self._drop_graphs)
            elif dist.is_initialized():
                dist.destroy_process_group()
            self._followers.clean()
        elif self._group is not None and not self.failed:
            self._drop_graphs()
            if self._group.told_steps:
                # the other ranks wait in one of them
                self._group.fail("the LLM was dropped while requests ran")
                self._group.leave()
            else:
                self._group.tell(("close", (), {}))
        _one_at_a_time.release()

    def _drop_graphs(self) -> None:
        """Drops the graphs of an engine that a user's script or an error's traceback may still hold."""
        runner = self._runner()
        if runner is not None:
            runner.drop_graphs()


def _serve(place: Place, on_gpu: bool) -> NoReturn:
    """Follows the first rank of the group for as long as it lives. Raises SystemExit."""
    _refuse_initialized()
    group = Group(place, store_outside(place.size), on_gpu)
    group.watch()
    try:
        follow(group)
    except RuntimeError as error:
        if not isinstance(error, FirstRankGone) and not group.fails_soon():
            raise
        group.fail(str(error))
        group.leave()
        raise SystemExit(f"blockinfer: {group.failure}") from None
    group.leave()
    raise SystemExit(0)


def _dismiss(group: Group) -> None:
    """At this process's end."""
    if _abandon_open is not None:
        _abandon_open()
    if group.failure is None:
        group.tell(("end", (), {}))
        group.leave()


def _refuse_initialized() -> None:
    if dist.is_initialized():
        raise ValueError("torch.distributed is initialized already; with tensor_parallel_size leave that to LLM")


def _is_on_gpu(config: EngineConfig) -> bool:
    """Raises ValueError for a device that names one GPU."""
    device = find_device(config.device)
    if device.type == "cuda" and device.index is not None:
        raise ValueError(
            f"device={str(device)!r} is one GPU, and tensor_parallel_size={config.tensor_parallel_size} takes one for "
            "each rank: pass device='cuda'"
        )
    return device.type == "cuda"
