"""The gate's exit codes, and the way out. This file imports what Python has and no more: a checkout cannot break it."""

import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

PASSES, REGRESSION, FAILED, CANNOT_TELL = range(4)
# What ends a job: Ctrl-C, `kill` and a runner that cancels, a terminal that is closed.
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_command(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and leaves with its exit code.

    A job that is cancelled tidies up like one that ends, and leaves with 128 + the signal's number. A crash leaves with
    FAILED, so that it is never taken for a verdict.
    """
    for ending in ENDINGS:
        # ignored by a shell's background (SIGINT) or nohup (SIGHUP), and then it stays so
        if signal.getsignal(ending) is not signal.SIG_IGN:
            signal.signal(ending, _leave)
    try:
        code = main()
        sys.stdout.flush()
    except SystemExit as error:
        # Python's own way out of a sentence is 1, which is a verdict here
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = FAILED
    except Exception:
        traceback.print_exc()
        code = FAILED
    sys.exit(code)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    # a second one must not end the tidying up
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(128 + number)
