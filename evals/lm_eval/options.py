"""What `--model_args` and a task's generation_kwargs mean for the engine. Does not import lm-eval."""

from dataclasses import dataclass
from typing import Any

from blockinfer import SamplingParams, ScoringParams
from blockinfer.checks import refuse_unknown
from blockinfer.config import EngineConfig
from blockinfer.decoding.unmasking import RULES
from blockinfer.hints import LLM_HINTS, SAMPLING_HINTS

# How many answers run at once if --batch_size is "auto" or not given.
_AUTO_BATCH = 32
# Options that lm-eval names differently, or adds by itself.
_RENAMED = {"pretrained": "model", "max_length": "max_model_len", "max_tokens": "max_gen_toks"}
_OF_SCORING = {"mc_num": "mc_num", "scoring_mode": "mode", "is_greedy": "is_greedy", "cfg_scale": "cfg_scale"}
_OF_SAMPLING = set(SamplingParams.__dataclass_fields__) - {
    "seed",
    "n",
    "stop",
    "include_stop_str_in_output",
    "logprobs",
}
# They shape sampling, which temperature 0 does not do.
_FILTERS = ("top_p", "top_k", "min_p", "typical_p")


class BadArguments(ValueError):
    """Arguments that the user must correct; its text says how."""


@dataclass(frozen=True)
class ModelArguments:
    """llm: keywords of LLM. sampling: SamplingParams of every answer, unless a task sets others. scoring: of
    likelihoods. max_gen_toks: new tokens if a task gives no number."""

    llm: dict[str, Any]
    sampling: dict[str, Any]
    scoring: ScoringParams
    max_gen_toks: int


def read_model_arguments(given: dict[str, Any], batch_size: int | str | None, device: str | None) -> ModelArguments:
    """Raises BadArguments for what is unknown or out of range."""
    given = {name: value for name, value in given.items() if name not in _RENAMED or value not in (None, "")}
    for name, other in _RENAMED.items():
        if name in given and other in given:
            raise BadArguments(f"--model_args has {name} and {other}, which are one option: leave one of them out")
    given = {_RENAMED.get(name, name): value for name, value in given.items()}
    if not given.get("model"):
        raise BadArguments("--model_args needs pretrained=FOLDER, or a name on the Hub")
    seed = given.pop("seed", 0)
    max_gen_toks = given.pop("max_gen_toks", 256)
    engine = {name: given.pop(name) for name in list(given) if name in EngineConfig.__dataclass_fields__}
    scoring = {field: given[name] for name, field in _OF_SCORING.items() if name in given}
    for name in ("mc_num", "scoring_mode", "is_greedy"):
        given.pop(name, None)
    known = [*EngineConfig.__dataclass_fields__, *_OF_SAMPLING, *_OF_SCORING, "max_gen_toks"]
    try:
        refuse_unknown("the model", [n for n in given if n not in _OF_SAMPLING], known, LLM_HINTS | SAMPLING_HINTS)
        # naming a rule's option selects the rule
        for rule, spec in RULES.items():
            if spec.option in given:
                given.setdefault("unmasking", rule)
        SamplingParams(**given, max_tokens=max_gen_toks)
        params = ScoringParams(**scoring, seed=seed)
    except (TypeError, ValueError) as error:
        raise BadArguments(f"--model_args: {error}") from error
    at_once = _at_once(batch_size)
    # a guided request takes two
    engine.setdefault("max_num_seqs", at_once * (2 if params.cfg_scale else 1))
    if device is not None:
        engine["device"] = str(device).partition(":")[0]
    return ModelArguments(engine | {"seed": seed}, given, params, max_gen_toks)


def _at_once(batch_size: int | str | None) -> int:
    if batch_size is None or str(batch_size).startswith("auto"):
        return _AUTO_BATCH
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise BadArguments(f"--batch_size must be a number of answers at once, or auto, got {batch_size!r}")
    return int(batch_size)


def answer_params(arguments: ModelArguments, kwargs: dict[str, Any], special_tokens: dict[str, int]) -> SamplingParams:
    """kwargs: a task's, from lm-eval's normalize_gen_kwargs. A special token among the stop strings is matched by its
    id, since text does not contain it. Raises BadArguments for what cannot be honoured."""
    kwargs = dict(kwargs)
    stops = [stop for stop in kwargs.pop("until") if stop]
    options = arguments.sampling | {
        "max_tokens": kwargs.pop("max_gen_toks"),
        "temperature": kwargs.pop("temperature", 0.0),
    }
    kwargs.pop("do_sample", None)
    if options["temperature"] == 0:
        kwargs = {name: value for name, value in kwargs.items() if name not in _FILTERS}
    stop_ids = [special_tokens[stop] for stop in stops if stop in special_tokens]
    if stop_ids:
        options["stop_token_ids"] = [*(options.get("stop_token_ids") or ()), *stop_ids]
    try:
        refuse_unknown("generation_kwargs", [n for n in kwargs if n not in _OF_SAMPLING], _OF_SAMPLING, SAMPLING_HINTS)
        text = [stop for stop in stops if stop not in special_tokens]
        return SamplingParams(**options | kwargs, stop=text or None)
    except (TypeError, ValueError) as error:
        raise BadArguments(f"a task's generation_kwargs: {error}") from error
