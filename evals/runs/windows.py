"""The options of the suite that say which blocks are open, and which of its modes and rules read them."""

from collections.abc import Callable
from typing import Any

import pytest

from blockinfer.decoding.modes import DROP_SUFFIX, MAY_DELAY
from blockinfer.decoding.unmasking import RULES
from evals.runs.configurations import ONE_BLOCK, STANDARD

Option = Callable[[str], Any]


def check_window(option: Option, modes: list[str], rules: list[str]) -> None:
    """Raises pytest.UsageError for an option that no chosen mode and rule reads; some may leave it to the others."""
    for name in ONE_BLOCK:
        if _given(option, name) is None or any(_reads(option, name, mode, rule) for mode in modes for rule in rules):
            continue
        if name == "decoded_token_threshold" and not _opens_early(option):
            raise pytest.UsageError(f"{_name(name)} is read below --block-add-threshold 1 alone: pass that too")
        chosen = f"got --mode {','.join(modes)} --unmasking {','.join(rules)}"
        raise pytest.UsageError(f"{_name(name)} is read by {_READERS[name]} alone, {chosen}")


_READERS = {
    "block_add_threshold": "modes but vanilla_llada",
    "decoded_token_threshold": "modes but vanilla_llada at rules with a schedule, or with --denoising-steps,",
    "suffix_window": f"modes {' and '.join(DROP_SUFFIX)}",
    "commit_delay": f"mode {' and '.join(MAY_DELAY)}",
}


def window_options(option: Option, mode: str, rule: str) -> dict[str, Any]:
    """Of SamplingParams, those that were given and that the mode with the rule reads."""
    read = {name: _given(option, name) for name in ONE_BLOCK if _reads(option, name, mode, rule)}
    return {name: value for name, value in read.items() if value is not None}


def _name(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _given(option: Option, field: str) -> Any:
    return option(_name(field))


def _opens_early(option: Option) -> bool:
    return _given(option, "block_add_threshold") not in (None, ONE_BLOCK["block_add_threshold"])


def _reads(option: Option, field: str, mode: str, rule: str) -> bool:
    """The standard decoding is of one block."""
    if field in ("suffix_window", "commit_delay"):
        return mode in (DROP_SUFFIX if field == "suffix_window" else MAY_DELAY)
    if mode == STANDARD or field == "block_add_threshold":
        return mode != STANDARD
    # one block at a time, the next one is active when it opens
    return _opens_early(option) and (RULES[rule].has_schedule or option("--denoising-steps") is not None)
