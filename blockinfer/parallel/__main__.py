"""`python -m blockinfer.parallel STORE RANK SIZE DEVICE`: a rank, as `blockinfer.parallel.followers` starts it."""

import fcntl
import os
import sys
import threading
import time
import traceback
from typing import NoReturn

import torch.distributed as dist

from blockinfer.parallel.follow import follow
from blockinfer.parallel.group import Group, Place


def main() -> None:
    path, rank, size, device = sys.argv[1:]
    _end_with_parent()
    store = dist.FileStore(path, int(size))
    store.set(f"ready {rank}", "")
    group = Group(Place(int(rank), int(size), int(rank)), store, device == "cuda")
    try:
        follow(group)
    except BaseException:
        # if the first rank is gone there is nobody to tell, and stdin ends this process
        time.sleep(1)
        traceback.print_exc()
        _exit(1)
    group.leave()
    _exit(0)


def _exit(status: int) -> NoReturn:
    """Exits at once, whatever threads are running and whatever a GPU may still wait for."""
    sys.stderr.flush()
    os._exit(status)


def _end_with_parent() -> None:
    """Ends this process when its parent ends, however it does: that closes the parent's end of stdin."""
    threading.Thread(target=_end_when_closed, daemon=True).start()
    # if a library holds the interpreter, the signal's default action ends the process
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _end_when_closed() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
