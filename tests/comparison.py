"""Judges another implementation's output against the reference's: equal, excused by a near-tie, or wrong.

At float64 nothing is excused. At float32 a sequence may part from the reference where the reference itself was about to
do so: within a block its state depends only on the tokens before, so the first block that differs holds the first
difference, and it fell at or before the step in which the reference revealed a token that differs. One of those steps
must have had a margin below `margin`; and more than 1 % of such sequences is a fault all the same. Where several blocks
are open at once, a step of any block may be to blame.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from tests.reference import Result

NEAR_TIE = 1e-4
EXCUSED_SHARE = 0.01


class Output(Protocol):
    """What is judged; blockinfer's `RequestOutput.outputs[0]` fits."""

    token_ids: list[int]
    finish_reason: str
    stop_reason: int | None


@dataclass(frozen=True)
class Difference:
    """The first output position that differs, and the least margin of the steps that may have caused it."""

    position: int
    margin: float
    expected: int | None
    got: int | None

    def __str__(self) -> str:
        return f"position {self.position}: expected {self.expected}, got {self.got} (margin {self.margin:.1e})"


def shown_tokens(output: Output) -> list[int]:
    """The tokens and, behind them, the stop token that ended them."""
    return list(output.token_ids) + ([output.stop_reason] if output.finish_reason == "stop" else [])


def difference(expected: Result, output: Output) -> Difference | None:
    """None when the tokens, the finish reason and the stop token are the same."""
    a, b = shown_tokens(expected), shown_tokens(output)
    if a == b and expected.finish_reason == output.finish_reason:
        return None
    position = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    wanted = a[position] if position < len(a) else None
    got = b[position] if position < len(b) else None
    well_formed = (output.finish_reason == "stop" and got_is_stop(b, expected)) or (
        output.finish_reason == "length" and len(b) == expected.settings.max_tokens
    )
    if not well_formed or wanted is None or got is None:
        return Difference(position, math.inf, wanted, got)
    return Difference(position, least_margin(expected, a, b, position), wanted, got)


def got_is_stop(shown: list[int], expected: Result) -> bool:
    stops = expected.settings.stop_ids
    return shown[-1] in stops and not any(token in stops for token in shown[:-1])


def least_margin(expected: Result, a: list[int], b: list[int], position: int) -> float:
    """Of the steps that may be to blame, up to the first that revealed a token that differs."""
    if expected.settings.one_block_at_a_time:
        length = expected.settings.block_length
        start = position // length * length
        steps, positions = expected.blocks[position // length], range(start, min(start + length, len(a), len(b)))
    else:
        steps, positions = sum(expected.blocks, []), range(min(len(a), len(b)))
    differing = {i for i in positions if a[i] != b[i]}
    margin = math.inf
    for step in steps:
        margin = min(margin, step.margin)
        if differing & set(step.revealed):
            break
    return margin


def assert_equivalent(pairs: Iterable[tuple[Result, Output]], *, margin: float = 0.0) -> None:
    """margin 0: every pair equal. Above 0: a pair may differ by a near-tie, at most 1 % of the pairs do."""
    pairs = list(pairs)
    assert pairs, "nothing was compared"
    found = [(i, difference(expected, output)) for i, (expected, output) in enumerate(pairs)]
    different = [(i, d) for i, d in found if d is not None]
    wrong = [f"sequence {i} ({pairs[i][0].settings}): {d}" for i, d in different if not d.margin < margin]
    assert not wrong, f"{len(wrong)} of {len(pairs)} sequences differ:\n" + "\n".join(wrong[:10])
    assert len(different) <= EXCUSED_SHARE * len(pairs), (
        f"{len(different)} of {len(pairs)} sequences differ by a near-tie, more than 1 %:\n"
        + "\n".join(f"sequence {i}: {d}" for i, d in different[:10])
    )
