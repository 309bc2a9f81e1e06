"""The engine's loop: requests in, one step at a time, finished requests out."""

import random
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from blockinfer.checks import check_choice, check_text, foreign_errors, shown
from blockinfer.config import EngineConfig
from blockinfer.decoding.likelihood import Mask
from blockinfer.engine.answers import Canvases, request_output, scoring_output, search_stop
from blockinfer.engine.batch import denoised
from blockinfer.engine.block_causal import BlockCausalSequence, check_block_causal
from blockinfer.engine.graphs import ROW_TILE
from blockinfer.engine.infilling import InfillSequence, check_infilling
from blockinfer.engine.limits import Limits
from blockinfer.engine.model_runner import ModelRunner, most_blocks
from blockinfer.engine.page_pool import PagePool
from blockinfer.engine.prompts import Prompt, PromptReader, ReadPrompt
from blockinfer.engine.resident import Resident
from blockinfer.engine.scheduler import ScheduledSequence, Scheduler
from blockinfer.engine.scoring import Scores, ScoringRow
from blockinfer.engine.sequence import BLOCKS, DENOISE, Sequence
from blockinfer.memory import free_memory, num_pages
from blockinfer.models.transformer import Transformer
from blockinfer.outputs import RequestOutput, ScoringOutput
from blockinfer.sampling_params import SamplingParams, answer_seed
from blockinfer.scoring_params import ScoringParams

# End-of-message tokens of the families' chat templates.
_EOTS = ("<|eot_id|>", "<|role_end|>")
# More characters than any token stands for.
_MAX_CHARACTERS = 1000


