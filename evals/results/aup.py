"""AUP, accuracy under parallelism: one number for how a decoder's settings trade accuracy for tokens a forward.

By d3LLM's definition (hao-ai-lab/d3LLM, AUP_leaderboard/aup_utils.py, `get_aup`, with its alpha of 3 and offset of 5).
There a fastest setting over 5 points worse than the slowest one is an error; here it is dropped like others.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TypeVar

ALPHA = 3.0
OFFSET = 5.0  # points
Point = tuple[float, float]
Key = TypeVar("Key")


def aup(points: Iterable[Point], best: float) -> float:
    """points: (tokens a forward, accuracy in per cent) of each setting. best: the best accuracy of all decoders
    compared, in per cent.

    The first point, with the fewest tokens, counts in full; from there on it is the area under accuracy times weight,
    min(exp(-3 (1 - accuracy / best)), 1). Points more than 5 below the first are dropped. Of two with as many tokens
    the better one comes first. Raises ValueError if there is no point.
    """
    ordered = sorted(points, key=lambda point: (point[0], -point[1]))
    if not ordered:
        raise ValueError("AUP needs at least one point")
    (first, accuracy), *_ = ordered
    kept = [(tokens, _weighted(y, best)) for tokens, y in ordered if y >= accuracy - OFFSET]
    pairs = zip(kept, kept[1:], strict=False)
    return first * accuracy + sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairs)


def _weighted(accuracy: float, best: float) -> float:
    return accuracy * min(math.exp(-ALPHA * (1 - accuracy / best)), 1.0) if best else 0.0


def scores(points: Iterable[tuple[Key, Point]]) -> dict[Key, tuple[float, int]]:
    """Of each decoder with several points its score, relative to the best of all of them, and its number of points."""
    of: dict[Key, list[Point]] = defaultdict(list)
    for key, point in points:
        of[key].append(point)
    best = max((accuracy for found in of.values() for _, accuracy in found), default=0.0)
    return {key: (aup(found, best), len(found)) for key, found in of.items() if len(found) > 1}
