"""Answers as OpenAI spells them: whole ones, and the chunks of a stream."""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from blockinfer.outputs import RequestOutput

DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens, without stop tokens, and forwards, of all choices together."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    forwards = sum(output.metrics.nfe for output in outputs)
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return counts | {"forwards": forwards}


@dataclass
class Answer:
    """One answer of one or several choices. token_text: of a canvas's tokens. It keeps what a stream has sent."""

    chat: bool
    model: str
    token_text: Callable[[int], str]
    with_usage: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    _sent: dict[int, int] = field(default_factory=dict)
    _finished: dict[int, RequestOutput] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = [self._choice(i, output) for i, output in enumerate(outputs)]
        return self._head("chat.completion") | {"choices": choices, "usage": usage(outputs)}

    def begin(self, count: int) -> Iterator[dict[str, Any]]:
        """A chat's first chunks say who speaks."""
        for i in range(count if self.chat else 0):
            yield self._chunk(i, {"role": "assistant", "content": ""})

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """What an output adds to the stream: new text, a canvas, the end."""
        (one,) = output.outputs
        text = one.text[self._sent.get(index, 0) :]
        self._sent[index] = len(one.text)
        if text:
            yield self._chunk(index, {"content": text})
        if one.canvas is not None:
            yield self._chunk(index, {}, denoise=self._canvas(output))
        if output.finished:
            self._finished[index] = output
            yield self._chunk(index, {}, finish_reason=one.finish_reason, seed=output.metrics.seed)

    def end(self) -> Iterator[dict[str, Any]]:
        if self.with_usage:
            outputs = [self._finished[i] for i in sorted(self._finished)]
            yield self._head("chat.completion.chunk") | {"choices": [], "usage": usage(outputs)}

    def _head(self, kind: str) -> dict[str, Any]:
        kind = kind if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        (one,) = output.outputs
        said = {"message": {"role": "assistant", "content": one.text}} if self.chat else {"text": one.text}
        end = {"logprobs": None, "finish_reason": one.finish_reason, "seed": output.metrics.seed}
        return {"index": index} | said | end

    def _chunk(self, index: int, delta: dict[str, str], **more: Any) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice = {"index": index} | said | {"logprobs": None, "finish_reason": None} | more
        usage_so_far = {"usage": None} if self.with_usage else {}
        return self._head("chat.completion.chunk") | {"choices": [choice]} | usage_so_far

    def _canvas(self, output: RequestOutput) -> dict[str, Any]:
        """The open block after a step, None where a position is masked; and what was done so far."""
        (one,) = output.outputs
        canvas = [None if token is None else self.token_text(token) for token in one.canvas]
        done = {"tokens": len(one.token_ids), "forwards": output.metrics.nfe}
        return {"provisional": True, "canvas": canvas} | done
