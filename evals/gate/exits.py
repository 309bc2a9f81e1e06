"""The gate's exit codes, and how it exits. Imports the standard library only, so that no checkout can break this
file."""

import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

PASSES, REGRESSION, FAILED, CANNOT_TELL = range(4)
# Signals that end a job: Ctrl-C, `kill` or a runner that cancels, a closed terminal.
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_command(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and exits with its exit code.

    A cancelled job cleans up like one that ends, and exits with 128 + the signal's number. A crash exits with FAILED,
    so that it is never taken for a verdict.
    """
    for ending in ENDINGS:
        # signals that a shell's background (SIGINT) or nohup (SIGHUP) ignores stay ignored
        if signal.getsignal(ending) is not signal.SIG_IGN:
            signal.signal(ending, _leave)
    try:
        code = main()
        sys.stdout.flush()
    except SystemExit as error:
        # SystemExit with a sentence would exit with 1, which is a verdict here
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = FAILED
    except Exception:
        traceback.print_exc()
        code = FAILED
    sys.exit(code)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    # a second signal must not interrupt the clean-up
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(128 + number)
