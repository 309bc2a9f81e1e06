"""The tensors of a family's published checkpoints, computed before anything is built."""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple


class TensorGroup(NamedTuple):
    """Tensors that repeat for each index: those of the model, of a layer, of an expert.

    prefix: the start of their names, with a {} for each of `indices`. shapes: by the rest of the name. asked: the
    config's fields that set the number of indices, as an error names them.
    """

    prefix: str
    indices: tuple[range, ...]
    shapes: dict[str, tuple[int, ...]]
    asked: str = ""

    @property
    def number(self) -> int:
        """The number of tensors."""
        return len(self.shapes) * math.prod(map(len, self.indices))

    def parameters_of(self, ranks: int, everyones: Collection[str] = ()) -> int:
        """Per rank, if all matrices but those named in `everyones` are split over `ranks`."""
        sizes = (
            math.prod(shape) // (ranks if len(shape) == 2 and self.prefix + name not in everyones else 1)
            for name, shape in self.shapes.items()
        )
        return math.prod(map(len, self.indices)) * sum(sizes)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape of each."""
        for index in itertools.product(*self.indices):
            prefix = self.prefix.format(*index)
            yield from ((prefix + name, shape) for name, shape in self.shapes.items())


def num_parameters(groups: Iterable[TensorGroup], ranks: int, everyones: Collection[str]) -> int:
    """Per rank, if all matrices but those named in `everyones` are split over `ranks`."""
    return sum(group.parameters_of(ranks, everyones) for group in groups)
