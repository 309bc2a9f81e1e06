"""The suite's options for open blocks and editing, and which of its modes and rules read them."""

from collections.abc import Callable
from typing import Any

import pytest

from blockinfer.decoding.modes import DROP_SUFFIX, MAY_DELAY
from blockinfer.decoding.unmasking import RULES
from evals.runs.configurations import PLAIN, STANDARD

Option = Callable[[str], Any]


def check_extras(option: Option, modes: list[str], rules: list[str]) -> None:
    """Raises pytest.UsageError for an option that no chosen mode and rule reads; it is enough if one reads it."""
    for name in PLAIN:
        if _given(option, name) is None or any(_reads(option, name, mode, rule) for mode in modes for rule in rules):
            continue
        other, beside = _WITH.get(name, (None, ""))
        if other is not None and not _differs(option, other):
            raise pytest.UsageError(f"{flag(name)} is read {beside} alone: pass that too")
        chosen = f"got --mode {','.join(modes)} --unmasking {','.join(rules)}"
        raise pytest.UsageError(f"{flag(name)} is read by {_READERS[name]} alone, {chosen}")


_READERS = {
    "block_add_threshold": "modes but vanilla_llada",
    "decoded_token_threshold": "modes but vanilla_llada at rules with a schedule, or with --denoising-steps,",
    "suffix_window": f"modes {' and '.join(DROP_SUFFIX)}",
    "commit_delay": f"mode {' and '.join(MAY_DELAY)}",
    "editing_threshold": "modes but vanilla_llada",
    "max_post_steps": "modes but vanilla_llada",
}
# These are read only together with another option.
_WITH = {
    "decoded_token_threshold": ("block_add_threshold", "below --block-add-threshold 1"),
    "max_post_steps": ("editing_threshold", "with --editing-threshold"),
}


def extra_options(option: Option, mode: str, rule: str) -> dict[str, Any]:
    """The options of SamplingParams that were given and that the mode with the rule reads."""
    read = {name: _given(option, name) for name in PLAIN if _reads(option, name, mode, rule)}
    return {name: value for name, value in read.items() if value is not None}


def flag(field: str) -> str:
    """The suite's option for a field of SamplingParams."""
    return f"--{field.replace('_', '-')}"


def _given(option: Option, field: str) -> Any:
    return option(flag(field))


def _differs(option: Option, field: str) -> bool:
    return _given(option, field) not in (None, PLAIN[field])


def _reads(option: Option, field: str, mode: str, rule: str) -> bool:
    """Standard decoding has one block, and its tokens stay."""
    if field in ("suffix_window", "commit_delay"):
        return mode in (DROP_SUFFIX if field == "suffix_window" else MAY_DELAY)
    if mode == STANDARD or field in ("block_add_threshold", "editing_threshold"):
        return mode != STANDARD
    if field == "max_post_steps":
        return _differs(option, "editing_threshold")
    # with one block at a time, the next one is active when it opens
    return _differs(option, "block_add_threshold") and (
        RULES[rule].has_schedule or option("--denoising-steps") is not None
    )
