"""Axes: the place of a value, and the round values that are marked."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps values from low to high onto pixels from start to end; logarithmic needs low > 0."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, most: int) -> list[float]:
        """At most `most` (two or more) round values within the scale, and as many as fit."""
        choices = _logarithmic(self.low, self.high) if self.logarithmic else _linear(self.low, self.high)
        return next((ticks for ticks in choices if len(ticks) <= most), [])


def _linear(low: float, high: float) -> Iterator[list[float]]:
    exponent = math.floor(math.log10(high - low)) - 2
    while True:
        for digit in (1, 2, 5):
            step = digit * 10.0**exponent
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            yield [float(f"{i * step:.12g}") for i in range(first, last + 1)]
        exponent += 1


def _logarithmic(low: float, high: float) -> Iterator[list[float]]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        yield [v for e in decades for d in digits if low <= (v := float(f"{d * 10.0**e:.12g}")) <= high]
    for apart in range(2, len(decades) + 1):
        yield [v for e in decades[::apart] if low <= (v := 10.0**e) <= high]


def around(values: Sequence[float], logarithmic: bool, room: float, most: float = math.inf) -> tuple[float, float]:
    """Limits a little beyond the values, by `room` at least, never below 0 or above `most`; never equal."""
    low, high = min(values), max(values)
    if logarithmic:
        factor = max((high / low) ** 0.06, 1.15)
        return low / factor, high * factor
    room = max(0.06 * (high - low), room)
    return max(0.0, low - room), min(most, high + room)
