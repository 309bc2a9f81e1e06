"""What a configuration is called and compared with. Who reads a run's files needs this, and needs no torch."""

from collections.abc import Mapping
from typing import Any, Protocol

# LLaDA's standard decoding, as a mode of the suite: one block of max_tokens.
STANDARD = "vanilla_llada"
# `vanilla` through the checkpoint's own modelling code, measured where --reference-impl asks for it.
REFERENCE_IMPL = "reference_impl"
# Unmasking rules without a value, whose forwards are known beforehand.
SCHEDULED = ("low_confidence", "random", "sequential")
# What a configuration may have beside its mode, block length and rule, which is several blocks open, what is seen and
# computed beside them, and editing: its default, and what it is called in a test's id.
EXTRAS = {
    "block_add_threshold": (1.0, "add"),
    "decoded_token_threshold": (1.0, "active"),
    "suffix_window": (0, "suffix"),
    "commit_delay": (0, "delay"),
    "editing_threshold": (None, "edit"),
    "max_post_steps": (None, "post"),
}
# A file that does not say so has none of it, or is of a time when there was nothing else.
PLAIN = {name: default for name, (default, _) in EXTRAS.items()}
# The same of how many shared the rows, and the model.
ALONE = {"shards": 1, "tensor_parallel_size": 1}
# Of rules whose option a test's id has where it is another: its default. That of `threshold` it never has.
RULE_DEFAULTS = {"factor": 1.0, "entropy": 0.15, "entropy_threshold": 0.5}
# Ends the test's name in pytest-benchmark's records, where what was timed is only a part: no history has that name.
RESUMED = " (resumed)"
# In the extra_info of the benchmarks of evals/test_kernels.py, and of no configuration's: the kernel that was timed.
KERNEL = "kernel"
# The same of evals/test_steps.py: the case whose steps were timed.
STEP = "step"
# The same of evals/test_likelihood.py: the source whose rows were answered by likelihood.
LIKELIHOOD = "likelihood"
# The same of evals/test_serving.py: the load that a server was under.
SERVING = "serving"


class Schedule(Protocol):
    """SamplingParams, or what a file says of them."""

    max_tokens: int | None
    block_length: int | None
    denoising_steps: int | None


class Decoding(Protocol):
    """SamplingParams, or what a file says of them: None where it does not."""

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
    """What differs from one block at a time without editing, as "add 0.5"; nothing where nothing does."""
    values = ((getattr(params, name), default, word) for name, (default, word) in EXTRAS.items())
    return [f"{word} {value:g}" for value, default, word in values if value not in (None, default)]


def _other(params: Decoding) -> list[str]:
    """What differs from the defaults, and is told where the rule is."""
    default = RULE_DEFAULTS.get(params.unmasking)
    value = [f"{params.rule_value:g}"] if default is not None and params.rule_value not in (None, default) else []
    return value + [part.replace(" ", "") for part in extras(params)]


def variant(params: Decoding) -> str:
    """What a test's id has behind the rule: nothing for the defaults, else such as "0.1-add0.5-suffix8"."""
    return "-".join(_other(params))


def rule_name(params: Decoding) -> str:
    """The rule and the same, for who reads a table."""
    return " ".join([params.unmasking, *_other(params)])


def total_steps(params: Schedule) -> int | None:
    """The step limit of all blocks together; None is no limit, or not known."""
    if None in (params.max_tokens, params.block_length, params.denoising_steps):
        return None
    full, rest = divmod(params.max_tokens, params.block_length)
    # of a block's positions at least one is revealed in each step
    steps = min(params.denoising_steps, params.block_length)
    return full * steps + -(-steps * rest // params.block_length)


def is_configuration(info: Mapping[str, Any]) -> bool:
    """Whether a benchmark's extra_info is of no kernel, no step, no likelihood and no server."""
    return not {KERNEL, STEP, LIKELIHOOD, SERVING} & info.keys()


def has_figures(info: Mapping[str, Any]) -> bool:
    """Whether a benchmark's extra_info is more than what was known before its run."""
    figures = {KERNEL: "fraction", STEP: "ms_per_step", LIKELIHOOD: "right", SERVING: "tokens_per_second"}
    figure = next((figure for marker, figure in figures.items() if marker in info), None)
    return figure in info if figure else bool(info)


def is_baseline(vanilla: Named, case: Named) -> bool:
    """Whether `vanilla` is semi-autoregressive decoding at the block length and rule of `case`."""
    return (vanilla.mode, vanilla.block_length, vanilla.unmasking) == ("vanilla", case.block_length, case.unmasking)
