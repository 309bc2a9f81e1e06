"""The processes of the other ranks: started here, one per GPU, or already started by torchrun or srun."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from blockinfer.parallel.group import Place


def place_outside(size: int, on_gpu: bool) -> Place | None:
    """This process's place if torchrun, or a launcher that sets the same variables, started all ranks: its rank in a
    consecutive group of `size` of them. None if RANK and WORLD_SIZE name no ranks besides this one.

    Raises ValueError if the ranks cannot be split so, or name a GPU that is not there.
    """
    named = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not named["RANK"].isdecimal() or not named["WORLD_SIZE"].isdecimal() or int(named["WORLD_SIZE"]) == 1:
        return None
    rank, world = int(named["RANK"]), int(named["WORLD_SIZE"])
    if world % size:
        raise ValueError(
            f"tensor_parallel_size={size} does not divide WORLD_SIZE={world}, the ranks that were started; start a "
            "multiple of it, or unset RANK and WORLD_SIZE to have them started here"
        )
    gpu = 0
    if on_gpu and torch.cuda.device_count() > 1:
        gpu = int(named["LOCAL_RANK"]) if named["LOCAL_RANK"].isdecimal() else rank % torch.cuda.device_count()
    if on_gpu and gpu >= torch.cuda.device_count():
        raise ValueError(f"LOCAL_RANK={gpu} has no GPU: there are {torch.cuda.device_count()}, one for each rank")
    return Place(rank % size, size, gpu)


def store_outside(size: int) -> dist.Store:
    """The store of this rank's group, at MASTER_ADDR and MASTER_PORT."""
    try:
        store, rank, _ = next(dist.rendezvous("env://"))
    except (ValueError, RuntimeError, dist.DistError) as error:
        raise ValueError(f"the ranks that RANK and WORLD_SIZE name cannot meet: {error}") from error
    return dist.PrefixStore(f"blockinfer/{rank // size}", store)


class Followers:
    """Processes for all ranks but the first, which end with this process or with `end`.

    on_death: called with a message if one ends by itself.
    """

    def __init__(self, size: int, on_gpu: bool) -> None:
        self.size = size
        self.on_death: Callable[[str], None] = lambda reason: None
        self._ending = False
        self._folder = Path(tempfile.mkdtemp(prefix="blockinfer-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self.store = dist.FileStore(str(self._folder / "store"), size)
        try:
            for rank in range(1, size):
                self._processes.append(self._start(rank, on_gpu))
            self._wait_until_ready()
        except BaseException:
            self.end()
            self.clean()
            raise
        for rank, process in enumerate(self._processes, 1):
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def _start(self, rank: int, on_gpu: bool) -> subprocess.Popen[bytes]:
        # not multiprocessing, which would run the user's script again in each process
        command = [sys.executable, "-P", "-m", "blockinfer.parallel", str(self._folder / "store")]
        threads = torch.get_num_threads() if on_gpu else max(1, torch.get_num_threads() // self.size)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
            "OMP_NUM_THREADS": str(threads),
            # only the first rank shows progress bars
            "TQDM_DISABLE": "1",
        }
        return subprocess.Popen(
            [*command, str(rank), str(self.size), "cuda" if on_gpu else "cpu"],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # only the first rank handles Ctrl-C, and tells the others what to do
        )

    def _wait_until_ready(self) -> None:
        while not self.store.check([f"ready {rank}" for rank in range(1, self.size)]):
            for rank, process in enumerate(self._processes, 1):
                if process.poll() is not None:
                    raise ChildProcessError(
                        f"{self._ended(rank, process)} before it could begin; what it said is above"
                    )
            time.sleep(0.02)

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        process.wait()
        if not self._ending:
            self.on_death(self._ended(rank, process))

    def _ended(self, rank: int, process: "subprocess.Popen[bytes]") -> str:
        status = process.returncode
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return f"rank {rank} of {self.size} ended {how}"

    def expect_end(self) -> None:
        """From now on, a process that ends is not reported."""
        self._ending = True

    def end(self, seconds: float = 0.0) -> None:
        """Waits up to `seconds` for the processes to end, then kills those that remain."""
        self._ending = True
        deadline = time.monotonic() + seconds
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdin.close()

    def clean(self) -> None:
        """Removes the store's folder. Call it once no thread uses it: torch's own would wait for its file."""
        shutil.rmtree(self._folder, ignore_errors=True)
