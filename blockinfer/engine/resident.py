"""What the scheduler knows of a request, of any kind. No tensors."""

import time
from collections.abc import Container
from typing import NamedTuple

from blockinfer.decoding.modes import PROMPT_ALONE, Segment
from blockinfer.decoding.windows import Window


class Plan(NamedTuple):
    """What a step computes for a sequence: its segments (the last contains the open blocks), the number of rows, the
    largest kv_len, the number of open blocks, and their first position, `block_start`."""

    segments: list[Segment]
    rows: int
    kv_len: int
    blocks: int
    block_start: int


class Resident:
    """A sequence as the scheduler sees it: its place in the queue, slot and pages.

    request_id: unique to the sequence. siblings: all sequences of the same request, including this one; the first one's
    request_id is the request's. guided: it also has a shadow, which does not see the prompt and has its own rows, slot
    and pages.
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
        self.on_device = False  # whether its tokens are written to the slot
        self.broken = False  # whether its logits were seen to be NaN or infinite
        self.pages: list[int] = []
        self.shadow_pages: list[int] = []
        self.prompt_source: Resident | None = None  # the sibling whose prompt pages it shares
        self.num_cached = 0
        self.last_run = -1
        self.last_out = 0  # the scheduler's step that it last sat out or was admitted in
        self.nfe = 0
        self.preemptions = 0
        self.added_at = time.perf_counter()
        self.first_run_at: float | None = None
        self._plan: Plan | None = None

    @property
    def request(self) -> int:
        """The request's id."""
        return self.siblings[0].request_id

    @property
    def lanes(self) -> int:
        """Rows per position: 2 with a shadow, else 1."""
        return 2 if self.guided else 1

    def plan(self) -> Plan:
        """The next step."""
        if self._plan is None:
            segments = self._segments()
            rows = self.lanes * sum(stop - start for start, stop, _ in segments)
            kv_len = max(kv_len for _, _, kv_len in segments)
            self._plan = Plan(segments, rows, kv_len, len(self.window), self.block_start)
        return self._plan

    def still_plans(self, plan: Plan) -> bool:
        """Whether the next step is this plan, made for the last one, again."""
        return self._plan is plan

    def _segments(self) -> list[Segment]:
        raise NotImplementedError

    def is_finished(self) -> bool:
        """Whether no step is left."""
        raise NotImplementedError

    def ran(self, forward: int) -> None:
        """Records that forward number `forward` was launched with its rows."""
        self.last_run = forward
        self.nfe += self.lanes

    def restart_block(self) -> None:
        """Returns to the end of its last finished block with nothing cached, after a preemption took its pages."""
        self.preemptions += 1
        self.begin_with(0, None)

    def requeue(self) -> None:
        """Gives up slots and pages and returns to the end of its last finished block, whatever an interrupted call
        left."""
        self.preemptions += self.slot is not None
        self.slot, self.pages, self.on_device = None, [], False
        self.shadow_slot, self.shadow_pages = None, []
        self.begin_with(0, None)

    def prompt_holder(self) -> "Resident | None":
        """The oldest running sibling, if the mode allows sharing the prompt's pages with it."""
        if len(self.siblings) == 1 or self.mode not in PROMPT_ALONE:
            return None
        return next((sibling for sibling in self.siblings if sibling.slot is not None), None)

    def begin_with(self, num_cached: int, source: "Resident | None") -> None:
        """The first num_cached positions of its pages hold what `source` has computed or is about to."""
        self.num_cached = num_cached
        self.prompt_source = source
        self._plan = None

    def has_prompt(self, computing: Container[int]) -> bool:
        """Whether the shared prompt pages hold their K and V once the sequences in `computing` have run."""
        source = self.prompt_source
        return source is None or source.num_cached >= self.prompt_len or source.request_id in computing
