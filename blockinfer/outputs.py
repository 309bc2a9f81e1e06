"""What the engine gives back for a request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestMetrics:
    """What a request cost; counts are summed over its answers, and the seconds are those of the first to get so far.

    nfe: forwards in which the request had rows, repeated ones included. denoising_steps: steps of the blocks it went
    through, each counted once. The seconds are wall time since the request was added: until its first forward was
    launched, until its first block's tokens were there, and in all. preemptions: how often its pages were taken. seed:
    of its noise; that of its further answers is `sampling_params.answer_seed` of it.
    """

    nfe: int
    denoising_steps: int
    queued_seconds: float
    first_block_seconds: float
    total_seconds: float
    preemptions: int
    seed: int


@dataclass(frozen=True)
class Logprob:
    """Of a token at a revealed position: its log-probability, one more than the number of likelier tokens, and its
    text, None where there is no tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. token_ids end before the first stop token, or with the token that completes a stop string; text is
    None where there is no tokenizer.

    finish_reason: "stop" (stop_reason is then the stop token's id, or the stop string) or "length". logprobs: for each
    of token_ids, where SamplingParams.logprobs asked for it, its own and the likeliest tokens' by id.
    """

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request, with its n outputs. prompt is None where the prompt came as token ids alone."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
