"""A time limit for judging: some answers are made of numbers that no machine can write down."""

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class _TimeUp(BaseException):
    """No Exception, for sympy and math-verify swallow those."""


def within(seconds: float, judge: Callable[..., T], *args: Any, late: T) -> T:
    """The judgement, or `late` where it takes longer. Raises what it raises.

    Outside of the main thread, where no alarm can ring, the judging thread is left behind.
    """
    if threading.current_thread() is not threading.main_thread():
        return _within_thread(seconds, judge, *args, late=late)

    def ring(*_: object) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    # again and again, for one that rings inside of a destructor is lost
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        return judge(*args)
    except _TimeUp:
        return late
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _within_thread(seconds: float, judge: Callable[..., T], *args: Any, late: T) -> T:
    judged: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            judged.append(judge(*args))
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    return judged[0] if judged else late
