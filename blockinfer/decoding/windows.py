"""Several blocks open at once: when a block opens, becomes active, and is finished.

Defined as in d3LLM (hao-ai-lab/d3LLM, `generate_multi_block`). Blocks open in order, only the first in a request's
first step. After a step one more opens if enough of the last one is revealed. A block becomes active once enough of the
one before it is revealed: then the schedule and a limit on its steps apply. A block is finished once it and all before
it are revealed.
"""

from collections.abc import Iterable
from typing import NamedTuple

# Per request: 4,096 tokens in blocks of 32. Beyond that, a block opens when another is finished.
MAX_OPEN_BLOCKS = 128


class OpenBlock(NamedTuple):
    """Positions start..stop-1. number: how many were masked when the block opened, or are given and count as if they
    had been. left: how many are still masked.

    limit: on its active steps, the last of which reveals all that is left; None means no limit. step: steps made since
    it opened. active_step: those of them in which it was active.
    """

    start: int
    stop: int
    number: int
    left: int
    limit: int | None
    step: int = 0
    active_step: int = 0
    is_active: bool = True

    def is_revealed(self, share: float) -> bool:
        """Whether at least this share of its positions is revealed."""
        # a quotient, so that 11 of 20 equals .55
        return (self.number - self.left) / self.number >= share

    @property
    def is_last_step(self) -> bool:
        """Whether the limit makes the next step reveal everything left."""
        return self.limit is not None and self.is_active and self.active_step + 1 >= self.limit


Window = tuple[OpenBlock, ...]


def after_step(window: Window, left: Iterable[int]) -> Window:
    """left: the masked positions left in each block."""
    return tuple(
        block._replace(left=n, step=block.step + 1, active_step=block.active_step + block.is_active)
        for block, n in zip(window, left, strict=True)
    )


def num_finished(window: Window) -> int:
    """How many leading blocks have no mask."""
    return next((i for i, block in enumerate(window) if block.left), len(window))


def activated(window: Window, share: float) -> Window:
    """Activates blocks whose predecessor is revealed to this share; the first block's predecessor is finished."""
    return window[:1] + tuple(
        block if block.is_active else block._replace(is_active=before.is_revealed(share))
        for before, block in zip(window, window[1:], strict=False)
    )
