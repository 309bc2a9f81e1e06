"""What the engine gives back for a request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestMetrics:
    """What a request cost.

    nfe: forwards in which the request had rows, repeated ones included. denoising_steps: steps of the blocks it went
    through, each counted once. The seconds are wall time since the request was added: until its first forward was
    launched, until its first block's tokens were there, and in all. preemptions: how often its pages were taken. seed:
    of its noise.
    """

    nfe: int
    denoising_steps: int
    queued_seconds: float
    first_block_seconds: float
    total_seconds: float
    preemptions: int
    seed: int


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. token_ids end before the first stop token; text is None where there is no tokenizer.

    finish_reason: "stop" (stop_reason is then the stop token's id) or "length".
    """

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request, with one output. prompt is None where the prompt came as token ids alone."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
