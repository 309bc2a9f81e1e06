"""Converts prompts to token ids, and checks them."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from blockinfer.checks import check_bool, shown

Prompt = str | list[int] | dict[str, Any]

_SPAN = re.compile(r"\{fill:([1-9][0-9]{0,5})\}")
# Also one whose number is missing, out of range or not an integer. Words are text: CSS has {fill:none}.
_MARKER = re.compile(r"\{fill:\s*(?:[-+]?\d[\d\s.,_]*)?\}")
_KEYS = ("prompt", "prompt_token_ids", "infill")


class ReadPrompt(NamedTuple):
    """text: None if the prompt had none. token_ids: with the mask token in masked spans. tokens: the same with None
    there; None if there are no masked spans."""

    text: str | None
    token_ids: list[int]
    tokens: list[int | None] | None


class PromptReader:
    """tokenize: from a text to ids, with or without special tokens; None without a tokenizer."""

    def __init__(self, tokenize: Callable[..., list[int]] | None, mask_token_id: int, embedding_size: int) -> None:
        self._tokenize = tokenize
        self._mask_token_id = mask_token_id
        self._embedding_size = embedding_size

    def read(self, prompt: Prompt) -> ReadPrompt:
        """Raises ValueError if the prompt is empty or malformed, or is text and there is no tokenizer."""
        if isinstance(prompt, str):
            return ReadPrompt(prompt, self._checked(self._encode(prompt) if prompt else []), None)
        if not isinstance(prompt, dict):
            prompt = {"prompt_token_ids": prompt}
        if not prompt.keys() & {"prompt_token_ids", "prompt"} or prompt.keys() - set(_KEYS):
            raise ValueError(f'a dict prompt has "prompt" or "prompt_token_ids", got the keys {shown(list(prompt))}')
        text, infill = prompt.get("prompt"), prompt.get("infill", False)
        if not isinstance(text, str | None):
            raise ValueError(f'"prompt" must be a string, got {type(text).__name__}')
        check_bool('"infill"', infill)
        if "prompt_token_ids" in prompt:
            token_ids = self._checked(prompt["prompt_token_ids"])
            return self._infilled(text, token_ids) if infill else ReadPrompt(text, token_ids, None)
        if text is not None:
            _check_spans(text)
        if text is None or not _SPAN.search(text):
            if infill:
                raise ValueError('"infill" needs a masked span, and the text has none: write it as {fill:32}')
            return ReadPrompt(text, self._checked(self._encode(text) if text else []), None)
        return self._with_spans(text)

    def encode(self, text: str | list[int], name: str) -> list[int]:
        """The checked token ids of a continuation, given as text or as ids."""
        if isinstance(text, str):
            if not text:
                raise ValueError(f"the {name} is empty")
            text = self._encode(text, add_special_tokens=False)
        return self._checked(text, name)

    def _infilled(self, text: str | None, token_ids: list[int]) -> ReadPrompt:
        tokens = [None if token == self._mask_token_id else token for token in token_ids]
        if None not in tokens:
            raise ValueError(f'"infill" needs the mask token {self._mask_token_id} among the ids, and there is none')
        return ReadPrompt(text, token_ids, tokens)

    def _with_spans(self, text: str) -> ReadPrompt:
        """Each stretch of text is encoded separately, the first with the special tokens that begin a prompt."""
        tokens: list[int | None] = []
        for i, part in enumerate(_SPAN.split(text)):
            if i % 2 == 0:
                tokens += self._encode(part, add_special_tokens=i == 0)
            else:
                tokens += [None] * int(part)
        return ReadPrompt(text, [self._mask_token_id if token is None else token for token in tokens], tokens)

    def _encode(self, text: str, **options: bool) -> list[int]:
        if self._tokenize is None:
            raise ValueError("there is no tokenizer, so prompts must be token ids; pass tokenizer= to LLM")
        return self._tokenize(text, **options)

    def _checked(self, token_ids: object, name: str = "prompt") -> list[int]:
        if not isinstance(token_ids, list | tuple):
            raise ValueError(f"a {name} must be a string or a list of token ids, got {type(token_ids).__name__}")
        if not token_ids:
            raise ValueError(f"the {name} is empty: it must have at least 1 token, got 0")
        limit = self._embedding_size
        for i, token_id in enumerate(token_ids):
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < limit:
                raise ValueError(f"{name} token {i} must be an integer from 0 to {limit - 1}, got {shown(token_id)}")
        return list(token_ids)


def _check_spans(text: str) -> None:
    """Raises ValueError for a masked span without a proper number of positions."""
    wrong = next((marker for marker in _MARKER.findall(text) if not _SPAN.fullmatch(marker)), None)
    if wrong is not None:
        raise ValueError(
            f"a masked span is written as {{fill:32}}, with 1 to 999999 positions, got {shown(wrong)}; if it is text, "
            "pass the prompt as a plain string"
        )
