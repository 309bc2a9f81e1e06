"""Requests on their way through the engine: their tokens, where they stand, what they cost. No tensors."""

import time
from collections.abc import Container
from typing import NamedTuple

from blockinfer.decoding.modes import MODES, PROMPT_ALONE, BlockState, Segment
from blockinfer.decoding.unmasking import RULES, scheduled_count
from blockinfer.engine.stops import StopMatch
from blockinfer.sampling_params import SamplingParams

# What a request may be asked to tell of before it is finished: each block that is; besides, the canvas after each step.
BLOCKS, DENOISE = "blocks", "denoise"


class Plan(NamedTuple):
    """What a step computes of a sequence: its segments, of which the last holds the block being denoised, how many rows
    they have, and the largest kv_len."""

    segments: list[Segment]
    rows: int
    kv_len: int


class Resident:
    """What the scheduler knows of one that runs: where it stands in the queue, its slot and its pages.

    request_id: its own, which no other has. siblings: those of its request, itself among them; the first one's
    request_id is the request's. guided: beside its own rows it has those of a shadow, which sees no prompt, with a slot
    and pages of its own.
    """

    mode: str
    prompt_len: int
    guided: bool
    position = 0

    def __init__(self, request_id: int, siblings: "list[Resident] | None") -> None:
        self.request_id = request_id
        self.siblings = [] if siblings is None else siblings
        self.siblings.append(self)
        self.slot: int | None = None
        self.shadow_slot: int | None = None
        self.on_device = False  # whether the slot's tokens are its own
        self.broken = False  # whether its logits were seen to be NaN or infinite
        self.pages: list[int] = []
        self.shadow_pages: list[int] = []
        self.prompt_source: Resident | None = None  # whose pages hold its prompt
        self.num_cached = 0
        self.last_run = -1
        self.last_out = 0  # the scheduler's step that it sat out last, or in which it was admitted
        self.nfe = 0
        self.preemptions = 0
        self.added_at = time.perf_counter()
        self.first_run_at: float | None = None
        self._plan: Plan | None = None

    @property
    def request(self) -> int:
        """The id of its request."""
        return self.siblings[0].request_id

    @property
    def lanes(self) -> int:
        """How many rows each of its positions has: 2 with a shadow."""
        return 2 if self.guided else 1

    def plan(self) -> Plan:
        """Of the next step."""
        if self._plan is None:
            segments = self._segments()
            rows = self.lanes * sum(stop - start for start, stop, _ in segments)
            self._plan = Plan(segments, rows, max(kv_len for _, _, kv_len in segments))
        return self._plan

    def _segments(self) -> list[Segment]:
        raise NotImplementedError

    def is_finished(self) -> bool:
        """Whether no step is left."""
        raise NotImplementedError

    def ran(self, forward: int) -> None:
        """Forward number `forward` was launched with its rows."""
        self.last_run = forward
        self.nfe += self.lanes

    def restart_block(self) -> None:
        """Back to the start of the current block, with nothing cached: a preemption took the pages."""
        self.preemptions += 1
        self.begin_with(0, None)

    def requeue(self) -> None:
        """Out of slots and pages and back to the start of the block, whatever a call that was cut short left."""
        self.preemptions += self.slot is not None
        self.slot, self.pages, self.on_device, self.broken = None, [], False, False
        self.shadow_slot, self.shadow_pages = None, []
        self.begin_with(0, None)

    def prompt_holder(self) -> "Resident | None":
        """The oldest running sibling, where it may share the prompt's pages with this one."""
        if len(self.siblings) == 1 or self.mode not in PROMPT_ALONE:
            return None
        return next((sibling for sibling in self.siblings if sibling.slot is not None), None)

    def begin_with(self, num_cached: int, source: "Resident | None") -> None:
        """So many positions of its pages hold what `source` has computed or is about to."""
        self.num_cached = num_cached
        self.prompt_source = source
        self._plan = None

    def has_prompt(self, computing: Container[int]) -> bool:
        """Whether the prompt's pages that it shares hold their K and V once these have run."""
        source = self.prompt_source
        return source is None or source.num_cached >= self.prompt_len or source.request_id in computing


