"""Editing (LLaDA2.1): when a block whose revealed tokens may still change is finished."""

from typing import NamedTuple


class BlockEdits(NamedTuple):
    """Where a block that is edited stands.

    first: the places before it are given. token_ids: of all its places after the last step, None where one is masked;
    empty before the first step. post_steps: steps made so far that found no mask.
    """

    first: int
    token_ids: tuple[int | None, ...] = ()
    post_steps: int = 0

    @property
    def revealed(self) -> list[int]:
        """The places that may change."""
        return [i for i in range(self.first, len(self.token_ids)) if self.token_ids[i] is not None]

    def after_step(self, token_ids: tuple[int | None, ...], max_post_steps: int) -> tuple["BlockEdits", bool]:
        """token_ids: as above -> how it stands now, and whether it is finished: nothing is masked, and the step found
        no mask and changed nothing, or so many such steps are made."""
        had_masks = len(self.revealed) < len(token_ids) - self.first
        changed = any(self.token_ids[i] != token_ids[i] for i in self.revealed)
        now = BlockEdits(self.first, token_ids, self.post_steps + (not had_masks))
        is_full = len(now.revealed) == len(token_ids) - self.first
        return now, is_full and ((not had_masks and not changed) or now.post_steps >= max_post_steps)
