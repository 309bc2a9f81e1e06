"""Requests that generate: their tokens and progress through the engine. No tensors."""

import time
from typing import NamedTuple

from blockinfer.decoding.editing import BlockEdits
from blockinfer.decoding.modes import MODES, BlockState, Segment
from blockinfer.decoding.unmasking import RULES, scheduled_count
from blockinfer.decoding.windows import MAX_OPEN_BLOCKS, OpenBlock, Window, activated, after_step, num_finished
from blockinfer.engine.resident import Resident
from blockinfer.engine.stops import StopMatch
from blockinfer.sampling_params import SamplingParams

# What a request streams: each finished block; with DENOISE also the canvas after each step.
BLOCKS, DENOISE = "blocks", "denoise"


class Saved(NamedTuple):
    """The state that a preempted sequence resumes from: as it was when its last block was finished.

    leaving: (end, steps left to stay) of each finished block still in the window. steps: denoising steps made so far.
    token_ids: of the open blocks' positions, None where masked; logprobs: likewise, if the request asks for them.
    """

    window_start: int
    leaving: tuple[tuple[int, int], ...]
    window: Window
    steps: int
    token_ids: list[int | None]
    logprobs: list[dict[int, tuple[float, int]]]


class Sequence(Resident):
    """The host's state of a request, or of one of its answers. The tokens of the open blocks live on the device, in row
    `slot`.

    window: the open blocks; the first one is not finished. window_start: the first position that each step computes:
    the start of the first open block, or of a finished one that `commit_delay` keeps.
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
        self.has_several_blocks = params.block_add_threshold < 1  # a block may open before the last one is finished
        self._is_scheduled = RULES[params.unmasking].scheduled
        self._has_schedule = RULES[params.unmasking].has_schedule
        # tokens of finished blocks, stop tokens and what follows them included
        self.output_token_ids: list[int] = []
        self.logprobs: list[dict[int, tuple[float, int]]] = []  # of the output tokens, if the request asks for them
        self.stream: str | None = None
        self.streamed_text = ""
        self.stopped_by: StopMatch | None = None
        self.num_searched = 0  # output tokens known to contain no stop string
        self.first_block_at: float | None = None
        self._begin()

    def _begin(self) -> None:
        first = self._block_from(self.prompt_len)
        self._saved = Saved(self.prompt_len, (), (first,), 0, [], [])
        self._go_on()

    def _go_on(self) -> None:
        """Restores the saved state."""
        self.window_start, self._leaving, self.window, self.denoising_steps, *_ = self._saved
        self.step = 0  # since the window's start last moved
        self.edits = BlockEdits(self.output_part(0).start or 0) if self.params.editing_threshold is not None else None
        self._plan = None

    def _block_from(self, start: int) -> OpenBlock | None:
        """The block that begins at `start`; None at the canvas's end."""
        stop = min(start + self.params.block_length, self.canvas_end)
        return self._open(start, stop, stop - start) if start < stop else None

    def _open(self, start: int, stop: int, number: int) -> OpenBlock:
        return OpenBlock(start, stop, number, number, self.params.block_steps(number))

    def known_token_ids(self) -> list[int]:
        """The tokens before the open blocks."""
        return self.prompt_token_ids + self.output_token_ids

    def given_after(self) -> list[int | None]:
        """The given tokens from the first open block on, None where masked; empty if all are masked."""
        return []

    def standing_token_ids(self) -> list[int | None]:
        """The tokens from the first open block on that `ModelRunner.start` writes, None where masked; empty if all are
        masked."""
        return self._saved.token_ids if self.has_several_blocks else self.given_after()

    def shadow_token_ids(self) -> list[int | None]:
        """The tokens before the open blocks as the shadow sees them: None for given ones."""
        return [None] * self.prompt_len + self.output_token_ids

    @property
    def block_start(self) -> int:
        """The first open block's start; the canvas's end if no block is left."""
        return self.window[0].start if self.window else self.canvas_end

    @property
    def block_end(self) -> int:
        """The last open block's end; the canvas's end if no block is left."""
        return self.window[-1].stop if self.window else self.canvas_end

    @property
    def is_watched(self) -> bool:
        """Whether the tokens are read after every step, not only when a block ends."""
        return self.has_several_blocks or self.edits is not None or self.stream == DENOISE

    @property
    def num_masked(self) -> int:
        """Masked positions of the open blocks."""
        return sum(block.left for block in self.window)

    @property
    def num_predicted(self) -> int:
        """How many of the masked positions need a prediction in the next step."""
        return sum(map(self._predicted, self.window))

    def _predicted(self, block: OpenBlock) -> int:
        """None are needed in an inactive block if the schedule alone decides."""
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
        """Which of the first `number` positions of the open blocks belong to the output."""
        return slice(number)

    def next_step(self) -> list[tuple[int, int, bool, int]]:
        """For each open block its steps, counts, last_steps and masked_counts, as in `kernels.slots.Blocks`."""
        return [
            (block.step, self._must_reveal(block, i), block.is_last_step, self._predicted(block))
            for i, block in enumerate(self.window)
        ]

    def _must_reveal(self, block: OpenBlock, index: int) -> int:
        """The fewest positions that the next step reveals in `block`. index: its place in the window."""
        if not self._has_schedule:
            # guarantees progress: the first block is not finished
            return int(index == 0)
        return scheduled_count(block.number, block.limit, block.active_step) if block.is_active else 0

    def masked_after_step(self) -> int | None:
        """`num_masked` after the next step, 0 at the block's end; None if only the device knows."""
        if not self._is_scheduled or self.is_watched:
            return None
        return max(0, self.num_masked - self._must_reveal(self.window[0], 0))

    def advance(self, left: list[int], token_ids: list[int | None] | None = None) -> int:
        """Takes over a step's result -> how many leading positions of the open blocks are now final; if any, `finish`
        them.

        left: the masked positions left in each open block. token_ids: of all their positions, if the result was read.
        """
        window = after_step(self.window, left)
        if self.step == 0 or self.num_cached != self.window_start:
            # of the step number, modes use only whether it is 0
            self._plan = None
        self.step += 1
        self.denoising_steps += 1
        self.num_cached = self.window_start
        self.prompt_source = None
        if not (self.is_watched or self._leaving):
            # one block at a time
            self.window = window
            return 0 if left[0] else window[0].stop - window[0].start
        final = window[: num_finished(window)]
        self._leaving = tuple((stop, steps - 1) for stop, steps in self._leaving)
        if self.edits is not None:
            self.edits, ends = self.edits.after_step(tuple(token_ids), self.params.post_steps)
            if final and not ends:
                # no masks left, but editing goes on
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
        """Length up to and including the first stop token, if nothing before it is masked; else 0."""
        for i, token in enumerate(token_ids):
            if token is None or token in self.stop_token_ids:
                return 0 if token is None else i + 1
        return 0

    def _leave(self) -> None:
        """Removes finished blocks from the window once their delay is over."""
        while self._leaving and self._leaving[0][1] <= 0:
            self.window_start, self._leaving, self.step = self._leaving[0][0], self._leaving[1:], 0
            self._plan = None

    def _with_next(self, window: Window) -> Window:
        """Adds the next block, if there is one and enough of the last one is revealed."""
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
        """Makes the first `number` positions of the open blocks final. token_ids: of all their positions, None where
        masked; logprobs: likewise, if the request asks for them."""
        final = [block for block in self.window if block.stop <= self.block_start + number]
        self._leaving += tuple((block.stop, self.params.commit_delay) for block in final)
        self._leave()
        window = self._with_next(self.window)[len(final) :]
        window_start = self.window_start if self._leaving or not window else window[0].start
        logprobs, part = logprobs or [], self.output_part(number)
        for i in range(min(len(logprobs), len(self._saved.token_ids))):
            # revealed before a preemption: that step is not repeated
            logprobs[i] = logprobs[i] if self._saved.token_ids[i] is None else self._saved.logprobs[i]
        # one statement, so Ctrl-C comes before or after it
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
        """Whether no block is left, judged by the saved state: Ctrl-C may come before `_go_on`."""
        return not self._saved.window

    def stop_position(self) -> int | None:
        """The index of the first stop token in the output, if any."""
        return next((i for i, token in enumerate(self.output_token_ids) if token in self.stop_token_ids), None)

    def is_finished(self) -> bool:
        """Whether the final tokens end it: by a stop token, a stop string or max_tokens."""
        return self.has_all_blocks() or self.stopped_by is not None or self.stop_position() is not None
