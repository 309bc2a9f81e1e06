"""What the engine gives back for a request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestMetrics:
    """What a request cost. Counts are summed over its answers; times are those of the first answer to get that far.

    nfe: forwards in which the request had rows, including repeated ones. denoising_steps: steps of its blocks, each
    counted once. queued_seconds, first_block_seconds, total_seconds: wall time since the request was added, until its
    first forward was launched, until the tokens of its first block arrived (None before that), and in total.
    preemptions: how often its pages were taken away. seed: of its noise; `sampling_params.answer_seed` gives the seeds
    of its further answers.
    """

    nfe: int
    denoising_steps: int
    queued_seconds: float
    first_block_seconds: float | None
    total_seconds: float
    preemptions: int
    seed: int


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability at a revealed position. rank: 1 for the likeliest token. decoded_token: its text, None
    without a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True)
class Span:
    """A filled span of masks: its first position, its tokens and their text, up to a stop if there was one."""

    start: int
    token_ids: list[int]
    text: str | None


@dataclass(frozen=True)
class Infilled:
    """A prompt with its spans filled in whole: all token ids, their text, and the spans."""

    token_ids: list[int]
    text: str | None
    spans: list[Span]


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. token_ids end before the first stop token, or with the token that completes a stop string. text is
    None without a tokenizer.

    finish_reason: "stop" (stop_reason is then the stop token's id, or the stop string) or "length". It is None for an
    unfinished answer, whose text and token_ids are those of its finished blocks: later outputs of the request begin
    with the same token ids and text, or, if a stop string ends it, with the same text.
    logprobs: if SamplingParams.logprobs asked for it, for each of token_ids the entries of the token itself and of the
    likeliest tokens, by id.
    infilled: for a prompt with masked spans. token_ids and text are then those of all spans, and finish_reason is that
    of the last span.
    canvas: if asked for, the open blocks after a step, None where a position is still masked. It is provisional: a
    preemption goes back to the end of the last finished block.
    """

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None = None
    infilled: Infilled | None = None
    canvas: tuple[int | None, ...] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request, or the present state of one that is streamed, with its n answers in `outputs`. prompt is None
    if only token ids were given."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics


@dataclass(frozen=True)
class ScoringOutput:
    """The forwards of one canvas. values: for each forward, the log-probabilities that were asked for. nfe: the number
    of forwards, including a shadow's."""

    finished = True

    request_id: int
    values: list[list[float]]
    nfe: int


@dataclass(frozen=True)
class ScoreOutput:
    """The log-likelihood of a continuation, in nats. standard_error: of the estimate; 0 if it is exact, else None if
    there was a single forward.

    is_greedy: whether greedy decoding gives the continuation; None if not asked for. nfe: forwards, including those
    for is_greedy. seed: of the masks.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    logprob: float
    standard_error: float | None
    is_greedy: bool | None
    nfe: int
    seed: int


@dataclass(frozen=True)
class ChoiceOutput:
    """The candidates of one prompt: for each its log-probability, and its probability among the candidates.

    choices: their token ids. best: the index of the likeliest, the first of equals. scores: the ScoreOutput of a
    candidate of several tokens; None for one that was read off exactly.
    """

    prompt_token_ids: list[int]
    choices: list[list[int]]
    logprobs: list[float]
    probabilities: list[float]
    best: int
    scores: list[ScoreOutput | None]
    nfe: int
