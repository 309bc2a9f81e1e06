"""Checks shared by the option dataclasses: every message names the option, the value and what was expected."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager


def shown(value: object) -> str:
    """repr of anything for a message, cut to a line; Python refuses to format an integer of over 4,300 digits."""
    try:
        text = repr(value)
    except Exception as error:
        return f"something of type {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {shown(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {shown(value)}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {shown(value)}")
    if value >= 2**64:
        raise ValueError(f"{name} must be below 2**64, got {shown(value)}")


def check_seed(seed: object) -> None:
    """A seed is a 64-bit integer, or None."""
    if seed is None:
        return
    check_int("seed", seed, 0)


def check_real(name: str, value: object, minimum: float, maximum: float) -> None:
    if not is_finite(value):
        raise ValueError(f"{name} must be a finite number, got {shown(value)}")
    if not minimum <= value <= maximum:
        bound = f"at least {minimum}" if maximum == math.inf else f"between {minimum} and {maximum}"
        raise ValueError(f"{name} must be {bound}, got {shown(value)}")


def is_finite(value: object) -> bool:
    """Whether it is a number that fits a finite float; 10**400 does not."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}{nearest(value, choices)}")


def check_text(name: str, text: str) -> None:
    """Refuses lone surrogates: a str can hold them, but a tokenizer cannot read them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode, got a lone surrogate, {text[error.start]!r}") from error


def nearest(value: object, choices: Iterable[str]) -> str:
    """A hint for a mistyped name: '; did you mean X?', or '' if no choice comes close."""
    if not isinstance(value, str) or not 0 < len(value) < 100:
        return ""
    choices = list(choices)
    close = [*difflib.get_close_matches(value, choices, n=1), *(name for name in choices if name.startswith(value))]
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse_unknown(owner: str, given: Iterable[str], known: Iterable[str], hints: Mapping[str, str]) -> None:
    """Raises TypeError, as Python does for an unknown keyword, with the hint or the nearest known name."""
    known = list(known)
    for name in given:
        if name not in known:
            hint = f"; {hints[name]}" if name in hints else nearest(name, known)
            hint = hint or f"; it takes {', '.join(known)}"
            raise TypeError(f"{owner} got an unknown option {shown(name)}{hint}")


@contextmanager
def foreign_errors(message: str) -> Iterator[None]:
    """Turns whatever another library raises into a ValueError with this message. A Rust panic is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{message}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Another library's error message, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
