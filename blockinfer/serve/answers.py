"""Answers in OpenAI's format: whole ones, and the chunks of a stream."""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from blockinfer.outputs import CompletionOutput, Logprob, RequestOutput
from blockinfer.sampling_params import answer_seed

DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens, without stop tokens, and forwards, summed over all choices."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    forwards = sum(output.metrics.nfe for output in outputs)
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return counts | {"forwards": forwards}


@dataclass
class _Sent:
    """What a choice's stream has sent: characters, tokens, and whether its end."""

    text: int = 0
    tokens: int = 0
    ended: bool = False


@dataclass
class Answer:
    """One answer: the choices of its prompts, one after another. token_text: from a canvas's token to its text. Keeps
    track of what a stream has sent."""

    chat: bool
    model: str
    token_text: Callable[[int], str]
    with_usage: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    _sent: dict[int, _Sent] = field(default_factory=dict)
    _finished: dict[int, RequestOutput] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = [self._choice(i, output, one) for i, output in enumerate(outputs) for one in output.outputs]
        return self._head("chat.completion") | {"choices": choices, "usage": usage(outputs)}

    def begin(self, count: int) -> Iterator[dict[str, Any]]:
        """A chat's first chunks, which give the role."""
        for i in range(count if self.chat else 0):
            yield self._chunk(i, {"role": "assistant", "content": ""})

    def chunks(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """The chunks that an output of prompt `number` adds to the stream: new text, canvases, ends."""
        for one in output.outputs:
            yield from self._chunks(_index(number, output, one), output, one)
        if output.finished:
            self._finished[number] = output

    def end(self) -> Iterator[dict[str, Any]]:
        if self.with_usage:
            outputs = [self._finished[i] for i in sorted(self._finished)]
            yield self._head("chat.completion.chunk") | {"choices": [], "usage": usage(outputs)}

    def _chunks(self, index: int, output: RequestOutput, one: CompletionOutput) -> Iterator[dict[str, Any]]:
        sent = self._sent.setdefault(index, _Sent())
        if sent.ended:
            return
        text, logprobs = one.text[sent.text :], self._logprobs(one, sent.tokens)
        if text or (logprobs and len(one.token_ids) > sent.tokens):
            yield self._chunk(index, {"content": text}, logprobs=logprobs)
        sent.text, sent.tokens = len(one.text), len(one.token_ids)
        if one.canvas is not None:
            yield self._chunk(index, {}, denoise=self._canvas(output, one))
        if one.finish_reason is not None:
            sent.ended = True
            seed = answer_seed(output.metrics.seed, one.index)
            yield self._chunk(index, {}, finish_reason=one.finish_reason, seed=seed)

    def _head(self, kind: str) -> dict[str, Any]:
        kind = kind if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, number: int, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": one.text}} if self.chat else {"text": one.text}
        end = {"logprobs": self._logprobs(one, 0), "finish_reason": one.finish_reason}
        seed = answer_seed(output.metrics.seed, one.index)
        return {"index": _index(number, output, one)} | said | end | {"seed": seed}

    def _chunk(self, index: int, delta: dict[str, str], **more: Any) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice = {"index": index} | said | {"logprobs": None, "finish_reason": None} | more
        usage_so_far = {"usage": None} if self.with_usage else {}
        return self._head("chat.completion.chunk") | {"choices": [choice]} | usage_so_far

    def _canvas(self, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        """The open blocks after a step, None where a position is masked; and tokens and forwards so far."""
        canvas = [None if token is None else self.token_text(token) for token in one.canvas]
        done = {"tokens": len(one.token_ids), "forwards": output.metrics.nfe}
        return {"provisional": True, "canvas": canvas} | done

    def _logprobs(self, one: CompletionOutput, start: int) -> dict[str, Any] | None:
        """Those of the tokens from `start` on, in OpenAI's format for chats or completions."""
        if one.logprobs is None:
            return None
        positions = list(zip(one.token_ids, one.logprobs, strict=True))
        if self.chat:
            return {"content": [_of_chat(*position) for position in positions[start:]], "refusal": None}
        texts = [tokens[token].decoded_token for token, tokens in positions]
        offsets = list(accumulate(map(len, texts), initial=0))[start:-1]
        return {
            "tokens": texts[start:],
            "token_logprobs": [_finite(tokens[token].logprob) for token, tokens in positions[start:]],
            # of tokens with the same text, the likeliest
            "top_logprobs": [
                {t.decoded_token: _finite(t.logprob) for t in _likeliest(tokens)[::-1]}
                for _, tokens in positions[start:]
            ],
            "text_offset": offsets,
        }


def _index(number: int, output: RequestOutput, one: CompletionOutput) -> int:
    """The choice's index: all prompts have equally many."""
    return number * len(output.outputs) + one.index


def _of_chat(token: int, tokens: dict[int, Logprob]) -> dict[str, Any]:
    def entry(one: Logprob) -> dict[str, Any]:
        text = one.decoded_token
        return {"token": text, "logprob": _finite(one.logprob), "bytes": list(text.encode())}

    return entry(tokens[token]) | {"top_logprobs": [entry(one) for one in _likeliest(tokens)]}


def _likeliest(tokens: dict[int, Logprob]) -> list[Logprob]:
    return sorted(tokens.values(), key=lambda one: one.rank)


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999.0 for very unlikely tokens."""
    return max(logprob, -9999.0)
