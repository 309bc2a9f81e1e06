"""CUDA graphs of a step: one launch for some three hundred, which at few rows take longer than the GPU's work.

A step is two functions: the layers, of so many rows, without or with whole segments, whose attention is another kernel,
and what follows, of so many masked rows. Each is captured at a few sizes, all while the model is loaded, and a step is
padded up to the next size of each; what else it depends on lies in memory. So no request waits for a graph to be
captured or a kernel to be compiled.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable

import torch

# Rows of a tile of large matrix products, whose time is a step's at many rows.
ROW_TILE = 128
# Above so many rows the GPU is busy for longer than the host takes to launch its kernels one by one.
MAX_GRAPH_ROWS = 2048


def default_sizes(largest: int) -> list[int]:
    """8, 16, ..., 64, 80, ..., 128, 160, ..., 512, 576, ..., 1024, 1152, ... up to the largest that is asked for."""
    sizes = [*range(8, 64, 8), *range(64, 128, 16), *range(128, 512, 32), *range(512, 1024, 64)]
    sizes += range(1024, MAX_GRAPH_ROWS + 1, ROW_TILE)
    return [size for size in sizes if size < largest + ROW_TILE]


class StepGraphs:
    """function(size), which launches the same kernels on the same memory whenever the size is the same, and its graphs.

    function(size) must also take sizes that were not captured. Without sizes it simply runs.
    """

    def __init__(self, function: Callable[[int], None], sizes: Iterable[int]) -> None:
        self._function = function
        self._sizes = sorted(sizes)
        self._captured: dict[int, torch.cuda.CUDAGraph] = {}

    @property
    def number(self) -> int:
        """How many graphs `capture` makes."""
        return len(self._sizes)

    def padded(self, size: int) -> int:
        """The next size that was captured; above all of them the size in whole tiles of large matrix products."""
        if not self._sizes:
            return size
        place = bisect_left(self._sizes, size)
        return self._sizes[place] if place < len(self._sizes) else -(-size // ROW_TILE) * ROW_TILE

    def capture(self, pool: tuple[int, int], on_capture: Callable[[], None], wait: Callable[[], None]) -> None:
        """Graphs never run side by side, so all of them share the pool's memory for their intermediate tensors. wait:
        for the GPU, before it is waited for."""
        # NCCL's threads may look at their events meanwhile
        mode = "thread_local" if torch.distributed.is_initialized() else "global"
        # the largest first: the others fit into its memory
        for size in reversed(self._sizes):
            # what is compiled, loaded or chosen at its first call cannot be captured
            self._function(size)
            wait()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode=mode):
                self._function(size)
            self._captured[size] = graph
            on_capture()

    def drop(self) -> None:
        """The graphs, whoever still holds this: what they have captured may be destroyed then, and function goes on
        without them."""
        while self._captured:
            self._captured.popitem()[1].reset()

    def __call__(self, size: int) -> None:
        """function(size), by its graph where it was captured."""
        if size in self._captured:
            self._captured[size].replay()
        else:
            self._function(size)
