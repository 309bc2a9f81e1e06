"""Checks shared by the option dataclasses: every message names the option, the value and what was expected."""

import difflib
import math
from collections.abc import Iterable


def check_int(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_seed(seed: object) -> None:
    """A seed is 64 bits, or None for none given."""
    if seed is None:
        return
    check_int("seed", seed, 0)
    if seed >= 2**64:
        raise ValueError(f"seed must be below 2**64, got {seed}")


def check_real(name: str, value: object, minimum: float, maximum: float = math.inf) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if not minimum <= value <= maximum:
        bound = f"at least {minimum}" if maximum == math.inf else f"between {minimum} and {maximum}"
        raise ValueError(f"{name} must be {bound}, got {value}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{nearest(value, choices)}")


def check_text(name: str, text: str) -> None:
    """A lone surrogate is half a character, which a str can hold and a tokenizer cannot read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode, got a lone surrogate, {text[error.start]!r}") from error


def nearest(value: object, choices: Iterable[str]) -> str:
    """A hint for a mistyped name: '; did you mean X?', or nothing where no choice comes close."""
    close = difflib.get_close_matches(str(value), list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse_unknown(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError, as Python does for an unknown keyword, naming the nearest known one."""
    known = list(known)
    for name in given:
        if name not in known:
            hint = nearest(name, known) or f"; it takes {', '.join(known)}"
            raise TypeError(f"{owner} got an unknown option {name!r}{hint}")
