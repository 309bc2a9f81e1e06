"""CUDA graphs of a step: one launch for some three hundred, which at few rows take longer than the GPU's work."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

# What is kept of a device's memory and of the time to capture: shapes beyond so many run without a graph.
_MAX_GRAPHS = 256


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    result: torch.Tensor


class GraphCache:
    """The graphs captured so far, by what the captured function depends on besides the memory that it reads."""

    def __init__(self) -> None:
        self._captured: dict[Hashable, _Captured] = {}
        self._seen: set[Hashable] = set()
        self._pool: tuple[int, int] | None = None

    def run(self, key: Hashable, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """function(), which must launch the same kernels on the same memory whenever the key is the same.

        The first time it simply runs, which also compiles its kernels; the second time it is captured. The result is
        overwritten by the next run.
        """
        if key not in self._captured:
            if key not in self._seen or len(self._captured) >= _MAX_GRAPHS:
                self._seen.add(key)
                return function()
            self._captured[key] = self._capture(function)
        captured = self._captured[key]
        captured.graph.replay()
        return captured.result

    def _capture(self, function: Callable[[], torch.Tensor]) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        # graphs never run side by side, so all of them share the memory of their intermediate tensors
        with torch.cuda.graph(graph, pool=self._pool):
            result = function()
        self._pool = graph.pool()
        return _Captured(graph, result)
