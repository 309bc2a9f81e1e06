"""What the scheduler knows of a request, whatever it asks for. No tensors."""

import time
from collections.abc import Container
from typing import NamedTuple

from blockinfer.decoding.modes import PROMPT_ALONE, Segment
from blockinfer.decoding.windows import Window


class Plan(NamedTuple):
    """What a step computes of a sequence: its segments, of which the last holds the open blocks, how many rows they
    have, and the largest kv_len; and how many blocks are open, from position `block_start` on."""

    segments: list[Segment]
    rows: int
    kv_len: int
    blocks: int
    block_start: int


class Resident:
    """What the scheduler knows of one that runs: where it stands in the queue, its slot and its pages.

    request_id: its own, which no other has. siblings: those of its request, itself among them; the first one's
    request_id is the request's. guided: beside its own rows it has those of a shadow, which sees no prompt, with a slot
    and pages of its own.
    """

    mode: str
    prompt_len: int
    guided: bool
    block_start = 0
    window: Window = ()

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
            kv_len = max(kv_len for _, _, kv_len in segments)
            self._plan = Plan(segments, rows, kv_len, len(self.window), self.block_start)
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
        """Back to where its last block was finished, with nothing cached: a preemption took the pages."""
        self.preemptions += 1
        self.begin_with(0, None)

    def requeue(self) -> None:
        """Out of slots and pages and back to where its last block was finished, whatever an interrupted call left."""
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
