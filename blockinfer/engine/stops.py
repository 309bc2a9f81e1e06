"""Stop strings: where the first one in an answer is complete."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """The stop string, the number of tokens up to the one that completes it, and the remaining text."""

    stop: str
    num_tokens: int
    text: str


def find_stop(
    decode: Callable[[list[int]], str], token_ids: list[int], searched: int, stops: Sequence[str], include: bool
) -> StopMatch | None:
    """Finds the stop string that is complete with the fewest tokens, or the first in the list of several, as vLLM does.
    The first `searched` of token_ids are known to contain none.

    The text is cut before the stop, or after it if `include` is set.
    """
    if _first_in(decode(token_ids), stops) is None:
        return None
    # more tokens only add text: the first `low` contain no stop, the first `high` do
    low, high = searched, len(token_ids)
    while low + 1 < high:
        middle = (low + high) // 2
        if _first_in(decode(token_ids[:middle]), stops) is None:
            low = middle
        else:
            high = middle
    text = decode(token_ids[:high])
    stop = _first_in(text, stops)
    end = text.index(stop) + len(stop) * include
    return StopMatch(stop, high, text[:end])


def _first_in(text: str, stops: Sequence[str]) -> str | None:
    return next((stop for stop in stops if stop in text), None)
