"""Which split owns what: every structure, number tuple and pairing belongs to one, by a hash of itself."""

import random
import zlib
from collections.abc import Callable
from typing import Any

SPLITS = ("train", "validation", "heldout")


def split_of(*key: Any) -> str:
    """The split that owns `key`: 10 % of all keys are held out, 5 % are for validation. Stable across processes."""
    bucket = zlib.crc32(repr(key).encode()) % 20
    return "heldout" if bucket < 2 else "validation" if bucket < 3 else "train"


def draw(rng: random.Random, split: str, make: Callable[[random.Random], Any], *name: Any) -> Any:
    """Call `make` until `(*name, result)` belongs to `split`. `make` returns None for a draw that is not usable."""
    for _ in range(20_000):
        value = make(rng)
        if value is not None and split_of(*name, value) == split:
            return value
    raise RuntimeError(f"no value of {name} found for the split {split!r}: the pool is too small to be divided")
