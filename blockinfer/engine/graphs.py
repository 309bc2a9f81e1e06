"""CUDA graphs of a step: one launch instead of some three hundred, which with few rows take longer than the GPU's work.

A step is two functions: the layers, with or without wide segments (these use another attention kernel), at a number of
rows; and the rest, at a number of masked rows. Each is captured at a few sizes while the model loads, and a step is
padded to the next size of each; its other inputs are read from memory. So no request waits for a capture or a
compilation.

A GPU begins only when a whole graph has been launched. A function may therefore cut its graph after short first parts,
with which a GPU that has waited for the host begins while the host launches the rest.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch

# Rows per tile of large matrix products, which dominate the time of a step with many rows.
ROW_TILE = 128
# Above this, the GPU's work takes longer than launching its kernels one by one.
MAX_GRAPH_ROWS = 2048


def default_sizes(largest: int) -> list[int]:
    """8, 16, ..., 64, 80, ..., 128, 160, ..., 512, 576, ..., 1024, 1152, ... up to the first that is no less than
    `largest`: no more than whole tiles, for which `ModelRunner` has memory."""
    sizes = [*range(8, 64, 8), *range(64, 128, 16), *range(128, 512, 32), *range(512, 1024, 64)]
    sizes += range(1024, MAX_GRAPH_ROWS + 1, ROW_TILE)
    return sizes[: bisect_left(sizes, largest) + 1]


class StepGraphs:
    """CUDA graphs of function(size, cut), which must launch the same kernels on the same memory for the same size. It
    may call cut() where a graph shall end and another begin; cut is None when nothing is captured.

    function must also accept sizes that were not captured. Without sizes it is simply called.
    """

    def __init__(self, function: Callable[[int, Callable[[], None] | None], None], sizes: Iterable[int]) -> None:
        self._function = function
        self._sizes = sorted(sizes)
        self._captured: dict[int, list[torch.cuda.CUDAGraph]] = {}

    @property
    def number(self) -> int:
        """How many sizes `capture` captures."""
        return len(self._sizes)

    def padded(self, size: int) -> int:
        """The next captured size; above the largest, `size` rounded up to whole tiles of large matrix products."""
        if not self._sizes:
            return size
        place = bisect_left(self._sizes, size)
        return self._sizes[place] if place < len(self._sizes) else -(-size // ROW_TILE) * ROW_TILE

    def capture(self, pool: tuple[int, int], on_capture: Callable[[], None], wait: Callable[[], None]) -> None:
        """All graphs share the pool's memory for intermediate tensors, since they never run concurrently. wait: is
        called before the host synchronizes with the GPU."""
        # NCCL's threads may query their events during a capture
        mode = "thread_local" if torch.distributed.is_initialized() else "global"
        # the largest first: the others fit into its memory
        for size in reversed(self._sizes):
            # compiling, loading and choosing kernels at the first call cannot be captured
            self._function(size, None)
            wait()
            self._captured[size] = self._capture_one(size, pool, mode)
            on_capture()

    def _capture_one(self, size: int, pool: tuple[int, int], mode: str) -> list[torch.cuda.CUDAGraph]:
        graphs: list[torch.cuda.CUDAGraph] = []
        with ExitStack() as capturing:

            def cut() -> None:
                capturing.close()
                graphs.append(torch.cuda.CUDAGraph())
                capturing.enter_context(torch.cuda.graph(graphs[-1], pool=pool, capture_error_mode=mode))

            cut()
            self._function(size, cut)
        return graphs

    def drop(self) -> None:
        """Destroys the graphs, so that what they captured can be destroyed too, even while this object is still held.
        Calls then run the function directly."""
        while self._captured:
            for graph in self._captured.popitem()[1]:
                graph.reset()

    def __call__(self, size: int) -> None:
        """Replays the graphs of this size, or calls the function if there are none."""
        if size not in self._captured:
            self._function(size, None)
            return
        for graph in self._captured[size]:
            graph.replay()
