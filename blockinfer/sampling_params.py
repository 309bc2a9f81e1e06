"""What one request asks of the decoder."""

from collections.abc import Sequence
from dataclasses import dataclass

from blockinfer.checks import (
    check_bool,
    check_choice,
    check_int,
    check_real,
    check_seed,
    check_text,
    refuse_unknown,
    shown,
)
from blockinfer.config import EngineConfig
from blockinfer.decoding.modes import DROP_SUFFIX, MAY_DELAY, MODES
from blockinfer.decoding.unmasking import RULES
from blockinfer.hints import SAMPLING_HINTS
from blockinfer.kernels.slots import Rank

_MOST_ANSWERS, _MOST_LOGPROBS = 1024, 1000


def answer_seed(seed: int, index: int) -> int:
    """The seed of answer `index` of a request with this seed: the seed itself for the first answer, else SplitMix64's
    output at that index (Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014)."""
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def _only(readers: Sequence[str]) -> str:
    return f"only {' and '.join(readers)} {'do' if len(readers) > 1 else 'does'}"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Options of one request. All lengths are in tokens.

    max_tokens: number of generated positions; need not be a multiple of block_length. For a prompt with masked spans,
        the most positions that these may have together.
    block_length: positions denoised together.
    denoising_steps: steps per block. None means one token per step for the rules with a schedule (`low_confidence`,
        `random`, `sequential`; for `scheduled_threshold`, at least one), and no limit for the others. A number limits
        every rule: the last step reveals what is left. More steps than positions means one token per step.
    mode: vanilla, prefix_cache, dual_cache, block or block_refresh; described in `decoding.modes` and the README.
    unmasking: the rule: low_confidence, random, sequential, threshold, factor, entropy, entropy_threshold or
        scheduled_threshold. Every mode takes every rule.
    threshold, factor, entropy_bound, entropy_threshold: the option of the rule of that name (entropy_bound is
        entropy's). None is its default: 0.9, 1.0, 0.15 nats, 0.5 nats. scheduled_threshold also reads threshold, by
        default 0.95. An option that the chosen rule does not read is refused. With threshold 1.0 and one open block a
        step reveals one token, and any other for which the probabilities of all other tokens sum to 0 in float32.
    block_add_threshold: the next block opens once this share of the last one is revealed, at most one block per step
        and at most 128 at once (d3LLM's repository, `generate_multi_block`). 1.0 is one block at a time. Rules without
        a schedule choose among the masked positions of all open blocks as if these were one block, and reveal at least
        one in the first block that has any. Below 1.0 a stop token ends the answer once nothing before it is masked.
        Until then open positions after it are revealed as usual, where d3LLM's early_stop puts stop tokens.
    decoded_token_threshold: an open block is active once this share of the block before it is revealed. Until then a
        schedule reveals nothing in it, and its steps do not count for denoising_steps; thresholds apply to it all the
        same.
    suffix_window: masks after the last open block that `block` and `block_refresh` keep, up to the end of the canvas.
    commit_delay: further steps in which `block` computes a finished block, beside the open ones, before it is
        committed.
    editing_threshold: None, or a confidence: a revealed token of the open block is replaced when the step predicts
        another one there with more confidence (LLaDA2.1, which uses 0.9; 0.0 replaces every token that differs). A
        block then ends when a step that found no mask changes nothing, or after max_post_steps such steps (None is 16).
    temperature: 0 takes the likeliest token. Above 0, Gumbel noise times the temperature is added to the logits, which
        samples from their softmax at that temperature. At most 1e6.
    seed: of the noise, 0 <= seed < 2**64. None draws one, which the output's metrics report. Besides the seed, noise
        depends only on the position in the output, the step and the token. So requests with the same seed share their
        noise, and the same prompt with the same params gives the same sample. For other samples give other seeds, or
        none.
    cfg_scale: classifier-free guidance (arXiv 2207.12598, as in LLaDA). Above 0 each forward also computes the rows of
        a shadow, which has mask tokens in place of the prompt and of everything else that is given. The logits are
        u + (cfg_scale + 1) (c - u), with c from the request and u from its shadow. The request takes two of
        max_num_seqs, and a forward counts twice in nfe. At most 1e6.
    n: number of answers to the prompt. Answer i has the noise of seed `answer_seed(seed, i)`, which is `seed` itself
        for the first. In mode `block` they share the pages that the prompt fills, which are computed once. Above 1 it
        needs a temperature or the rule `random`; otherwise all answers would be the same.
    stop_token_ids: tokens that end an answer, in addition to the checkpoint's own, and also under ignore_eos. Its own
        are the EOS tokens of config.json, or else of the tokenizer, those of generation_config.json, and the
        tokenizer's ends of turn.
    stop: one or more strings that end an answer. The text ends before the string that is completed first, token by
        token; the token ids end with the token that completes it. Strings are looked for at the end of each block, in
        the text without special tokens. If one token completes several, the first in this list counts.
    include_stop_str_in_output: the text includes the stop string.
    ignore_eos: the checkpoint's own stop tokens do not end an answer.
    logprobs: None, or for each token its log-probability and those of this many likeliest tokens, at the step that
        revealed it, without temperature and noise. 0 gives the token's own alone; at most 1,000.
    logits_eos_inf, confidence_eos_eot_inf: the flags of LLaDA's EVAL.md. The first forbids the EOS token. The second
        reveals positions that predict EOS or end-of-turn after all others, and excludes both tokens from the softmax
        that gives the confidence of the others. LLaDA's generate.py does so at temperature 0; here it applies at every
        temperature and with every rule. There, above 0, only EOS is excluded, and `random` ignores the flag.

    Raises ValueError for a value out of range and TypeError for an unknown option, naming it.
    """

    max_tokens: int = 128
    block_length: int = 32
    denoising_steps: int | None = None
    mode: str = "block"
    unmasking: str = "low_confidence"
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    entropy_threshold: float | None = None
    block_add_threshold: float = 1.0
    decoded_token_threshold: float = 1.0
    suffix_window: int = 0
    commit_delay: int = 0
    editing_threshold: float | None = None
    max_post_steps: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    cfg_scale: float = 0.0
    n: int = 1
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    ignore_eos: bool = False
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    def __new__(cls, *args, **options):
        hints = dict.fromkeys(EngineConfig.__dataclass_fields__, "it is an option of LLM") | SAMPLING_HINTS
        refuse_unknown("SamplingParams", options, cls.__dataclass_fields__, hints)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_int("max_tokens", self.max_tokens, 1)
        check_int("block_length", self.block_length, 1)
        if self.denoising_steps is not None:
            check_int("denoising_steps", self.denoising_steps, 1)
        check_choice("mode", self.mode, MODES)
        check_choice("unmasking", self.unmasking, RULES)
        self._check_rule_options()
        self._check_window()
        self._check_editing()
        check_real("temperature", self.temperature, 0.0, 1e6)
        check_real("cfg_scale", self.cfg_scale, 0.0, 1e6)
        check_seed(self.seed)
        if not isinstance(self.stop_token_ids, list | tuple | None):
            raise ValueError(f"stop_token_ids must be a list of token ids, got {shown(self.stop_token_ids)}")
        for token_id in self.stop_token_ids or ():
            check_int("every one of stop_token_ids", token_id, 0)
        if self.stop_token_ids is not None:
            # a copy that nobody can change, so that the checks hold and the params can be a key
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check_stop_strings()
        for name in ("ignore_eos", "logits_eos_inf", "confidence_eos_eot_inf"):
            check_bool(name, getattr(self, name))
        self._check_n()
        if self.logprobs is not None:
            check_int("logprobs", self.logprobs, 0, _MOST_LOGPROBS)

    def _check_window(self) -> None:
        check_real("block_add_threshold", self.block_add_threshold, 0.0, 1.0)
        check_real("decoded_token_threshold", self.decoded_token_threshold, 0.0, 1.0)
        for name, modes in (("suffix_window", DROP_SUFFIX), ("commit_delay", MAY_DELAY)):
            value = getattr(self, name)
            check_int(name, value, 0)
            if value and self.mode not in modes:
                raise ValueError(f"mode {self.mode!r} does not read {name} ({_only(modes)}), got {name}={value}")

    def _check_editing(self) -> None:
        if self.max_post_steps is not None:
            check_int("max_post_steps", self.max_post_steps, 0)
        if self.editing_threshold is None:
            if self.max_post_steps is not None:
                raise ValueError(f"max_post_steps={self.max_post_steps} is of editing, and editing_threshold is None")
            return
        check_real("editing_threshold", self.editing_threshold, 0.0, 1.0)
        if self.block_add_threshold < 1:
            raise ValueError(
                f"tokens are edited in one block at a time, got block_add_threshold={self.block_add_threshold} with "
                f"editing_threshold={self.editing_threshold}; leave it 1.0"
            )
        if self.logprobs is not None:
            raise ValueError(
                f"logprobs are of the step that reveals a token, which editing_threshold={self.editing_threshold} lets "
                "others replace; leave one of them None"
            )

    @property
    def post_steps(self) -> int:
        """max_post_steps with its default filled in."""
        return 16 if self.max_post_steps is None else self.max_post_steps

    def _check_stop_strings(self) -> None:
        check_bool("include_stop_str_in_output", self.include_stop_str_in_output)
        if self.stop is None:
            if self.include_stop_str_in_output:
                raise ValueError("include_stop_str_in_output needs stop strings, and stop is None")
            return
        if not isinstance(self.stop, str | list | tuple):
            raise ValueError(f"stop must be a string or a list of strings, got {shown(self.stop)}")
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for string in stops:
            if not isinstance(string, str) or not string:
                raise ValueError(f"every one of stop must be a string of at least 1 character, got {shown(string)}")
            check_text("every one of stop", string)
        object.__setattr__(self, "stop", stops)

    def _check_n(self) -> None:
        check_int("n", self.n, 1, _MOST_ANSWERS)
        if self.n > 1 and self.temperature == 0 and RULES[self.unmasking].rank != Rank.RANDOM:
            raise ValueError(f"n={self.n} answers at temperature 0 would all be the same; raise it, or ask for one")

    def _check_rule_options(self) -> None:
        rule = RULES[self.unmasking]
        infinity = float("inf")
        options = {"threshold": 1.0, "factor": infinity, "entropy_bound": infinity, "entropy_threshold": infinity}
        for name, maximum in options.items():
            value = getattr(self, name)
            if value is None:
                continue
            check_real(name, value, 0.0, maximum)
            if rule.option != name:
                read_by = _only([other for other, spec in RULES.items() if spec.option == name])
                raise ValueError(
                    f"unmasking {self.unmasking!r} does not read {name} ({read_by}), got {name}={shown(value)}"
                )
        if self.confidence_eos_eot_inf and rule.rank == Rank.POSITION:
            raise ValueError(f"unmasking {self.unmasking!r} does not read confidence_eos_eot_inf; leave it False")

    @property
    def rule_value(self) -> float:
        """The value of the option that the unmasking rule reads, or its default; 0.0 for a rule without an option."""
        rule = RULES[self.unmasking]
        value = getattr(self, rule.option) if rule.option else None
        return rule.default if value is None else float(value)

    def block_steps(self, length: int) -> int | None:
        """The step limit for a block of `length` positions; None is no limit."""
        if self.denoising_steps is None:
            return length if RULES[self.unmasking].has_schedule else None
        return min(length, -(-self.denoising_steps * length // self.block_length))
