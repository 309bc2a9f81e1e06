"""Requests that generate, on their way through the engine: their tokens and where they stand. No tensors."""

import time
from typing import NamedTuple

from blockinfer.decoding.editing import BlockEdits
from blockinfer.decoding.modes import MODES, BlockState, Segment
from blockinfer.decoding.unmasking import RULES, scheduled_count
from blockinfer.decoding.windows import MAX_OPEN_BLOCKS, OpenBlock, Window, activated, after_step, num_finished
from blockinfer.engine.resident import Resident
from blockinfer.engine.stops import StopMatch
from blockinfer.sampling_params import SamplingParams

# What a request may be asked to tell of before it is finished: each block that is; besides, the canvas after each step.
BLOCKS, DENOISE = "blocks", "denoise"


class Saved(NamedTuple):
    """Where a sequence goes on from when its pages were taken: how it stood when its last block was finished.

    leaving: of finished blocks that are still in the window their ends, and the steps that each stays. steps: made so
    far. token_ids: of the positions of the open blocks, None where one is masked; logprobs: where they are asked for.
    """

    window_start: int
    leaving: tuple[tuple[int, int], ...]
    window: Window
    steps: int
    token_ids: list[int | None]
    logprobs: list[dict[int, tuple[float, int]]]


class Sequence(Resident):
    """The state of a request, or of one of its answers, on the host. The tokens of the open blocks live on the device,
    in row `slot`.

    window: the open blocks, of which the first is not finished. window_start: the first position that each step
    computes, which is the first block's, or that of a finished one that `commit_delay` keeps.
    """

    def __init__(
        self,
        request_id: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        seed: int,
        stop_token_ids: frozenset[int],
        siblings: "list[Sequence] | None" = None,
    ) -> None:
        super().__init__(request_id, siblings)
        self.prompt = prompt
        self.asked_token_ids = self.prompt_token_ids = prompt_token_ids
        self.prompt_len = len(prompt_token_ids)
        self.canvas_end = self.prompt_len + params.max_tokens
        self.params = params
        self.mode = params.mode
        self.guided = params.cfg_scale > 0
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        self.has_several_blocks = params.block_add_threshold < 1  # whether one may open before the last is finished
        self._is_scheduled = RULES[params.unmasking].scheduled
        self._has_schedule = RULES[params.unmasking].has_schedule
        # tokens of finished blocks, stop tokens and what follows them included
        self.output_token_ids: list[int] = []
        self.logprobs: list[dict[int, tuple[float, int]]] = []  # of these tokens, where the request asks for them
        self.stream: str | None = None
        self.streamed_text = ""
        self.stopped_by: StopMatch | None = None
        self.num_searched = 0  # tokens that hold no stop string
        self.first_block_at: float | None = None
        self._begin()

    def _begin(self) -> None:
        first = self._block_from(self.prompt_len)
        self._saved = Saved(self.prompt_len, (), (first,), 0, [], [])
        self._go_on()

    def _go_on(self) -> None:
        """As it was saved."""
        self.window_start, self._leaving, self.window, self.denoising_steps, *_ = self._saved
        self.step = 0  # since the window's start last moved
        self.edits = BlockEdits(self.output_part(0).start or 0) if self.params.editing_threshold is not None else None
        self._plan = None

    def _block_from(self, start: int) -> OpenBlock | None:
        """The block that begins there; None at the canvas's end."""
        stop = min(start + self.params.block_length, self.canvas_end)
        return self._open(start, stop, stop - start) if start < stop else None

    def _open(self, start: int, stop: int, number: int) -> OpenBlock:
        return OpenBlock(start, stop, number, number, self.params.block_steps(number))

    def known_token_ids(self) -> list[int]:
        """Those of the positions before the open blocks."""
        return self.prompt_token_ids + self.output_token_ids

    def given_after(self) -> list[int | None]:
        """What is given from the first open block on, None where a position is masked; empty where all of them are."""
        return []

    def standing_token_ids(self) -> list[int | None]:
        """What stands from the first open block on when the device is told of it, None where a position is masked;
        empty where all of them are."""
        return self._saved.token_ids if self.has_several_blocks else self.given_after()

    def shadow_token_ids(self) -> list[int | None]:
        """Those of the positions before the open blocks as the shadow sees them: None in place of what is given."""
        return [None] * self.prompt_len + self.output_token_ids

    @property
    def block_start(self) -> int:
        """Of the first open block; the canvas's end, where none is left."""
        return self.window[0].start if self.window else self.canvas_end

    @property
    def block_end(self) -> int:
        """Of the last open block."""
        return self.window[-1].stop if self.window else self.canvas_end

    @property
    def is_watched(self) -> bool:
        """Whether the tokens of each step are looked at, and not a finished block's alone."""
        return self.has_several_blocks or self.edits is not None or self.stream == DENOISE

    @property
    def num_masked(self) -> int:
        """Positions of the open blocks that are still to be revealed."""
        return sum(block.left for block in self.window)

    @property
    def num_predicted(self) -> int:
        """Those of them for which the next step needs a prediction."""
        return sum(map(self._predicted, self.window))

    def _predicted(self, block: OpenBlock) -> int:
        """Where only the schedule reveals any, a block in which it does not count yet needs none."""
        return block.left if block.is_active or not self._is_scheduled else 0

    def _segments(self) -> list[Segment]:
        return MODES[self.mode](self._state())

    def _state(self) -> BlockState:
        return BlockState(
            prompt_len=self.prompt_len,
            block_length=self.params.block_length,
            canvas_end=self.canvas_end,
            block_start=self.window_start,
            block_end=self.block_end,
            suffix_end=min(self.block_end + self.params.suffix_window, self.canvas_end),
            step=self.step,
            num_cached=self.num_cached,
        )

    def output_part(self, number: int) -> slice:
        """Of the first `number` positions of the open blocks those that the output has."""
        return slice(number)

    def next_step(self) -> list[tuple[int, int, bool, int]]:
        """Of each open block, as `kernels.slots.Blocks` has them: steps, counts, last_steps and masked_counts."""
        return [
            (block.step, self._must_reveal(block, i), block.is_last_step, self._predicted(block))
            for i, block in enumerate(self.window)
        ]

    def _must_reveal(self, block: OpenBlock, index: int) -> int:
        """How many positions of the block, which is the window's index-th from 0, a step reveals at least."""
        if not self._has_schedule:
            # so that there is progress: the first one is not finished
            return int(index == 0)
        return scheduled_count(block.number, block.limit, block.active_step) if block.is_active else 0

    def masked_after_step(self) -> int | None:
        """What `num_masked` will be after the next step, 0 at the block's end; None where the device is to tell."""
        if not self._is_scheduled or self.is_watched:
            return None
        return max(0, self.num_masked - self._must_reveal(self.window[0], 0))

    def advance(self, left: list[int], token_ids: list[int | None] | None = None) -> int:
        """What the step revealed and cached stands. left: of each open block the positions that are masked still.
        token_ids: of all their positions, where the result was read -> how many of these are final by it; `finish`
        them, where there are any."""
        window = after_step(self.window, left)
        if self.step == 0 or self.num_cached != self.window_start:
            # a mode asks whether a step is the first of its window, and no more
            self._plan = None
        self.step += 1
        self.denoising_steps += 1
        self.num_cached = self.window_start
        self.prompt_source = None
        if not (self.is_watched or self._leaving):
            # one block, which opens no other
            self.window = window
            return 0 if left[0] else window[0].stop - window[0].start
        final = window[: num_finished(window)]
        self._leaving = tuple((stop, steps - 1) for stop, steps in self._leaving)
        if self.edits is not None:
            self.edits, ends = self.edits.after_step(tuple(token_ids), self.params.post_steps)
            if final and not ends:
                # nothing is masked, and it stays open
                self.window = window
                self._leave()
                return 0
        stopped = self._stopped_within(token_ids) if self.has_several_blocks else 0
        if stopped or final:
            self.window = window
            return stopped or final[-1].stop - self.block_start
        self._leave()
        self.window = self._with_next(window)
        return 0

    def _stopped_within(self, token_ids: list[int | None]) -> int:
        """Up to the first stop token before which nothing is masked, itself included; 0 where there is none."""
        for i, token in enumerate(token_ids):
            if token is None or token in self.stop_token_ids:
                return 0 if token is None else i + 1
        return 0

    def _leave(self) -> None:
        """Finished blocks whose time is over are the window's no more."""
        while self._leaving and self._leaving[0][1] <= 0:
            self.window_start, self._leaving, self.step = self._leaving[0][0], self._leaving[1:], 0
            self._plan = None

    def _with_next(self, window: Window) -> Window:
        """With one more block, where there is one and enough of the last is revealed."""
        may_open = len(window) - num_finished(window) < MAX_OPEN_BLOCKS
        following = self._block_from(window[-1].stop) if may_open else None
        if following is not None and window[-1].is_revealed(self.params.block_add_threshold):
            window += (following._replace(is_active=False),)
            self._plan = None
        return activated(window, self.params.decoded_token_threshold)

    def finish(
        self,
        token_ids: list[int | None],
        number: int,
        logprobs: list[dict[int, tuple[float, int]]] | None = None,
    ) -> None:
        """The first `number` positions of the open blocks are final. token_ids: of all of these, None where one is
        masked; logprobs: likewise, where they are asked for."""
        final = [block for block in self.window if block.stop <= self.block_start + number]
        self._leaving += tuple((block.stop, self.params.commit_delay) for block in final)
        self._leave()
        window = self._with_next(self.window)[len(final) :]
        window_start = self.window_start if self._leaving or not window else window[0].start
        logprobs, part = logprobs or [], self.output_part(number)
        for i in range(min(len(logprobs), len(self._saved.token_ids))):
            # after a preemption the step that revealed it is not repeated
            logprobs[i] = logprobs[i] if self._saved.token_ids[i] is None else self._saved.logprobs[i]
        # in one statement, which Ctrl-C comes before or after
        vars(self).update(
            first_block_at=self.first_block_at or time.perf_counter(),
            logprobs=self.logprobs + logprobs[part],
            output_token_ids=self.output_token_ids + token_ids[part],
            _saved=Saved(
                *(window_start, self._leaving, window, self.denoising_steps),
                *(token_ids[number:], logprobs[number:]),
            ),
        )
        self._go_on()

    def restart_block(self) -> None:
        super().restart_block()
        self._go_on()

    def requeue(self) -> None:
        super().requeue()
        self._go_on()

    def has_all_blocks(self) -> bool:
        """Whether none is left to be finished, by what is saved: Ctrl-C may come before it goes on from there."""
        return not self._saved.window

    def stop_position(self) -> int | None:
        """Where in the output the first stop token is, if any."""
        return next((i for i, token in enumerate(self.output_token_ids) if token in self.stop_token_ids), None)

    def is_finished(self) -> bool:
        """Whether the final tokens end it: by a stop token, by a stop string that was found, or by max_tokens."""
        return self.has_all_blocks() or self.stopped_by is not None or self.stop_position() is not None
