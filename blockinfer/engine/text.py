"""Text of a request that is still under way: what of it no later token can change."""

from collections.abc import Iterable

# What stands where bytes are no whole character, or not yet.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def settled(text: str, before: str, stop: Iterable[str]) -> str:
    """As much of `text`, the decoded tokens so far, as will stand whatever comes.

    Held back is half a character at its end, and what a stop string may begin with. `before` is what was given out
    before: where a tokenizer takes that back, which byte-level ones never do, it stands until the text goes on from it.
    """
    text = text.rstrip(_REPLACEMENT)
    text = text[: len(text) - max((_overlap(text, string) for string in stop), default=0)]
    return text if text.startswith(before) else before


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` that `string` goes on from."""
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)
