"""A time limit for judging: some answers are numbers too large for any machine to write down."""

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class _TimeUp(BaseException):
    """Not an Exception, as sympy and math-verify swallow those."""


def within(seconds: float, judge: Callable[..., T], *args: Any, late: T) -> T:
    """The judgement, or `late` if it takes longer. Raises what `judge` raises.

    Outside the main thread, where no alarm can ring, the judging thread is left running.
    """
    if threading.current_thread() is not threading.main_thread():
        return _within_thread(seconds, judge, *args, late=late)

    def ring(*_: object) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    # repeatedly, as an alarm inside a destructor is lost
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
