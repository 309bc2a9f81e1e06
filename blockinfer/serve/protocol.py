"""The bodies of OpenAI's completions and chat completions, checked and turned into prompts and SamplingParams.

What the engine cannot do is refused, never ignored; a neutral value (`"tools": []`) is accepted.
"""

import json
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from blockinfer.checks import nearest, shown
from blockinfer.hints import NO_PENALTY, ONLY_EOS_FORBIDDEN, SAMPLING_HINTS
from blockinfer.sampling_params import SamplingParams
from blockinfer.serve.errors import ApiError

_NO_TOOLS = "tools cannot be called here"
_NO_GRAMMAR = "answers cannot be bound to a grammar here"
_NO_FILTER = "temperature alone shapes the sampling here"
_TEXT_ONLY = "messages and answers are text alone here"
_NOT_KEPT = "nothing is kept here"


class Refused(NamedTuple):
    """Why a field of OpenAI's API, or of other servers' versions of it, is refused, and its neutral values."""

    reason: str
    neutral: tuple[Any, ...] = ()


REFUSED = {
    **dict.fromkeys(("tools", "functions"), Refused(_NO_TOOLS, ([],))),
    "tool_choice": Refused(_NO_TOOLS, ("none", "auto")),
    "function_call": Refused(_NO_TOOLS, ("none", "auto")),
    # without tools neither asks for anything; OpenAI's default is true
    "parallel_tool_calls": Refused(_NO_TOOLS, (True, False)),
    "web_search_options": Refused(_NO_TOOLS),
    "logit_bias": Refused(NO_PENALTY, ({},)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), Refused(NO_PENALTY, (0,))),
    **dict.fromkeys(("repetition_penalty", "length_penalty"), Refused(NO_PENALTY, (1,))),
    "top_p": Refused(_NO_FILTER, (1,)),
    "top_k": Refused(_NO_FILTER, (0, -1)),
    "min_p": Refused(_NO_FILTER, (0,)),
    "min_tokens": Refused(ONLY_EOS_FORBIDDEN, (0,)),
    "bad_words": Refused(ONLY_EOS_FORBIDDEN, ([],)),
    "response_format": Refused(_NO_GRAMMAR, ({"type": "text"},)),
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "grammar"),
        Refused(_NO_GRAMMAR),
    ),
    "modalities": Refused(_TEXT_ONLY, (["text"],)),
    "audio": Refused(_TEXT_ONLY),
    **dict.fromkeys(("reasoning_effort", "verbosity"), Refused("there is no such choice here")),
    "prediction": Refused("a predicted answer cannot be used here"),
    "store": Refused(_NOT_KEPT, (False,)),
    "metadata": Refused(_NOT_KEPT, ({},)),
    "prompt_cache_key": Refused(_NOT_KEPT),
    "service_tier": Refused("all requests are served alike here", ("auto", "default")),
    "echo": Refused("answers come without their prompts here", (False,)),
    "suffix": Refused("text is not filled in before other text here", ("",)),
    "best_of": Refused("every answer that is made is given: use n", (1,)),
    "top_logprobs": Refused("of a completion logprobs is their number"),
}
_HINTS = SAMPLING_HINTS | {"extra_body": "what it holds are fields of the body itself, where the client puts them"}
# Options with OpenAI's limits are fields of the models below; the engine's other options are extra fields.
_OPENAI = ("max_tokens", "temperature", "seed", "logprobs")
DECODING = tuple(name for name in SamplingParams.__dataclass_fields__ if name not in _OPENAI)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class _Request(BaseModel):
    """The fields that both bodies have. user: a name that OpenAI's clients may give; it has no effect there either."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())
    limit_names: ClassVar[tuple[str, ...]] = ("max_tokens",)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_mode: Literal["blocks", "denoise"] | None = None
    max_tokens: int | None = None
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    seed: int | None = None
    user: str | None = None

    def number_of_logprobs(self) -> int | None:
        """SamplingParams.logprobs."""
        raise NotImplementedError

    def sampling_params(self) -> SamplingParams:
        """Raises ApiError for an option that is out of range, that the engine does not have, or that disagrees with
        another."""
        options = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        for name, value in options.items():
            _check_extra(name, value, type(self).model_fields)
        options = {name: value for name, value in options.items() if name in DECODING}
        options |= {name: getattr(self, name) for name in ("temperature", "seed") if getattr(self, name) is not None}
        options["logprobs"] = self.number_of_logprobs()
        limits = {getattr(self, name) for name in self.limit_names} - {None}
        if len(limits) > 1:
            raise ApiError(400, f"{' and '.join(self.limit_names)} are one limit: give one of them", param="max_tokens")
        if limits:
            options["max_tokens"] = limits.pop()
        if not self.stream:
            for name in ("stream_options", "stream_mode"):
                if getattr(self, name) is not None:
                    raise ApiError(400, f"{name} is for a stream: leave it out, or set stream to true", param=name)
        try:
            return SamplingParams(**options)
        except (ValueError, TypeError) as error:
            field = str(error).partition(" ")[0]
            raise ApiError(400, str(error), param=field if field in options else None) from error


class ChatRequest(_Request):
    limit_names = ("max_tokens", "max_completion_tokens")

    messages: list[dict[str, str]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    def number_of_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise ApiError(400, "top_logprobs is for logprobs: set logprobs to true", param="top_logprobs")
        return None

    @field_validator("messages", mode="before")
    @classmethod
    def _check_messages(cls, messages: object) -> list[dict[str, str]]:
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"it must be a list of at least one message, got {shown(messages)}")
        return [_message(i, message) for i, message in enumerate(messages)]


class CompletionRequest(_Request):
    prompt: list[str | list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)

    def number_of_logprobs(self) -> int | None:
        return self.logprobs

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, prompt: object) -> list[str | list[int]]:
        """One prompt or several, each a text or token ids, as a list of prompts."""
        if isinstance(prompt, str) or _is_ids(prompt):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt or not all(isinstance(p, str) or _is_ids(p) for p in prompt):
            raise ValueError(f"it must be a string, a list of token ids, or a list of such, got {shown(prompt)}")
        return prompt


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def _message(number: int, message: object) -> dict[str, str]:
    """{"role", "content"} of one message, whose content may be a list of texts. lm-eval adds "type": "text"."""
    if not isinstance(message, dict):
        raise ValueError(f"message {number} must be an object with role and content, got {shown(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"the role of message {number} must be system, user or assistant, got {shown(role)}")
    for name, value in message.items():
        # other servers' messages have "tool_calls": []
        if name not in ("role", "content") and value not in (None, []) and (name, value) != ("type", "text"):
            raise ValueError(f"message {number} has {shown(name)}, and messages are a role and a content of text here")
    if isinstance(content, list) and content:
        content = "".join(_part(number, part) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the content of message {number} must be a string or a list of texts, got {shown(content)}")
    return {"role": role, "content": content}


def _part(number: int, part: object) -> str:
    if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
        wanted = '{"type": "text", "text": ...}'
        raise ValueError(f"every part of the content of message {number} must be {wanted}, got {shown(part)}")
    if not isinstance(part["text"], str):
        raise ValueError(f"the text of a part of message {number} must be a string, got {shown(part['text'])}")
    return part["text"]


def _check_extra(name: str, value: object, fields: dict[str, Any]) -> None:
    """Checks a field that the models here do not name: an option of the engine, else refused."""
    if name in DECODING:
        return
    if name in REFUSED:
        reason, neutral = REFUSED[name]
        if not any(type(value) in (type(n), float) and value == n for n in neutral):
            raise ApiError(400, f"{name} is not supported: {reason}; got {shown(value)}", param=name)
        return
    hint = f"; {_HINTS[name]}" if name in _HINTS else nearest(name, [*fields, *DECODING]) or "; leave it out"
    shown_name = name if name.isidentifier() else shown(name)
    raise ApiError(400, f"there is no field {shown_name[:100]}{hint}", param=name if name.isidentifier() else None)


_Model = TypeVar("_Model", bound=_Request)


def parse(kind: type[_Model], body: bytes) -> _Model:
    """Raises ApiError, naming the field, for a body that is not a JSON object of that kind."""
    try:
        raw = json.loads(body, parse_constant=_no_number, object_pairs_hook=_no_double)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(raw, dict):
        raise ApiError(400, f"the body must be a JSON object, got {shown(raw)}")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "a field's name"
        if first["type"] == "missing":
            raise ApiError(400, f"{field} is missing", param=field) from error
        got = "" if first["type"] == "value_error" else f", got {shown(first['input'])}"
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{field}: {message[:1].lower()}{message[1:]}{got}", param=field) from error


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _no_double(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise ValueError(f"{shown(name)} stands twice in one object")
        names[name] = value
    return names
