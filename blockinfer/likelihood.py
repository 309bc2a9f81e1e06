"""Likelihoods of given answers and of candidates: `LLM.score` and `LLM.choose`, run as requests of the engine."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from tqdm.auto import tqdm

from blockinfer.arguments import Continuation
from blockinfer.checks import check_bool
from blockinfer.decoding.likelihood import Mask, draw_masks, estimate
from blockinfer.engine.engine import Engine
from blockinfer.engine.prompts import Prompt
from blockinfer.outputs import ChoiceOutput, RequestOutput, ScoreOutput, ScoringOutput
from blockinfer.sampling_params import SamplingParams
from blockinfer.scoring_params import ScoringParams


@dataclass
class _Canvas:
    """The tokens before and after an answer."""

    prompt: list[int]
    before: list[int]
    after: list[int]

    def around(self, answer: list[int]) -> tuple[list[int], range]:
        start = len(self.before)
        return self.before + answer + self.after, range(start, start + len(answer))


@dataclass
class _Work:
    """One request to the engine, and its result. masks: masked places of the answer, a list that works may share.
    candidates: tokens to read log-probabilities of at the single masked place; if empty, the answer's tokens are
    read at every masked place. values: the candidates' log-probabilities, or their sum for each mask."""

    prompt: list[int]
    token_ids: list[int]
    answer: range
    masks: list[Mask]
    candidates: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    nfe: int = 0
    is_greedy: bool | None = None
    left: int = 1

    def placed(self) -> list[Mask]:
        """The masks as positions of the canvas."""
        return [tuple(self.answer.start + i for i in mask) for mask in self.masks]

    def reads(self) -> list[list[tuple[int, int]]]:
        """For each mask, the (position, token id) pairs to read."""
        if self.candidates:
            return [[(self.answer.start, token) for token in self.candidates]]
        return [[(i, self.token_ids[i]) for i in mask] for mask in self.placed()]

    def take(self, values: list[list[float]]) -> None:
        self.values = values[0] if self.candidates else [math.fsum(of_mask) for of_mask in values]


def score(
    engine: Engine, prompts: list[Prompt], continuations: Sequence[Continuation], params: ScoringParams, use_tqdm: bool
) -> list[ScoreOutput]:
    """`LLM.score`."""
    seed = engine.draw_seed() if params.seed is None else params.seed
    masks_of = cache(lambda length: draw_masks(length, params.mc_num, seed))
    works = []
    for i, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        with _named(f"prompt {i}"):
            canvas = _canvas(engine, prompt, spans=0)
            answer = engine.prompts.encode(continuation, "continuation")
            works.append(_of_answer(engine, canvas, answer, masks_of, params))
    _run(engine, works, params, use_tqdm)
    return [_score_output(work, params, seed) for work in works]


def choose(
    engine: Engine,
    prompts: list[Prompt],
    choices: Sequence[Sequence[Continuation]],
    params: ScoringParams,
    use_tqdm: bool,
) -> list[ChoiceOutput]:
    """`LLM.choose`."""
    if params.is_greedy:
        raise ValueError("is_greedy is for score alone: choose decodes no continuation; leave it False")
    seed = engine.draw_seed() if params.seed is None else params.seed
    masks_of = cache(lambda length: draw_masks(length, params.mc_num, seed))
    asked: list[tuple[_Canvas, list[list[int]], _Work | None, list[_Work | None]]] = []
    for i, (prompt, candidates) in enumerate(zip(prompts, choices, strict=True)):
        with _named(f"prompt {i}"):
            canvas = _canvas(engine, prompt, spans=1)
            answers = [engine.prompts.encode(candidate, "choice") for candidate in candidates]
            _check_choices(canvas, answers)
            single = _of_position(engine, canvas, [answer[0] for answer in answers if len(answer) == 1], params)
            longer = [
                _of_answer(engine, canvas, answer, masks_of, params) if len(answer) > 1 else None for answer in answers
            ]
            asked.append((canvas, answers, single, longer))
    works = [work for _, _, single, longer in asked for work in (single, *longer) if work is not None]
    _run(engine, works, params, use_tqdm)
    return [_choice_output(*parts, params, seed) for parts in asked]


