"""The configurations that the gate runs, and how many rows of each."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GateCase:
    """One configuration that is timed: `rows` requests at once, all with the same options."""

    mode: str
    block_length: int
    unmasking: str
    max_tokens: int
    rows: int
    denoising_steps: int | None = None
    block_add_threshold: float = 1.0

    @property
    def id(self) -> str:
        opened = f"-add{self.block_add_threshold:g}" if self.block_add_threshold < 1 else ""
        return f"{self.mode}-{self.block_length}-{self.unmasking}{opened}"

    @property
    def params(self) -> dict[str, Any]:
        """A commit that can open only one block at a time takes the cases with one block."""
        opened = {"block_add_threshold": self.block_add_threshold} if self.block_add_threshold < 1 else {}
        return opened | {
            "mode": self.mode,
            "block_length": self.block_length,
            "unmasking": self.unmasking,
            "max_tokens": self.max_tokens,
            "denoising_steps": self.denoising_steps,
            "seed": 0,
        }


@dataclass(frozen=True)
class Profile:
    cases: tuple[GateCase, ...]
    pairs: int


@dataclass(frozen=True)
class Worse:
    """Extra load on head, to test the gate: a share of its time, in all cases or in those of one mode or rule, or a
    share of its memory."""

    share: float = 0.0
    where: str = ""

    @classmethod
    def parse(cls, text: str) -> "Worse":
        """Parses 0.1, 0.1:vanilla, 0.1:threshold, 0.1:memory. Raises ValueError."""
        share, colon, where = text.partition(":")
        places = {place for case in PROFILES["full"].cases for place in (case.mode, case.unmasking)} | {MEMORY}
        try:
            worse = cls(float(share), where)
        except ValueError:
            worse = cls(-1)
        if not 0 <= worse.share <= 10 or (colon and where not in places):
            raise ValueError(
                f"must be a share from 0 to 10, such as 0.1, which may have a place, such as 0.1:vanilla or 0.1:memory "
                f"(one of {', '.join(sorted(places))}); got {text!r}"
            )
        return worse

    def work(self, case: GateCase) -> float:
        return self.share if self.where in ("", case.mode, case.unmasking) else 0.0

    @property
    def memory(self) -> float:
        return self.share if self.where == MEMORY else 0.0

    def __str__(self) -> str:
        return f"{100 * self.share:g} %" + (f" in {self.where}" if self.where else "")


MEMORY = "memory"
# Every mode, several open blocks and every rule but scheduled_threshold, whose ranking and choices the others have, in
# as few cases as possible.
_QUICK = (
    GateCase("block", 32, "low_confidence", max_tokens=64, rows=2, denoising_steps=2),
    GateCase("block", 32, "threshold", max_tokens=64, rows=2),
    GateCase("vanilla", 32, "random", max_tokens=32, rows=2, denoising_steps=2),
    GateCase("prefix_cache", 32, "sequential", max_tokens=32, rows=2, denoising_steps=2),
    GateCase("dual_cache", 32, "factor", max_tokens=32, rows=2),
    GateCase("block_refresh", 32, "entropy", max_tokens=64, rows=2),
    GateCase("block", 8, "entropy_threshold", max_tokens=32, rows=2, block_add_threshold=0.5),
)
# Every mode with one rule, the same rules with one mode, several open blocks; more rows at once.
_FULL = (
    GateCase("block", 32, "low_confidence", max_tokens=64, rows=4, denoising_steps=4),
    GateCase("block", 32, "threshold", max_tokens=64, rows=4),
    GateCase("block", 32, "random", max_tokens=64, rows=4, denoising_steps=4),
    GateCase("block", 32, "sequential", max_tokens=64, rows=4, denoising_steps=4),
    GateCase("block", 32, "factor", max_tokens=64, rows=4),
    GateCase("block", 32, "entropy", max_tokens=64, rows=4),
    GateCase("block", 32, "entropy_threshold", max_tokens=64, rows=4),
    GateCase("block", 8, "threshold", max_tokens=32, rows=4, block_add_threshold=0.5),
    GateCase("block_refresh", 32, "low_confidence", max_tokens=64, rows=4, denoising_steps=4),
    GateCase("vanilla", 32, "low_confidence", max_tokens=32, rows=4, denoising_steps=2),
    GateCase("dual_cache", 32, "low_confidence", max_tokens=64, rows=4, denoising_steps=4),
    GateCase("prefix_cache", 32, "low_confidence", max_tokens=64, rows=4, denoising_steps=4),
)
# A unit takes 0.05 to 0.3 s: long beside a clock's resolution, short beside other processes' bursts.
PROFILES = {"quick": Profile(_QUICK, pairs=60), "full": Profile(_FULL, pairs=80)}
LEAST_PAIRS = 40
# A round is a pair of processes. Two of the same code differ by up to 3 % throughout, and more pairs do not average
# that out: more processes do.
PAIRS_A_ROUND = 5