class Engine:
    """Requests of any mode, rule, length and seed share batches; none changes another's tokens.

    If Ctrl-C interrupts a call, the next call puts every request back to the start of its block, as a preemption does:
    no tokens change and no output is lost.
    """

    def __init__(self, model: Transformer, config: EngineConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        eos_ids = list(model.config.eos_token_ids)
        known = tokenizer.get_vocab() if tokenizer else {}
        eot_ids = [known[token] for token in _EOTS if token in known]
        eot_ids += model.config.end_token_ids
        self.stop_token_ids = frozenset(eos_ids + eot_ids)
        pages = num_pages(model.config, config, free_memory(config.device))
        self.runner = ModelRunner(model, config, pages, eos_ids, eos_ids + eot_ids)
        self._alone = False
        self._failures: dict[int, ValueError] = {}  # requests whose tokens could not be decoded
        self.abort_all()
        tokenize = None if tokenizer is None else self.tokenize
        self.prompts = PromptReader(tokenize, config.mask_token_id, model.config.embedding_size)
        self._limits = Limits(
            model.config, config, pages, len(self.runner.eos_ids), len(self.runner.last_ids), tokenizer is not None
        )
        self._next_id = 0
        self._seeds = random.Random(config.seed)

    def add_request(
        self, prompt: Prompt | ReadPrompt, params: SamplingParams | None = None, *, stream: str | None = None
    ) -> int:
        """Queues a request and returns its id.

        prompt: a string, token ids, {"prompt": ...} or {"prompt_token_ids": [...]}, where a dict may also have masked
        spans (`LLM.generate`); or the result of `prompts.read`. stream: with "blocks", `step` returns an output for
        each finished block; with "denoise", also one with the open blocks after each step, and every step waits for the
        device.

        Raises ValueError for a prompt that is empty, malformed or, with max_tokens, longer than max_model_len; for a
        request that can never fit the page pool; and for an option that this checkpoint does not support.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be a SamplingParams, got {type(params).__name__}")
        if stream is not None:
            check_choice("stream", stream, (BLOCKS, DENOISE))
        read = prompt if isinstance(prompt, ReadPrompt) else self.prompts.read(prompt)
        if read.tokens is not None and stream is not None:
            raise ValueError("masked spans are filled between text that stays, and cannot be streamed")
        block_causal = self.model.config.block_length is not None
        if block_causal:
            check_block_causal(params, read.tokens is not None)
        if read.tokens is None:
            whole = params.block_length if block_causal else 1
            self._limits.check_fits(len(read.token_ids), params.max_tokens, params.cfg_scale > 0, whole)
        else:
            check_infilling(read.tokens, params)
            self._limits.check_fits(len(read.tokens), 0, params.cfg_scale > 0)
        self._limits.check_options(params)
        stops = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            stops |= self.stop_token_ids
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        siblings: list[Sequence] = []
        make = BlockCausalSequence if block_causal else Sequence
        for i in range(params.n):
            rest = params, answer_seed(seed, i), frozenset(stops), siblings
            if read.tokens is None:
                make(self._next_id + i, read.text, read.token_ids, *rest)
            else:
                InfillSequence(self._next_id + i, read.text, read.tokens, *rest, read.token_ids)
            siblings[i].stream = stream
        return self._queue(siblings)

    def add_scoring(
        self,
        token_ids: list[int],
        answer: range,
        masked: Items[Mask],
        reads: Items[list[tuple[int, int]]],
        params: ScoringParams,
    ) -> int:
        """Queues forwards of a canvas, each with different positions of the answer masked, and returns the request id;
        `step` returns a ScoringOutput. reads: for each forward, the (position, token id) pairs whose log-probabilities
        are wanted.

        Raises ValueError if the canvas does not fit, and for a block-causal network: the estimates need all positions
        to see each other.
        """
        self.check_scoring(len(token_ids), params)
        siblings: list[ScoringRow] = []
        for i, (mask, wanted) in enumerate(zip(masked, reads, strict=True)):
            options = params.mode, params.cfg_scale, siblings
            ScoringRow(self._next_id + i, token_ids, answer, mask, wanted, *options)
        return self._queue(siblings)

    def check_scoring(self, length: int, params: ScoringParams) -> None:
        """Raises what `add_scoring` raises for a canvas of `length` tokens."""
        if self.model.config.block_length is not None:
            raise ValueError(
                "likelihoods are not defined here for a block-causal model, and this one is; generate instead"
            )
        self._limits.check_fits(length, 0, params.cfg_scale > 0, whose="the prompt's and the answer's")

    def draw_seed(self) -> int:
        """The next seed for a request that has none."""
        return self._seeds.getrandbits(64)

    def _queue(self, siblings: list[Resident]) -> int:
        self._next_id += len(siblings)
        with self._whole():
            for sequence in siblings:
                self.scheduler.add(sequence)
            self._sequences |= {sequence.request_id: sequence for sequence in siblings}
        return siblings[0].request_id

    def step(self) -> list[RequestOutput | ScoringOutput]:
        """One forward for the requests that fit in it -> outputs of the requests that it finished, and of the streamed
        requests that it advanced, in the order they were added.

        Raises FloatingPointError, naming the requests, if an earlier step found logits that are NaN or infinite (at the
        latest the step that ends the block of such a request); ValueError if the tokens of a request cannot be decoded.
        Nothing runs then. Abort the requests in the error's `request_ids`; the others have lost nothing and continue.
        """
        with self._whole():
            # kept until they are returned, the last action of all
            self._finished = self._finished + self._step()
            for output in self._finished:
                if output.finished:
                    self._drop(output.request_id)
        # one statement, so Ctrl-C comes before or after it
        return (self._finished, vars(self).update(_finished=[]))[0]

    def _step(self) -> list[RequestOutput | ScoringOutput]:
        self._check_failed()
        scheduled = self._next_scheduled()
        if not scheduled:
            return self._collect(0)
        for sequence, _ in scheduled:
            if not sequence.on_device:
                self.runner.start(sequence)
                sequence.on_device = True
            sequence.first_run_at = sequence.first_run_at or time.perf_counter()
        results, scores = self.runner.run(scheduled)
        if scores is not None:
            self._launched(scores)
        came_on: list[Sequence] = []
        canvases: Canvases = {}
        for (sequence, _), result in zip(denoised(scheduled), results, strict=True):
            if result.broken:
                sequence.broken = True
                continue
            token_ids = None if result.token_ids is None else self._canvas(result.token_ids)
            final = sequence.advance(result.left, token_ids)
            if final:
                sequence.finish(token_ids, final, result.logprobs)
                came_on.append(sequence)
            elif sequence.stream == DENOISE:
                canvases[sequence.request_id] = tuple(token_ids[sequence.output_part(len(token_ids))])
                came_on.append(sequence)
        if self.runner.is_asynchronous and self.scheduler.repeats(scheduled):
            self.runner.repeat(scheduled)
        outputs = self._tell(came_on, canvases)
        # scores launched earlier, while the device is busy
        outputs += self._collect(1 if scores is not None else 0)
        return sorted(outputs, key=lambda output: output.request_id)

    def _next_scheduled(self) -> list[ScheduledSequence]:
        """Those of the step that has begun, unless one was aborted since then; a new request joins the step after
        it."""
        begun = self.runner.begun
        if begun and all(sequence.slot is not None for sequence, _ in begun):
            return begun
        return self.scheduler.schedule()

    def _canvas(self, token_ids: list[int]) -> list[int | None]:
        """None where a position is masked: the mask token is never predicted."""
        return [None if token_id == self.config.mask_token_id else token_id for token_id in token_ids]

    def _tell(self, came_on: list[Sequence], canvases: Canvases) -> list[RequestOutput | ScoringOutput]:
        """Outputs of the advanced requests that are finished or streamed; finished sequences leave the batch."""
        outputs = []
        for siblings in {sequence.request: sequence.siblings for sequence in came_on}.values():
            output = self._try_output(siblings, canvases)
            if output is not None:
                outputs.append(output)
            for sequence in siblings:
                if sequence.slot is not None and sequence.is_finished():
                    self.scheduler.release(sequence)
        return outputs

    def _try_output(
        self, siblings: list[Resident], canvases: Canvases | None = None
    ) -> RequestOutput | ScoringOutput | None:
        """None if the request is neither finished nor, with canvases, streamed; and if its tokens cannot be decoded:
        the next step raises that, and the other requests lose nothing."""
        try:
            # a list, so that every sequence's stop strings are searched
            finished = all([self._is_finished(sequence) for sequence in siblings])
            if finished or (canvases is not None and siblings[0].stream is not None):
                return self._output(siblings, canvases)
        except ValueError as error:
            self._failures[siblings[0].request_id] = error
        return None

    def _launched(self, scores: Scores) -> None:
        """Frees slots and pages at once: what their next owners do runs after these forwards on the device."""
        self._scores = [*self._scores, scores]
        for row in scores.rows:
            row.launched()
            self.scheduler.release(row)

    def _collect(self, left: int) -> list[ScoringOutput]:
        """Collects the scores of all but the last `left` launches -> the requests that this finishes."""
        finished = []
        while len(self._scores) > left:
            scores = self._scores[0]
            scores.collect()
            for siblings in {row.request: row.siblings for row in scores.rows}.values():
                request = siblings[0].request_id
                if request not in self._sequences:
                    # aborted since its launch: an error that named it could not be answered by an abort
                    continue
                if any(row.broken for row in siblings):
                    self._broken.add(request)
                elif all(row.is_finished() for row in siblings):
                    finished.append(self._output(siblings))
            self._scores = self._scores[1:]
        return finished

    def _output(self, siblings: list[Resident], canvases: Canvases | None = None) -> RequestOutput | ScoringOutput:
        if isinstance(siblings[0], ScoringRow):
            return scoring_output(siblings)
        return request_output(siblings, self._decode(siblings[0]), canvases)

    def _is_finished(self, sequence: Resident) -> bool:
        """Searches its stop strings first. What a broken one has found means nothing, so it is never finished."""
        if isinstance(sequence, Sequence) and sequence.params.stop:
            search_stop(sequence, self._decode(sequence))
        return sequence.is_finished() and not sequence.broken

    def abort(self, request_id: int) -> None:
        """Drops an unfinished request. Raises ValueError if there is none with that id."""
        sequence = self._sequences.get(request_id) if isinstance(request_id, int) else None
        if sequence is None or sequence is not sequence.siblings[0]:
            raise ValueError(f"there is no unfinished request {shown(request_id)}")
        with self._whole():
            self._drop(request_id)

    def abort_all(self) -> None:
        """Drops every unfinished request, and repairs the state after a call that Ctrl-C interrupted."""
        self._begin_anew({}, [])

    def restart(self, alone: bool = False) -> list[int]:
        """After an error of `step` that names no request: puts every request back to the start of its block, as a
        preemption does -> the ids of those that ran. alone: from now on requests run one at a time."""
        ran = sorted({sequence.request for sequence in self.scheduler.running})
        self._alone = alone
        self._cut_short = True
        with self._whole():
            return ran

    def has_unfinished(self) -> bool:
        """Whether `step` has something to compute, or an output that Ctrl-C kept it from returning."""
        return bool(self._sequences or self._finished)

    def _drop(self, request_id: int) -> None:
        # a request that finished in an interrupted call is already gone
        if request_id in self._sequences:
            for sequence in self._sequences[request_id].siblings:
                self.scheduler.release(sequence)
                self._sequences.pop(sequence.request_id, None)
            self._broken.discard(request_id)
            self._failures.pop(request_id, None)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Around changes that Ctrl-C could leave half made; errors cannot. Repairs the state after a cut call."""
        if self._cut_short:
            finished = {output.request_id: output for output in self._finished if output.finished}
            for i, first in self._sequences.items():
                if first is first.siblings[0] and i not in finished and (output := self._try_output(first.siblings)):
                    finished[i] = output
            # an abort has taken place once it has removed the first answer
            there = self._sequences.keys() - finished.keys()
            unfinished = {i: s for i, s in self._sequences.items() if s.request in there}
            self._begin_anew(unfinished, list(finished.values()))
        self._cut_short = True
        try:
            yield
        except Exception:
            self._cut_short = False
            raise
        self._cut_short = False

    def _begin_anew(self, sequences: dict[int, Resident], finished: list[RequestOutput | ScoringOutput]) -> None:
        """Starts over with these requests waiting; the engine's state is replaced at the end, in one go."""
        pool = PagePool(self.runner.num_pages, self.config.page_size)
        row_tile = ROW_TILE if self.config.device.type == "cuda" else 1
        limits = self.config.max_num_seqs, self.config.max_num_batched_tokens
        scheduler = Scheduler(pool, *limits, row_tile, self._alone, most_blocks(self.config.max_num_seqs))
        for sequence in sequences.values():
            sequence.requeue()
            if not sequence.is_finished():
                scheduler.add(sequence)
        self._failures = {i: failure for i, failure in self._failures.items() if i in sequences}
        self._sequences, self._finished, self.pool, self.scheduler = sequences, finished, pool, scheduler
        self._scores, self._broken = [], {s.request for s in sequences.values() if s.broken}
        self._cut_short = False

    def _check_failed(self) -> None:
        """Raises FloatingPointError that names the requests whose logits were not finite, as their tokens would mean
        nothing; else the error that an undecodable output raised.

        `token_confidence` defines a token even then; the engine reports that the model is broken instead.
        """
        broken = sorted(self._broken | {s.request for s in self.scheduler.running if s.broken})
        if broken:
            error = FloatingPointError(
                f"the model's logits are NaN or infinite for request {', '.join(map(str, broken))}: its activations "
                f"overflow {self.config.dtype} or its weights are damaged; abort it, or load with a wider dtype"
            )
            error.request_ids = broken
            raise error
        for request_id, failure in self._failures.items():
            failure.request_ids = [request_id]
            raise failure

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids. Raises ValueError for a text that the tokenizer cannot encode, or that is too long for any
        request."""
        check_text("the prompt", text)
        # do not spend the memory of its tokens
        if len(text) > _MAX_CHARACTERS * self.config.max_model_len:
            raise ValueError(
                f"the prompt's {len(text)} characters cannot fit max_model_len={self.config.max_model_len}"
            )
        with foreign_errors("the tokenizer cannot encode the prompt"):
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)

    def _decode(self, sequence: Sequence) -> Callable[[list[int]], str] | None:
        """A function from token ids to text, for this sequence; None without a tokenizer."""
        if self.tokenizer is None:
            return None

        def decode(token_ids: list[int]) -> str:
            with foreign_errors(f"the tokenizer cannot decode the tokens of request {sequence.request}"):
                return self.tokenizer.decode(token_ids, skip_special_tokens=True)

        return decode
