"""Decides which sequences run in the next step, and preempts them. Plain Python, no tensors."""

import math
from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple

from blockinfer.engine.page_pool import PagePool
from blockinfer.engine.resident import Plan, Resident

# From this many tiles of rows on, matrix products dominate a step's time (measured on an H200).
_MANY_TILES = 8


class ScheduledSequence(NamedTuple):
    sequence: Resident
    plan: Plan


class Scheduler:
    """First come, first served. A running sequence owns a slot and the pages that its next step needs; it may share
    full pages of the prompt with its siblings.

    Pages are allocated as blocks need them. When they run out, the youngest running sequence is preempted: it gives up
    its pages, returns to the head of the queue and restarts its current block. So the oldest one always progresses.
    """

    def __init__(
        self,
        pool: PagePool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        row_tile: int = 1,
        alone: bool = False,
        max_blocks: int | None = None,
    ) -> None:
        """row_tile: rows per tile, which cost as much as one row; 1 if each row costs its share. alone: run one request
        at a time, whatever the limits allow. max_blocks: open blocks in a step; None for no limit."""
        self.pool = pool
        self.alone = alone
        self.max_num_batched_tokens = max_num_batched_tokens
        self.row_tile = row_tile
        self.max_blocks = max_blocks or math.inf
        # by id, so that an abort needs no search
        self._waiting: OrderedDict[int, Resident] = OrderedDict()
        self.running: list[Resident] = []  # oldest first
        self._free_slots = list(range(max_num_seqs))[::-1]
        self._steps = 0

    @property
    def waiting(self) -> Collection[Resident]:
        """In the order in which they will run."""
        return self._waiting.values()

    def add(self, sequence: Resident) -> None:
        self._waiting[sequence.request_id] = sequence

    def schedule(self) -> list[ScheduledSequence]:
        """The next step's sequences, in the order they were added.

        If the rows exceed max_num_batched_tokens, or the open blocks max_blocks, the least recently run sequences go
        first.
        """
        self._steps += 1
        self._grow()
        self._admit()
        scheduled, rows, blocks = [], 0, 0
        for sequence in sorted(self.running, key=lambda s: (s.last_run, s.request_id)):
            entry = ScheduledSequence(sequence, sequence.plan())
            rows_with_it = rows + entry.plan.rows
            if rows_with_it <= self.max_num_batched_tokens and blocks + entry.plan.blocks <= self.max_blocks:
                scheduled.append(entry)
                rows, blocks = rows_with_it, blocks + entry.plan.blocks
        scheduled = _with_their_prompts(self._in_whole_tiles(scheduled))
        scheduled.sort(key=lambda entry: entry.sequence.request_id)
        return scheduled

    def repeats(self, scheduled: list[ScheduledSequence]) -> bool:
        """Whether `schedule` is known to return its last result again: all run, no slot is free for one that waits, and
        no plan has changed."""
        first = next(iter(self._waiting.values()), None)
        if first is not None and first.lanes <= len(self._free_slots):
            return False
        if [sequence for sequence, _ in scheduled] != self.running:
            return False
        return all(sequence.still_plans(plan) for sequence, plan in scheduled)

    def _in_whole_tiles(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """Leaves out a few sequences if that runs more sequences per tile of rows; they take turns, so that none falls
        behind.

        Otherwise a commit's 32 rows would make a step of 1,024 rows as slow as one of 1,152.
        """
        rows = sum(entry.plan.rows for entry in scheduled)
        whole = rows // self.row_tile
        if self.row_tile == 1 or rows % self.row_tile == 0 or whole < _MANY_TILES:
            return scheduled
        in_turn = sorted(scheduled, key=lambda entry: (entry.sequence.last_out, -entry.sequence.request_id))
        number = 0
        while rows > whole * self.row_tile:
            rows -= in_turn[number].plan.rows
            number += 1
        if (len(scheduled) - number) * (whole + 1) <= len(scheduled) * whole:
            return scheduled
        for sequence, _ in in_turn[:number]:
            sequence.last_out = self._steps
        return in_turn[number:]

    def release(self, sequence: Resident) -> None:
        """Removes a running or waiting sequence, if it is still there, and frees its pages and slots."""
        if sequence.slot is None:
            self._waiting.pop(sequence.request_id, None)
        else:
            self._stop_running(sequence)

    def _grow(self) -> None:
        """Allocates pages for the running sequences' next steps, oldest first, preempting the youngest."""
        for sequence in list(self.running):
            shortage = sequence.lanes * self._shortage(sequence)
            while sequence.slot is not None and shortage > self.pool.num_free:
                self._preempt(self.running[-1])
            if sequence.slot is not None and shortage:
                self._extend(sequence)

    def _admit(self) -> None:
        """Admits sequences from the head of the queue, as slots and pages allow."""
        admitted = []
        for sequence in self._waiting.values():
            if self.alone and any(other.request != sequence.request for other in self.running + admitted):
                break
            holder = sequence.prompt_holder()
            # a page that the prompt fills only in part also holds the answer, so it is not shared
            shared = sequence.prompt_len // self.pool.page_size if holder else 0
            shortage = sequence.lanes * (self._shortage(sequence) - shared)
            if len(self._free_slots) < sequence.lanes or shortage > self.pool.num_free:
                break
            if shared:
                self._share(sequence, holder, shared)
            self._extend(sequence)
            sequence.slot = self._free_slots.pop()
            sequence.shadow_slot = self._free_slots.pop() if sequence.guided else None
            sequence.last_out = self._steps
            # after those already running, so that a stream of new sequences does not starve an old one
            sequence.last_run = max((other.last_run for other in self.running), default=-1)
            admitted.append(sequence)
        for sequence in admitted:
            del self._waiting[sequence.request_id]
        self.running = sorted(self.running + admitted, key=lambda s: s.request_id)

    def _share(self, sequence: Resident, holder: Resident, count: int) -> None:
        for name in ("pages", "shadow_pages"):
            pages = getattr(holder, name)[:count]
            self.pool.share(pages)
            setattr(sequence, name, pages)
        sequence.begin_with(count * self.pool.page_size, holder)

    def _extend(self, sequence: Resident) -> None:
        """Allocates the pages that its next step needs; the caller must check that as many are free."""
        shortage = self._shortage(sequence)
        sequence.pages = sequence.pages + self.pool.allocate(shortage)
        if sequence.guided:
            sequence.shadow_pages = sequence.shadow_pages + self.pool.allocate(shortage)

    def _shortage(self, sequence: Resident) -> int:
        """Pages that the sequence's next step needs beyond those it has; its shadow lacks as many."""
        return max(0, self.pool.pages_for(sequence.plan().kv_len) - len(sequence.pages))

    def _preempt(self, sequence: Resident) -> None:
        self._stop_running(sequence)
        sequence.restart_block()
        self._waiting[sequence.request_id] = sequence
        self._waiting.move_to_end(sequence.request_id, last=False)

    def _stop_running(self, sequence: Resident) -> None:
        self.running.remove(sequence)
        self.pool.free(sequence.pages + sequence.shadow_pages)
        sequence.pages, sequence.shadow_pages = [], []
        self._free_slots += [sequence.slot] if sequence.shadow_slot is None else [sequence.shadow_slot, sequence.slot]
        sequence.slot = sequence.shadow_slot = None
        sequence.on_device = False


def _with_their_prompts(scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
    """Leaves out sequences whose shared prompt pages are neither computed nor computed in this step.

    The same step is early enough: in each layer K and V are written before any attention reads them. A sequence that
    shares a sibling's pages is younger, so it is preempted first.
    """
    if all(sequence.prompt_source is None for sequence, _ in scheduled):
        return scheduled
    computing = {sequence.request_id for sequence, _ in scheduled}
    return [entry for entry in scheduled if entry.sequence.has_prompt(computing)]
