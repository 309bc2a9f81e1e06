"""Text of a running request: the part that no later token can change."""

from collections.abc import Iterable

# Stands for bytes that are not, or not yet, a whole character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def settled(text: str, before: str, stop: Iterable[str]) -> str:
    """The part of `text`, the decoded tokens so far, that no later token changes.

    Holds back an incomplete character at the end, and anything that may begin a stop string. `before` is what was
    returned last. If a tokenizer takes that back, which byte-level ones never do, it is returned again until the text
    continues it.
    """
    text = text.rstrip(_REPLACEMENT)
    text = text[: len(text) - max((_overlap(text, string) for string in stop), default=0)]
    return text if text.startswith(before) else before


def _overlap(text: str, string: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `string`."""
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)
