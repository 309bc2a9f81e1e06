"""Unmasking rules: which masked positions of the open blocks a step reveals.

A rule is a way to rank the masked positions and a way to choose of them, both of which are in `kernels.slots`. It
reveals nothing but masked positions of open blocks, and at least one of the first of them.
"""

from typing import NamedTuple

from blockinfer.kernels.slots import OF_A_BLOCK, Choice, Rank


class Rule(NamedTuple):
    """rank, choice: what positions are ranked by, and which of them are revealed.

    scheduled: the schedule decides alone, so that the number of steps is known beforehand. option, default: the name of
    the SamplingParams field that the choice reads.
    """

    rank: Rank
    choice: Choice
    scheduled: bool
    option: str | None = None
    default: float = 0.0

    @property
    def has_schedule(self) -> bool:
        """Whether it counts what the schedule says, alone or beside a threshold."""
        return self.choice in OF_A_BLOCK

    def choice_option(self, value: float) -> float:
        """What the choice reads, where the rule's option has this value: of a threshold the lowest score."""
        if self.choice not in (Choice.THRESHOLD, Choice.SCHEDULED_THRESHOLD):
            return value
        # minus what all other tokens have, or minus the entropy
        return value - 1 if self.rank == Rank.CONFIDENCE else -value


def scheduled_count(length: int, steps: int, step: int) -> int:
    """Positions that step `step` (from 0) of `steps` reveals in a block of `length`: as even as can be, more first.

    LLaDA's schedule (arXiv 2502.09992, get_num_transfer_tokens). Past the last step nothing is left: 0.
    """
    return length // steps + (step < length % steps) if step < steps else 0


RULES: dict[str, Rule] = {
    "low_confidence": Rule(Rank.CONFIDENCE, Choice.TOP, scheduled=True),
    "random": Rule(Rank.RANDOM, Choice.TOP, scheduled=True),
    "sequential": Rule(Rank.POSITION, Choice.TOP, scheduled=True),
    "threshold": Rule(Rank.CONFIDENCE, Choice.THRESHOLD, scheduled=False, option="threshold", default=0.9),
    "factor": Rule(Rank.CONFIDENCE, Choice.FACTOR, scheduled=False, option="factor", default=1.0),
    "entropy": Rule(Rank.CERTAINTY, Choice.ENTROPY, scheduled=False, option="entropy_bound", default=0.15),
    "entropy_threshold": Rule(
        Rank.CERTAINTY, Choice.THRESHOLD, scheduled=False, option="entropy_threshold", default=0.5
    ),
    "scheduled_threshold": Rule(
        Rank.CONFIDENCE, Choice.SCHEDULED_THRESHOLD, scheduled=False, option="threshold", default=0.95
    ),
}
