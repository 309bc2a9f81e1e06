"""Arguments of LLM's methods: one or many, and mistaken options."""

from collections.abc import Sequence
from typing import Any

from blockinfer.checks import refuse_unknown, shown
from blockinfer.engine.prompts import Prompt
from blockinfer.hints import GENERATE_HINTS, SAMPLING_HINTS, SCORING_HINTS
from blockinfer.sampling_params import SamplingParams
from blockinfer.scoring_params import ScoringParams

Continuation = str | list[int]

OF_SAMPLING = dict.fromkeys(SamplingParams.__dataclass_fields__, "it is an option of SamplingParams")
OF_SAMPLING |= {name: f"in SamplingParams {hint}" for name, hint in SAMPLING_HINTS.items()}

_OF_SCORING = dict.fromkeys(ScoringParams.__dataclass_fields__, "it is an option of ScoringParams")
_OF_SCORING |= {name: f"in ScoringParams {hint}" for name, hint in SCORING_HINTS.items()} | {
    "params": "it is called scoring_params here",
    "sampling_params": "it is called scoring_params here",
}


def scoring_params_of(params: object) -> ScoringParams:
    if not isinstance(params, ScoringParams | None):
        raise ValueError(f"scoring_params must be a ScoringParams, got {type(params).__name__}")
    return params or ScoringParams()


def refuse_generating(owner: str, given: dict[str, Any], first: str) -> None:
    """Raises TypeError for an option that `owner`, whose first argument is `first`, does not have."""
    names = (first, "sampling_params", "use_tqdm", "on_finish")
    refuse_unknown(owner, given, names, OF_SAMPLING | GENERATE_HINTS)


def refuse_scoring(owner: str, given: dict[str, Any], second: str) -> None:
    """The same for `score` and `choose`; `second` is their second argument."""
    refuse_unknown(owner, given, ("prompts", second, "scoring_params", "use_tqdm"), _OF_SCORING)


def params_for_each(params: object, count: int) -> Sequence[SamplingParams | None]:
    """sampling_params for each of `count` prompts; their types are checked when requests are added."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, list | tuple):
        got = type(params).__name__
        raise ValueError(f"sampling_params must be a SamplingParams or one for each prompt, got {got}")
    if len(params) != count:
        raise ValueError(f"there are {count} prompts but {len(params)} params; give one, or one each")
    return params


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several, as a list of prompts."""
    if not isinstance(prompts, str | dict | list | tuple):
        raise ValueError(f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}")
    if isinstance(prompts, str | dict) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def one_each(values: object, count: int, name: str) -> list[Continuation]:
    """A continuation for each of `count` prompts: one string or list of ids, or a list of them."""
    if isinstance(values, str) or (isinstance(values, list | tuple) and values and isinstance(values[0], int)):
        values = [values]
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name} must be a list of strings or of lists of token ids, got {shown(values)}")
    if len(values) != count:
        raise ValueError(f"there are {count} prompts but {len(values)} {name}; give one for each")
    return list(values)


def lists_of_choices(choices: object, count: int) -> list[list[Continuation]]:
    """Candidates for each of `count` prompts: one list of them for all, or a list of lists."""
    if not isinstance(choices, list | tuple) or not all(isinstance(c, str | list | tuple) for c in choices):
        raise ValueError(
            f"choices must be a list of candidates, or one such list for each prompt, got {shown(choices)}"
        )
    if all(isinstance(c, str) or all(isinstance(i, int) for i in c) for c in choices):
        return [list(choices)] * count
    if len(choices) != count:
        raise ValueError(
            f"there are {count} prompts but {len(choices)} lists of choices; give one for each, or for all"
        )
    return [[c] if isinstance(c, str) else list(c) for c in choices]
