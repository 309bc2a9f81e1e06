"""Editing (LLaDA2.1): when a block whose revealed tokens may still change is finished."""

from typing import NamedTuple


class BlockEdits(NamedTuple):
    """The state of a block that is edited.

    first: positions before it are given. token_ids: all of the block's tokens after the last step, None where masked;
    empty before the first step. post_steps: steps so far that began without a mask.
    """

    first: int
    token_ids: tuple[int | None, ...] = ()
    post_steps: int = 0

    @property
    def revealed(self) -> list[int]:
        """The positions that may change."""
        return [i for i in range(self.first, len(self.token_ids)) if self.token_ids[i] is not None]

    def after_step(self, token_ids: tuple[int | None, ...], max_post_steps: int) -> tuple["BlockEdits", bool]:
        """token_ids: as above -> the new state, and whether the block is finished: nothing is masked, and either the
        step began without a mask and changed nothing, or max_post_steps such steps were made."""
        had_masks = len(self.revealed) < len(token_ids) - self.first
        changed = any(self.token_ids[i] != token_ids[i] for i in self.revealed)
        now = BlockEdits(self.first, token_ids, self.post_steps + (not had_masks))
        is_full = len(now.revealed) == len(token_ids) - self.first
        return now, is_full and ((not had_masks and not changed) or now.post_steps >= max_post_steps)
