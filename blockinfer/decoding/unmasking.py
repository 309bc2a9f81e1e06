"""Unmasking rules: which masked positions of the open blocks a step reveals.

A rule combines a ranking of the masked positions and a choice among them, both from `kernels.slots`. It reveals only
masked positions of open blocks, and at least one of the first open block.
"""

from typing import NamedTuple

from blockinfer.kernels.slots import OF_A_BLOCK, Choice, Rank


class Rule(NamedTuple):
    """rank: what positions are ranked by. choice: which of them are revealed.

    scheduled: the schedule alone decides, so the number of steps is known beforehand. option, default: the name and
    default of the SamplingParams field that the choice reads.
    """

    rank: Rank
    choice: Choice
    scheduled: bool
    option: str | None = None
    default: float = 0.0

    @property
    def has_schedule(self) -> bool:
        """Whether the schedule counts, alone or beside a threshold."""
        return self.choice in OF_A_BLOCK

    def choice_option(self, value: float) -> float:
        """The choice's parameter for this value of the rule's option; for a threshold, the lowest score."""
        if self.choice not in (Choice.THRESHOLD, Choice.SCHEDULED_THRESHOLD):
            return value
        # scores: minus the probability of all other tokens, or minus the entropy
        return value - 1 if self.rank == Rank.CONFIDENCE else -value


def scheduled_count(length: int, steps: int, step: int) -> int:
    """Positions that step `step` (from 0) of `steps` reveals in a block of `length`: as even as possible, larger first.

    LLaDA's schedule (arXiv 2502.09992, get_num_transfer_tokens); 0 past the last step.
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
