"""Names of configurations, and their baselines. Code that reads a run's files needs this module, and needs no torch."""

from collections.abc import Mapping
from typing import Any, Protocol

# LLaDA's standard decoding, as a mode of the suite: one block of max_tokens.
STANDARD = "vanilla_llada"
# `vanilla` through the checkpoint's own modelling code, measured if --reference-impl asks for it.
REFERENCE_IMPL = "reference_impl"
# Unmasking rules without a value, whose number of forwards is known beforehand.
SCHEDULED = ("low_confidence", "random", "sequential")
# Options besides mode, block length and rule (several open blocks, what is seen and computed beside them, and editing):
# each one's default, and its name in a test's id.
EXTRAS = {
    "block_add_threshold": (1.0, "add"),
    "decoded_token_threshold": (1.0, "active"),
    "suffix_window": (0, "suffix"),
    "commit_delay": (0, "delay"),
    "editing_threshold": (None, "edit"),
    "max_post_steps": (None, "post"),
}
# A file without these fields has none of it, or is from before they existed.
PLAIN = {name: default for name, (default, _) in EXTRAS.items()}
# The same for the number of shards of the rows, and of ranks that share the model.
ALONE = {"shards": 1, "tensor_parallel_size": 1}
# The defaults of rules whose option a test's id has if it differs. It never has that of `threshold`.
RULE_DEFAULTS = {"factor": 1.0, "entropy": 0.15, "entropy_threshold": 0.5}
# Ends the test's name in pytest-benchmark's records if only a part was timed: no history has that name.
RESUMED = " (resumed)"
# In the extra_info of the benchmarks of evals/test_kernels.py, and of no configuration's: the kernel that was timed.
KERNEL = "kernel"
# The same for evals/test_steps.py: the case whose steps were timed.
STEP = "step"
# The same for evals/test_likelihood.py: the source whose rows were answered by likelihood.
LIKELIHOOD = "likelihood"
# The same for evals/test_serving.py: the server's load.
SERVING = "serving"


class Schedule(Protocol):
    """SamplingParams, or the same fields of a file."""

    max_tokens: int | None
    block_length: int | None
    denoising_steps: int | None


class Decoding(Protocol):
    """SamplingParams, or the same fields of a file: None if it lacks them."""

    unmasking: str | None
    rule_value: float | None
    block_add_threshold: float | None
    decoded_token_threshold: float | None
    suffix_window: int | None
    commit_delay: int | None
    editing_threshold: float | None
    max_post_steps: int | None


class Named(Protocol):
    """What a test's id says of a configuration."""

    mode: str
    block_length: int
    unmasking: str


def extras(params: Decoding) -> list[str]:
    """What differs from one block at a time without editing, such as "add 0.5"; empty if nothing does."""
    values = ((getattr(params, name), default, word) for name, (default, word) in EXTRAS.items())
    return [f"{word} {value:g}" for value, default, word in values if value not in (None, default)]


def _other(params: Decoding) -> list[str]:
    """What differs from the defaults, and is shown with the rule."""
    default = RULE_DEFAULTS.get(params.unmasking)
    value = [f"{params.rule_value:g}"] if default is not None and params.rule_value not in (None, default) else []
    return value + [part.replace(" ", "") for part in extras(params)]


def variant(params: Decoding) -> str:
    """The part of a test's id after the rule: empty for the defaults, else such as "0.1-add0.5-suffix8"."""
    return "-".join(_other(params))


def rule_name(params: Decoding) -> str:
    """The rule with the same options, for a table."""
    return " ".join([params.unmasking, *_other(params)])


def total_steps(params: Schedule) -> int | None:
    """The step limit of all blocks together; None means no limit, or not known."""
    if None in (params.max_tokens, params.block_length, params.denoising_steps):
        return None
    full, rest = divmod(params.max_tokens, params.block_length)
    # each step reveals at least one position of a block
    steps = min(params.denoising_steps, params.block_length)
    return full * steps + -(-steps * rest // params.block_length)


def is_configuration(info: Mapping[str, Any]) -> bool:
    """Whether a benchmark's extra_info is that of a configuration, not of a kernel, step, likelihood or server."""
    return not {KERNEL, STEP, LIKELIHOOD, SERVING} & info.keys()


def has_figures(info: Mapping[str, Any]) -> bool:
    """Whether a benchmark's extra_info holds more than what was known before its run."""
    figures = {KERNEL: "fraction", STEP: "ms_per_step", LIKELIHOOD: "right", SERVING: "tokens_per_second"}
    figure = next((figure for marker, figure in figures.items() if marker in info), None)
    return figure in info if figure else bool(info)


def is_baseline(vanilla: Named, case: Named) -> bool:
    """Whether `vanilla` is semi-autoregressive decoding at the block length and rule of `case`."""
    return (vanilla.mode, vanilla.block_length, vanilla.unmasking) == ("vanilla", case.block_length, case.unmasking)
