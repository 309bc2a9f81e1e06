"""Keeps a call that all ranks make from being interrupted halfway."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def undivided() -> Iterator[None]:
    """Delays Ctrl-C, and SIGTERM if it has a Python handler, to the end of the block: the other ranks are in the same
    call, and would wait for what this one no longer computes. A second signal is not delayed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def keep(number: int, frame: FrameType | None) -> None:
        if came:
            former[number](number, frame)
        came.append((number, frame))

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    former = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in former:
            signal.signal(number, keep)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if came:
            number, frame = came[0]
            former[number](number, frame)