class Sequence(Resident):
    """The state of a request, or of one of its answers, on the host. The tokens of the block being denoised live on the
    device, in row `slot`."""

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
        self._is_scheduled = RULES[params.unmasking].scheduled
        # tokens of finished blocks, stop tokens and what follows them included
        self.output_token_ids: list[int] = []
        self.logprobs: list[dict[int, tuple[float, int]]] = []  # of these tokens, where the request asks for them
        self.stream: str | None = None
        self.streamed_text = ""
        self.stopped_by: StopMatch | None = None
        self.num_searched = 0  # tokens that hold no stop string
        self._masked_left = 0
        self.denoising_steps = 0
        self.first_block_at: float | None = None
        self._begin_block()

    def _begin_block(self) -> None:
        # asked for many times a step, so kept
        self.block_start = self.prompt_len + len(self.output_token_ids)
        self.block_end = self._block_end()
        self._num_revealed = self._count_masked()
        self._step_limit = self.params.block_steps(self._num_revealed)
        self.step = 0
        self._plan: Plan | None = None

    def _block_end(self) -> int:
        return min(self.block_start + self.params.block_length, self.canvas_end)

    def _count_masked(self) -> int:
        """Positions of the block that it reveals."""
        return self.block_end - self.block_start

    def known_token_ids(self) -> list[int]:
        """Those of the positions before the block."""
        return self.prompt_token_ids + self.output_token_ids

    def given_after(self) -> list[int | None]:
        """What is given from the block on, None where a position is masked; empty where all of them are."""
        return []

    def shadow_token_ids(self) -> list[int | None]:
        """Those of the positions before the block as the shadow sees them: None in place of what is given."""
        return [None] * self.prompt_len + self.output_token_ids

    @property
    def position(self) -> int:
        """Of the block in the output."""
        return self.block_start - self.prompt_len

    @property
    def num_masked(self) -> int:
        """Positions of the current block that are still to be revealed."""
        return self._masked_left if self.step else self._num_revealed

    def _segments(self) -> list[Segment]:
        return MODES[self.mode](self._state())

    def _state(self) -> BlockState:
        return BlockState(
            prompt_len=self.prompt_len,
            block_length=self.params.block_length,
            canvas_end=self.canvas_end,
            block_start=self.block_start,
            block_end=self.block_end,
            step=self.step,
            num_cached=self.num_cached,
        )

    def reveal_count(self) -> int:
        """Positions that a scheduled rule reveals in the next step; a rule that is not scheduled ignores it."""
        return scheduled_count(self._num_revealed, self._step_limit or self._num_revealed, self.step)

    def is_last_step(self) -> bool:
        """Whether the step limit makes the next step reveal all that is left."""
        return self._step_limit is not None and self.step + 1 >= self._step_limit

    def masked_after_step(self) -> int | None:
        """What `num_masked` will be after the next step, 0 at the block's end; None where only the device can tell."""
        if not self._is_scheduled:
            return None
        return max(0, self.num_masked - self.reveal_count())

    def advance(self, masked_left: int) -> None:
        """What the step revealed and cached stands; so many positions of the block are left."""
        self.step += 1
        self._masked_left = masked_left
        self.num_cached = self.block_start
        self.prompt_source = None
        self._plan = None

    def finish_block(self, token_ids: list[int], logprobs: list[dict[int, tuple[float, int]]] | None = None) -> None:
        """The block's positions are all revealed, as `token_ids`; the next one begins."""
        self.first_block_at = self.first_block_at or time.perf_counter()
        self.logprobs += logprobs or []
        self.output_token_ids += token_ids
        self.denoising_steps += self.step
        self._begin_block()

    def restart_block(self) -> None:
        super().restart_block()
        self.step = 0

    def requeue(self) -> None:
        super().requeue()
        self._begin_block()

    def stop_position(self) -> int | None:
        """Where in the output the first stop token is, if any."""
        return next((i for i, token in enumerate(self.output_token_ids) if token in self.stop_token_ids), None)

    def is_finished(self) -> bool:
        """Whether the finished blocks end it: by a stop token, by a stop string that was found, or by max_tokens."""
        is_full = self.block_start >= self.canvas_end
        return is_full or self.stopped_by is not None or self.stop_position() is not None
