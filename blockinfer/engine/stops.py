"""Stop strings: where in an answer the first of them is complete."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """The stop string, the tokens up to the one that completes it, and the text that is left of them."""

    stop: str
    num_tokens: int
    text: str


def find_stop(
    decode: Callable[[list[int]], str], token_ids: list[int], searched: int, stops: Sequence[str], include: bool
) -> StopMatch | None:
    """token_ids, of which the first `searched` are known to hold none of the stops -> what ends them, as vLLM has it:
    the stop that is complete with the fewest tokens, and of several the first of the list.

    The text is cut before the stop, or behind it where `include` is set.
    """
    if _first_in(decode(token_ids), stops) is None:
        return None
    # more tokens only add to the text: those below `low` hold none, those up to `high` do
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
