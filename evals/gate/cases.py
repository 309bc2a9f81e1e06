"""The configurations that the gate runs, and how much of each."""

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

    @property
    def id(self) -> str:
        return f"{self.mode}-{self.block_length}-{self.unmasking}"

    @property
    def params(self) -> dict[str, Any]:
        return {
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


_QUICK = (
    GateCase("block", 32, "low_confidence", max_tokens=64, rows=4, denoising_steps=4),
    GateCase("block", 32, "threshold", max_tokens=64, rows=4),
    GateCase("vanilla", 32, "low_confidence", max_tokens=32, rows=4, denoising_steps=2),
)
_MORE = (
    GateCase("block", 32, "random", max_tokens=64, rows=4, denoising_steps=4),
    GateCase("block", 32, "sequential", max_tokens=64, rows=4, denoising_steps=4),
    GateCase("block", 32, "factor", max_tokens=64, rows=4),
    GateCase("block", 32, "entropy", max_tokens=64, rows=4),
    GateCase("block_refresh", 32, "low_confidence", max_tokens=64, rows=4, denoising_steps=4),
    GateCase("dual_cache", 32, "low_confidence", max_tokens=64, rows=4, denoising_steps=4),
    GateCase("prefix_cache", 32, "low_confidence", max_tokens=64, rows=4, denoising_steps=4),
)
# A unit takes 0.1 to 0.3 s: long beside a clock's grain, short beside what other processes do.
PROFILES = {"quick": Profile(_QUICK, pairs=40), "full": Profile(_QUICK + _MORE, pairs=80)}
LEAST_PAIRS = 40
