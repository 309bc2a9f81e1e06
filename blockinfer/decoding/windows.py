"""Several blocks open at once: when a block opens, when it is active, and when it is finished.

The definition is d3LLM's (hao-ai-lab/d3LLM, `generate_multi_block`). Blocks open in order, the first one alone in a
request's first step. After a step one more opens where enough of the last one is revealed. A block is active once
enough of the one before it is: then the schedule counts, and so does a limit of its steps. A block is finished once it
and all before it are revealed.
"""

from collections.abc import Iterable
from typing import NamedTuple

# Of one request at once, all that 4,096 tokens have in blocks of 32: a further one opens when one is finished.
MAX_OPEN_BLOCKS = 128


class OpenBlock(NamedTuple):
    """Positions start..stop-1, of which `number` are masked when it opens, or are given and count as if they had been,
    and of which `left` still are.

    limit: of its active steps, the last of which reveals all; None is none. step: steps made since it was opened.
    active_step: those of them in which it was active.
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
        # divided, so that 11 of 20 are .55
        return (self.number - self.left) / self.number >= share

    @property
    def is_last_step(self) -> bool:
        """Whether the limit makes its next step reveal all that is left."""
        return self.limit is not None and self.is_active and self.active_step + 1 >= self.limit


Window = tuple[OpenBlock, ...]


def after_step(window: Window, left: Iterable[int]) -> Window:
    """left: of each block the positions that are masked still."""
    return tuple(
        block._replace(left=n, step=block.step + 1, active_step=block.active_step + block.is_active)
        for block, n in zip(window, left, strict=True)
    )


def num_finished(window: Window) -> int:
    """How many of its first blocks have no mask."""
    return next((i for i, block in enumerate(window) if block.left), len(window))


def activated(window: Window, share: float) -> Window:
    """Blocks whose predecessor is revealed to this share are active; the first one's is finished."""
    return window[:1] + tuple(
        block if block.is_active else block._replace(is_active=before.is_revealed(share))
        for before, block in zip(window, window[1:], strict=False)
    )
