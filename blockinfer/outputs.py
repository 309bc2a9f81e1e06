"""What the engine gives back for a request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestMetrics:
    """What a request cost; counts are summed over its answers, and the seconds are those of the first to get so far.

    nfe: forwards in which the request had rows, repeated ones included. denoising_steps: steps of the blocks it went
    through, each counted once. The seconds are wall time since the request was added: until its first forward was
    launched, until its first block's tokens were there (None before), and in all. preemptions: how often its pages were
    taken. seed: of its noise; that of its further answers is `sampling_params.answer_seed` of it.
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
    """Of a token at a revealed position: its log-probability, one more than the number of likelier tokens, and its
    text, None where there is no tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True)
class Span:
    """A masked span, filled: its first position, and its tokens and their text up to what stops it, if anything."""

    start: int
    token_ids: list[int]
    text: str | None


@dataclass(frozen=True)
class Infilled:
    """A prompt with its spans filled, each whole: all token ids and their text, and the spans."""

    token_ids: list[int]
    text: str | None
    spans: list[Span]


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. token_ids end before the first stop token, or with the token that completes a stop string; text is
    None where there is no tokenizer.

    finish_reason: "stop" (stop_reason is then the stop token's id, or the stop string) or "length"; None of an
    unfinished one, whose text and token_ids are those of finished blocks: later outputs of the request begin with them,
    or, where a stop string ends it, with the text. canvas: the open blocks after a step, where that was asked for, None
    where a position is still masked. It is provisional: a preemption goes back to where the last block was finished.
    logprobs: for each of token_ids, where SamplingParams.logprobs asked for it, its own and the likeliest tokens' by
    id. infilled: of a prompt with masked spans; token_ids and text are then those of all spans, and how it ended is how
    the last one did.
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
    """A request that is finished, or, where its stream was asked for, one that has come so far; with its n outputs.
    prompt is None where the prompt came as token ids alone."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics


@dataclass(frozen=True)
class ScoringOutput:
    """Forwards of one canvas: of each the log-probabilities that were asked for; how many there were, a shadow's
    counted too."""

    finished = True

    request_id: int
    values: list[list[float]]
    nfe: int


@dataclass(frozen=True)
class ScoreOutput:
    """The log-likelihood of a continuation, in nats; standard_error: of its estimate, 0 where it is exact, None where a
    single forward cannot tell.

    is_greedy: whether greedy decoding gives it, None where that was not asked for. nfe: forwards, those for is_greedy
    included. seed: of the masks.
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
    """What the model thinks of candidates: of each its log-probability, and its share among all of them.

    choices: their token ids. best: the index of the likeliest, the first of equals. scores: of a candidate of several
    tokens how its log-probability was estimated; None where it was read off exactly.
    """

    prompt_token_ids: list[int]
    choices: list[list[int]]
    logprobs: list[float]
    probabilities: list[float]
    best: int
    scores: list[ScoreOutput | None]
    nfe: int
