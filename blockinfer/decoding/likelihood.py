"""The likelihood of an answer under masked diffusion: which masks are tried, and what is estimated from them.

LLaDA's bound (arXiv 2502.09992, equation 6, and its repository's get_log_likelihood.py): with the number x of masked
tokens uniform in 1..L and the mask uniform among those of x tokens, the log-likelihood is the mean of L / x times the
sum of the masked tokens' log-probabilities.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

from blockinfer.decoding.modes import Mode, block, vanilla

Mask = tuple[int, ...]


def draw_masks(length: int, mc_num: int, seed: int) -> list[Mask]:
    """At most mc_num masks of an answer of `length` tokens, each as its masked places, ascending."""
    if 2**length - 1 <= mc_num:
        return [mask for count in range(1, length + 1) for mask in combinations(range(length), count)]
    draw = random.Random(seed)
    if is_stratified(length, mc_num):
        # the fully masked answer once, the other counts as evenly as possible
        share, more = divmod(mc_num - 1, length - 1)
        return [m for n in range(1, length) for m in _of_count(length, n, share + (n <= more), draw)] + [
            tuple(range(length))
        ]
    first = draw.randint(1, length)
    # halves round up: rounded to even, as by LLaDA's torch.round, some counts would come more often than others
    counts = [(first + (2 * i * length + mc_num) // (2 * mc_num) - 1) % length + 1 for i in range(mc_num)]
    return [_one_of_count(length, count, draw) for count in sorted(counts)]


def is_stratified(length: int, mc_num: int) -> bool:
    """Whether each number of masked tokens has at least two masks, or its only one."""
    return 2 * length <= mc_num or 2**length - 1 <= mc_num


def _of_count(length: int, count: int, number: int, draw: random.Random) -> list[Mask]:
    if math.comb(length, count) <= number:
        return list(combinations(range(length), count))
    return [_one_of_count(length, count, draw) for _ in range(number)]


def _one_of_count(length: int, count: int, draw: random.Random) -> Mask:
    return tuple(sorted(draw.sample(range(length), count)))


def estimate(length: int, mc_num: int, masks: Sequence[Mask], sums: Sequence[float]) -> tuple[float, float | None]:
    """masks: from `draw_masks`; sums: for each, the sum of its masked tokens' log-probabilities -> the log-likelihood
    and its standard error: 0 if every mask was tried, None for a single mask of several."""
    values = [length / len(mask) * total for mask, total in zip(masks, sums, strict=True)]
    if not is_stratified(length, mc_num):
        # a systematic sample of the number of masked tokens: neighbours differ by little but chance
        if len(values) < 2:
            return values[0], None
        steps = [(b - a) ** 2 for a, b in zip(values, values[1:], strict=False)]
        return math.fsum(values) / len(values), math.sqrt(math.fsum(steps) / (2 * len(steps) * len(values)))
    strata = defaultdict(list)
    for mask, value in zip(masks, values, strict=True):
        strata[len(mask)].append(value)
    means = {count: math.fsum(stratum) / len(stratum) for count, stratum in strata.items()}
    variance = 0.0
    for count, stratum in strata.items():
        if len(stratum) < math.comb(length, count):
            squares = math.fsum((value - means[count]) ** 2 for value in stratum)
            variance += squares / (len(stratum) - 1) / len(stratum)
    return math.fsum(means.values()) / length, math.sqrt(variance) / length


# Scoring treats the whole answer as one block.
SCORING_MODES: dict[str, Mode] = {"vanilla": vanilla, "block": block}
