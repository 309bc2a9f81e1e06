"""The tensors of a family's published checkpoints, by arithmetic alone: before anything is built."""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple


class TensorGroup(NamedTuple):
    """Tensors that come once for each index: those of the model, of a layer, of an expert.

    prefix: what their names begin with, with a {} for each of `indices`. shapes: by the rest of the name. asked: the
    fields of the config that say how many indices there are, as an error names them.
    """

    prefix: str
    indices: tuple[range, ...]
    shapes: dict[str, tuple[int, ...]]
    asked: str = ""

    @property
    def number(self) -> int:
        """How many tensors there are."""
        return len(self.shapes) * math.prod(map(len, self.indices))

    @property
    def parameters(self) -> int:
        return self.parameters_of(1)

    def parameters_of(self, ranks: int, everyones: Collection[str] = ()) -> int:
        """Of one of so many ranks, which share all matrices but those of these names."""
        sizes = (
            math.prod(shape) // (ranks if len(shape) == 2 and self.prefix + name not in everyones else 1)
            for name, shape in self.shapes.items()
        )
        return math.prod(map(len, self.indices)) * sum(sizes)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and the shape of each."""
        for index in itertools.product(*self.indices):
            prefix = self.prefix.format(*index)
            yield from ((prefix + name, shape) for name, shape in self.shapes.items())


def num_parameters(groups: Iterable[TensorGroup], ranks: int, everyones: Collection[str]) -> int:
    """Of one of so many ranks, which share all matrices but those of these names."""
    return sum(group.parameters_of(ranks, everyones) for group in groups)