class _named:
    """Names the item in a ValueError."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"{self.name}: {error}") from error


def _canvas(engine: Engine, prompt: Prompt, spans: int) -> _Canvas:
    read = engine.prompts.read(prompt)
    if read.tokens is None:
        return _Canvas(read.token_ids, read.token_ids, [])
    first, last = read.tokens.index(None), len(read.tokens) - read.tokens[::-1].index(None)
    if not spans:
        raise ValueError("score takes no masked spans: the continuation follows the prompt; choose takes one")
    if any(token is not None for token in read.tokens[first:last]):
        raise ValueError("choose takes one masked span in a prompt, and here are several")
    return _Canvas(read.token_ids, read.tokens[:first], read.tokens[last:])


def _check_choices(canvas: _Canvas, answers: list[list[int]]) -> None:
    if len(answers) < 2:
        raise ValueError(f"choose needs at least 2 choices, got {len(answers)}")
    if len(set(map(tuple, answers))) < len(answers):
        raise ValueError("two choices are the same tokens")
    span = len(canvas.prompt) - len(canvas.before) - len(canvas.after)
    for i, answer in enumerate(answers):
        if span and len(answer) != span:
            raise ValueError(f"choice {i} has {len(answer)} tokens, the masked span {span}")


def _check_tokens(engine: Engine, token_ids: list[int]) -> None:
    size = engine.model.config.vocab_size
    outside = [i for i in token_ids if i >= size]
    if outside:
        raise ValueError(f"token {outside[0]} is none of the {size} that the model predicts")


def _of_answer(
    engine: Engine,
    canvas: _Canvas,
    answer: list[int],
    masks_of: Callable[[int], list[Mask]],
    params: ScoringParams,
) -> _Work:
    _check_tokens(engine, answer)
    token_ids, positions = canvas.around(answer)
    # before the masks, which are slow to draw, and before anything runs
    engine.check_scoring(len(token_ids), params)
    return _Work(canvas.prompt, token_ids, positions, masks_of(len(answer)))


def _of_position(engine: Engine, canvas: _Canvas, tokens: list[int], params: ScoringParams) -> _Work | None:
    """One forward that scores all candidates of one token; None if there are none."""
    if not tokens:
        return None
    _check_tokens(engine, tokens)
    token_ids, positions = canvas.around([engine.config.mask_token_id])
    engine.check_scoring(len(token_ids), params)
    return _Work(canvas.prompt, token_ids, positions, [(0,)], tokens)


def _run(engine: Engine, works: list[_Work], params: ScoringParams, use_tqdm: bool) -> None:
    """Runs the works, keeping only as many requests in the engine as keep it busy, to bound their memory."""
    check_bool("use_tqdm", use_tqdm)
    try:
        _complete(engine, works, params, use_tqdm)
    finally:
        # once more: a second Ctrl-C may have cut the first clean-up short
        engine.abort_all()


def _complete(engine: Engine, works: list[_Work], params: ScoringParams, use_tqdm: bool) -> None:
    left = deque(works)
    running: dict[int, _Work] = {}
    greedy: dict[int, _Work] = {}
    with tqdm(total=len(works), disable=not use_tqdm, unit="request", dynamic_ncols=True) as progress:
        try:
            while left or engine.has_unfinished():
                while left and len(engine.scheduler.waiting) < 2 * engine.config.max_num_seqs:
                    work = left.popleft()
                    asked = work.token_ids, work.answer, work.placed(), work.reads()
                    running[engine.add_scoring(*asked, params)] = work
                    if params.is_greedy:
                        greedy[_add_greedy(engine, work, params)] = work
                        work.left += 1
                for output in engine.step():
                    work = _take(output, running, greedy)
                    work.left -= 1
                    progress.update(work.left == 0)
        finally:
            engine.abort_all()


def _take(output: ScoringOutput | RequestOutput, running: dict[int, _Work], greedy: dict[int, _Work]) -> _Work:
    if isinstance(output, ScoringOutput):
        work = running.pop(output.request_id)
        work.take(output.values)
        work.nfe += output.nfe
    else:
        work = greedy.pop(output.request_id)
        work.is_greedy = output.outputs[0].token_ids == work.token_ids[work.answer.start :]
        work.nfe += output.metrics.nfe
    return work


def _add_greedy(engine: Engine, work: _Work, params: ScoringParams) -> int:
    """LLaDA's suffix_greedy_prediction: reveals the most confident token, one at a time, with no stop token."""
    length = len(work.answer)
    options = dict(max_tokens=length, block_length=length, mode=params.mode, cfg_scale=params.cfg_scale)
    return engine.add_request(work.prompt, SamplingParams(**options, seed=0, ignore_eos=True))


def _score_output(work: _Work, params: ScoringParams, seed: int) -> ScoreOutput:
    logprob, error = estimate(len(work.answer), params.mc_num, work.masks, work.values)
    token_ids = [work.token_ids[i] for i in work.answer]
    return ScoreOutput(work.prompt, token_ids, logprob, error, work.is_greedy, work.nfe, seed)


def _choice_output(
    canvas: _Canvas,
    answers: list[list[int]],
    single: _Work | None,
    longer: list[_Work | None],
    params: ScoringParams,
    seed: int,
) -> ChoiceOutput:
    exact: Iterator[float] = iter(single.values if single else [])
    scores = [None if work is None else _score_output(work, params, seed) for work in longer]
    logprobs = [next(exact) if score is None else score.logprob for score in scores]
    best = max(range(len(answers)), key=logprobs.__getitem__)
    weights = [math.exp(logprob - logprobs[best]) for logprob in logprobs]
    nfe = (single.nfe if single else 0) + sum(score.nfe for score in scores if score)
    probabilities = [weight / math.fsum(weights) for weight in weights]
    return ChoiceOutput(canvas.prompt, answers, logprobs, probabilities, best, scores, nfe)
