"""Turns finished sequences into the user's outputs."""

import time
from collections.abc import Callable
from functools import cache

from blockinfer.engine.infilling import InfillSequence
from blockinfer.engine.scoring import ScoringRow
from blockinfer.engine.sequence import Sequence
from blockinfer.engine.stops import find_stop
from blockinfer.engine.text import settled
from blockinfer.outputs import (
    CompletionOutput,
    Infilled,
    Logprob,
    RequestMetrics,
    RequestOutput,
    ScoringOutput,
    Span,
)

Decode = Callable[[list[int]], str]
# The open blocks of sequences, by sequence id: None where a position is masked.
Canvases = dict[int, tuple[int | None, ...]]


def search_stop(sequence: Sequence, decode: Decode) -> None:
    """Looks for the request's stop strings in the blocks finished since the last search."""
    params = sequence.params
    if isinstance(sequence, InfillSequence) or sequence.stopped_by is not None:
        return
    token_ids = sequence.output_token_ids[: sequence.stop_position()]
    if len(token_ids) == sequence.num_searched:
        return
    searched = sequence.num_searched
    sequence.stopped_by = find_stop(decode, token_ids, searched, params.stop, params.include_stop_str_in_output)
    sequence.num_searched = len(token_ids)


def scoring_output(siblings: list[ScoringRow]) -> ScoringOutput:
    """The output of a scoring request whose forwards are all done."""
    return ScoringOutput(siblings[0].request_id, [row.values for row in siblings], sum(row.nfe for row in siblings))


def request_output(siblings: list[Sequence], decode: Decode | None, canvases: Canvases | None = None) -> RequestOutput:
    """The output of a request whose sequences are all finished, or that is streamed. decode: None without a tokenizer.
    canvases: those of the sequences whose open blocks advanced."""
    first, now = siblings[0], time.perf_counter()
    first_blocks = [sequence.first_block_at for sequence in siblings if sequence.first_block_at is not None]
    return RequestOutput(
        request_id=first.request_id,
        prompt=first.prompt,
        prompt_token_ids=first.asked_token_ids,
        outputs=[
            _infilled(i, sequence, decode)
            if isinstance(sequence, InfillSequence)
            else _completion(i, sequence, decode, (canvases or {}).get(sequence.request_id))
            for i, sequence in enumerate(siblings)
        ],
        finished=all(sequence.is_finished() for sequence in siblings),
        metrics=RequestMetrics(
            nfe=sum(sequence.nfe for sequence in siblings),
            denoising_steps=sum(sequence.denoising_steps for sequence in siblings),
            queued_seconds=min(s.first_run_at for s in siblings if s.first_run_at is not None) - first.added_at,
            first_block_seconds=min(first_blocks) - first.added_at if first_blocks else None,
            total_seconds=now - first.added_at,
            preemptions=sum(sequence.preemptions for sequence in siblings),
            seed=first.seed,
        ),
    )


def _completion(
    index: int, sequence: Sequence, decode: Decode | None, canvas: tuple[int | None, ...] | None
) -> CompletionOutput:
    found, stop = sequence.stopped_by, sequence.stop_position()
    token_ids = sequence.output_token_ids[: found.num_tokens if found else stop]
    if found:
        text, reason = found.text, found.stop
    else:
        text = None if decode is None else decode(token_ids)
        reason = None if stop is None else sequence.output_token_ids[stop]
    finished = sequence.is_finished()
    if text is not None and not finished:
        text = sequence.streamed_text = settled(text, sequence.streamed_text, sequence.params.stop or ())
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=token_ids,
        finish_reason=None if not finished else "length" if reason is None else "stop",
        stop_reason=reason,
        canvas=canvas,
        logprobs=None if sequence.params.logprobs is None else _named(sequence.logprobs[: len(token_ids)], decode),
    )


def _infilled(index: int, sequence: InfillSequence, decode: Decode | None) -> CompletionOutput:
    output, params = sequence.output_token_ids, sequence.params
    spans, kept, reason = [], [], None
    for part in sequence.spans():
        token_ids, reason = output[part], None
        stop = next((i for i, token in enumerate(token_ids) if token in sequence.stop_token_ids), None)
        if stop is not None:
            token_ids, reason = token_ids[:stop], token_ids[stop]
        text = None if decode is None else decode(token_ids)
        found = params.stop and find_stop(decode, token_ids, 0, params.stop, params.include_stop_str_in_output)
        if found:
            token_ids, text, reason = token_ids[: found.num_tokens], found.text, found.stop
        spans.append(Span(sequence.prompt_len + part.start, token_ids, text))
        kept += range(part.start, part.start + len(token_ids))
    whole = sequence.prompt_token_ids + output
    return CompletionOutput(
        index=index,
        text=None if decode is None else "".join(span.text for span in spans),
        token_ids=[output[i] for i in kept],
        finish_reason="length" if reason is None else "stop",
        stop_reason=reason,
        logprobs=None if params.logprobs is None else _named([sequence.logprobs[i] for i in kept], decode),
        infilled=Infilled(whole, None if decode is None else decode(whole), spans),
    )


def _named(positions: list[dict[int, tuple[float, int]]], decode: Decode | None) -> list[dict[int, Logprob]]:
    """Adds each token's text."""
    text = (lambda token_id: None) if decode is None else cache(lambda token_id: decode([token_id]))
    return [{i: Logprob(logprob, rank, text(i)) for i, (logprob, rank) in tokens.items()} for tokens in positions]
