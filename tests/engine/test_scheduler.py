"""The scheduler and the page pool under any order of arrivals, finishes, aborts and preemptions. No tensors."""

import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blockinfer import LLM, SamplingParams
from blockinfer.decoding.modes import MODES
from blockinfer.decoding.windows import MAX_OPEN_BLOCKS
from blockinfer.engine.page_pool import PagePool
from blockinfer.engine.scheduler import Scheduler
from blockinfer.engine.sequence import Sequence
from tests.checkpoints import write_checkpoint
from tests.engine.blocks import finish_block

NUM_PAGES, PAGE_SIZE, MAX_SEQS, MAX_LEN = 12, 4, 4, 40


def make(request_id, prompt_len=5, siblings=None, **options):
    params = SamplingParams(**{"max_tokens": 8, "block_length": 4, **options})
    return Sequence(request_id, None, [0] * prompt_len, params, 0, frozenset(), siblings)


class SchedulerMachine(RuleBasedStateMachine):
    """A model run that only counts: a step finishes a block now and then, and a request when its blocks are through."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES, PAGE_SIZE)
        self.scheduler = Scheduler(self.pool, MAX_SEQS, max_num_batched_tokens=MAX_LEN)
        self.alive = {}
        self.idle = {}  # steps for which a running request sat out
        self.forward = 0
        self.again = None  # the last step's entries, if the scheduler knew that they would come again
        self.written = {}  # slots of pages: by which request, and for which position

    @rule(
        prompt_len=st.integers(1, 20),
        max_tokens=st.integers(1, 20),
        block_length=st.integers(1, 9),
        mode=st.sampled_from(sorted(MODES)),
        answers=st.integers(1, 3),
    )
    def add(self, prompt_len, max_tokens, block_length, mode, answers):
        request_id = max(self.alive, default=-1) + 1 + self.forward * 1000
        self.again = None
        options = dict(siblings=[], max_tokens=max_tokens, block_length=block_length, mode=mode)
        for number in range(request_id, request_id + answers):
            self.alive[number] = make(number, prompt_len, **options)
            self.scheduler.add(self.alive[number])

    @precondition(lambda self: self.alive)
    @rule(finish=st.lists(st.booleans(), min_size=MAX_SEQS, max_size=MAX_SEQS))
    def step(self, finish):
        scheduled = self.scheduler.schedule()
        assert scheduled, "requests are there, but none runs"
        assert self.again in (None, scheduled)
        assert sum(entry.plan.rows for entry in scheduled) <= MAX_LEN
        assert all(not sequence.on_device for sequence in self.scheduler.waiting)
        self.forward += 1
        ran = {entry.sequence.request_id for entry in scheduled}
        for sequence in self.scheduler.running:
            self.idle[sequence.request_id] = 0 if sequence.request_id in ran else self.idle[sequence.request_id] + 1
            # every other running one goes at most once before it
            assert self.idle[sequence.request_id] < MAX_SEQS
        self.write_and_read(scheduled)
        for (sequence, plan), ends_block in zip(scheduled, finish, strict=False):
            assert plan.kv_len <= len(sequence.pages) * PAGE_SIZE
            sequence.on_device = True
            sequence.ran(self.forward)
            if not ends_block:
                sequence.advance([1])
            else:
                finish_block(sequence, 0)
                if sequence.is_finished():
                    self.scheduler.release(self.alive.pop(sequence.request_id))
        self.again = scheduled if self.scheduler.repeats(scheduled) else None

    def write_and_read(self, scheduled):
        """Whatever a step's queries see was written for their request, before or in this step."""
        places = [
            (sequence.pages[i // PAGE_SIZE], i % PAGE_SIZE, i, sequence.siblings[0].request_id, segment)
            for sequence, plan in scheduled
            for segment in plan.segments
            for i in range(segment.kv_len)
        ]
        for page, offset, position, request, segment in places:
            if segment.start <= position < segment.stop:
                self.written[page, offset] = request, position
        assert all(self.written.get((page, offset)) == (request, i) for page, offset, i, request, _ in places)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.alive)))
        self.again = None
        self.scheduler.release(self.alive.pop(request_id))

    @precondition(lambda self: self.alive)
    @rule()
    def the_oldest_finishes_in_bounded_time(self):
        oldest = self.alive[min(self.alive)]
        for _ in range(oldest.params.max_tokens * MAX_SEQS + MAX_SEQS):
            if oldest.request_id not in self.alive:
                return
            self.step([True] * MAX_SEQS)
        raise AssertionError("the oldest request does not get on")

    @invariant()
    def every_page_is_free_or_owned_once(self):
        owners = {}
        for sequence in self.scheduler.running:
            for i, page in enumerate(sequence.pages):
                owners.setdefault(page, []).append((sequence.siblings[0].request_id, i))
                shareable = sequence.params.mode == "block" and i < sequence.prompt_len // PAGE_SIZE
                assert len(owners[page]) == 1 or shareable
        # several only of one request, and at the same place
        assert all(len(set(held)) == 1 for held in owners.values())
        assert [len(owners.get(page, [])) for page in range(NUM_PAGES)] == self.pool._holders
        assert sorted([*owners, *self.pool._free]) == list(range(NUM_PAGES))

    @invariant()
    def every_request_waits_or_runs(self):
        queued = [*self.scheduler.waiting, *self.scheduler.running]
        assert sorted(s.request_id for s in queued) == sorted(self.alive)
        assert all(s.slot is None and not s.pages for s in self.scheduler.waiting)
        slots = [s.slot for s in self.scheduler.running]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(MAX_SEQS))
        for sequence in queued:
            self.idle.setdefault(sequence.request_id, 0)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_youngest_is_preempted_and_comes_back_first():
    pool = PagePool(6, 4)
    scheduler = Scheduler(pool, max_num_seqs=4, max_num_batched_tokens=100)
    old, young, later, fresh = (make(i, 4) for i in range(4))
    for sequence in (old, young, later, fresh):
        scheduler.add(sequence)
    scheduled = scheduler.schedule()  # 2 pages each: prompt and one block
    assert [entry.sequence for entry in scheduled] == [old, young, later]
    for entry in scheduled:
        entry.sequence.ran(1)
        entry.sequence.on_device = True
        finish_block(entry.sequence, 0)
    scheduled = scheduler.schedule()  # 3 pages each: room for two
    assert [entry.sequence for entry in scheduled] == [old, young]
    assert (later.preemptions, later.num_cached, later.pages, later.slot, later.on_device) == (1, 0, [], None, False)
    scheduler.release(old)
    scheduled = scheduler.schedule()
    assert [entry.sequence for entry in scheduled] == [young, later]
    assert scheduled[-1].plan.segments == [(0, 4, 4), (4, 8, 8), (8, 12, 12)]


def test_guided_ones_give_back_all_that_they_and_their_shadows_had():
    """One ends, one is preempted and waits."""
    pool = PagePool(11, 4)
    scheduler = Scheduler(pool, max_num_seqs=6, max_num_batched_tokens=100)
    first, second, third = (make(i, 4, cfg_scale=1.0) for i in range(3))
    for sequence in (first, second):
        scheduler.add(sequence)
    scheduled = scheduler.schedule()  # 2 pages each, and as many of the shadow
    assert [entry.plan.rows for entry in scheduled] == [16, 16] and pool.num_free == 3
    for entry in scheduled:
        entry.sequence.ran(1)
        finish_block(entry.sequence, 0)
    scheduler.add(third)
    assert [sequence for sequence, _ in scheduler.schedule()] == [first]  # 6 pages, and the second one wants 6 too
    assert (second.slot, second.shadow_slot, second.pages, second.shadow_pages) == (None, None, [], [])
    assert pool.num_free == 5
    for sequence in (first, second, third):
        scheduler.release(sequence)
    for i in range(3, 9):
        scheduler.add(make(i, 1, max_tokens=3))
    assert sorted(sequence.slot for sequence, _ in scheduler.schedule()) == list(range(6)) and pool.num_free == 5


def test_guided_answers_share_two_prompts():
    """That of the request and its shadow's: the second answer needs a page of its own for each."""
    pool = PagePool(8, 4)
    scheduler = Scheduler(pool, max_num_seqs=4, max_num_batched_tokens=100)
    first = make(0, 8, siblings=[], max_tokens=4, cfg_scale=1.0)
    second = make(1, 8, siblings=first.siblings, max_tokens=4, cfg_scale=1.0)
    for sequence in (first, second):
        scheduler.add(sequence)
    assert [sequence for sequence, _ in scheduler.schedule()] == [first, second] and pool.num_free == 0
    assert (first.pages[:2], first.shadow_pages[:2]) == (second.pages[:2], second.shadow_pages[:2])
    assert len({*first.pages, *first.shadow_pages, *second.pages, *second.shadow_pages}) == 8


def test_a_long_queue_is_aborted_from_its_back():
    """Nobody looks for a request in the queue: 40,000 took 8 s so, and take 5 ms."""
    scheduler = Scheduler(PagePool(6, 4), max_num_seqs=4, max_num_batched_tokens=100)
    sequences = [make(i, 4) for i in range(40_000)]
    for sequence in sequences:
        scheduler.add(sequence)
    start = time.perf_counter()
    for sequence in reversed(sequences[1:]):
        scheduler.release(sequence)
    assert time.perf_counter() - start < 2
    assert list(scheduler.waiting) == sequences[:1]


def test_a_page_cannot_be_freed_twice():
    pool = PagePool(2, 4)
    pages = pool.allocate(2)
    pool.share(pages[:1])
    pool.free(pages[:1])
    assert pool.num_free == 0
    pool.free(pages[:1])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(pages)


def running(scheduler, *rows):
    """Sequences in modes and lengths that have so many rows in their next step."""
    for number in rows:
        scheduler.add(make(len(scheduler.running) + len(scheduler.waiting), number - 4, mode="vanilla", max_tokens=4))
    return [entry.plan.rows for entry in scheduler.schedule()]


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([10] * 8, [10] * 8),  # whole tiles
        ([10] * 8 + [5], [10] * 8 + [5]),  # 9 sequences in 9 tiles of 10, or 8 in 8
        ([10] * 7 + [15], [10] * 7 + [15]),  # 8 in 9 tiles, or 7 in 8
        ([5] * 17, [5] * 16),
        ([10] * 7 + [5], [10] * 7 + [5]),  # too few tiles to matter
    ],
)
def test_a_step_of_many_rows_leaves_out_those_that_begin_a_tile_for_few(rows, expected):
    scheduler = Scheduler(PagePool(1000, 4), max_num_seqs=20, max_num_batched_tokens=1000, row_tile=10)
    assert running(scheduler, *rows) == expected
    # where each row costs its share, all run
    scheduler = Scheduler(PagePool(1000, 4), max_num_seqs=20, max_num_batched_tokens=1000)
    assert running(scheduler, *rows) == rows


def test_each_is_left_out_in_turn():
    scheduler = Scheduler(PagePool(1000, 4), max_num_seqs=20, max_num_batched_tokens=1000, row_tile=10)
    left_out = []
    running(scheduler, *[5] * 17)
    for forward in range(1, 18):
        scheduled = scheduler.schedule()
        ran = {entry.sequence.request_id for entry in scheduled}
        left_out += [set(range(17)) - ran]
        for sequence, _ in scheduled:
            sequence.ran(forward)
    assert all(len(out) == 1 for out in left_out) and len(set.union(*left_out)) == 17
    # those that have just come are the last in turn
    for request_id in (17, 18):
        scheduler.add(make(request_id, 1, mode="vanilla", max_tokens=4))
    ran = {entry.sequence.request_id for entry in scheduler.schedule()}
    assert len(ran) == 18 and ran >= {17, 18}


@pytest.mark.parametrize("limit, expected", [(60, [False, True, True]), (40, [False] * 3)])
def test_those_that_take_turns_do_not_come_again(limit, expected):
    """A plan's second step is the first that may be repeated."""
    scheduler = Scheduler(PagePool(100, 4), max_num_seqs=4, max_num_batched_tokens=limit)
    running(scheduler, 30, 30)
    for forward, repeats in enumerate(expected, 1):
        scheduled = scheduler.schedule()
        for sequence, _ in scheduled:
            sequence.ran(forward)
            sequence.advance([3])
        assert scheduler.repeats(scheduled) == repeats
    # one that has just come may get a slot
    scheduler.add(make(2))
    assert not scheduler.repeats(scheduled)


def test_new_ones_that_keep_coming_do_not_starve_an_old_one():
    """Only one fits into a step; each new one is done after its step."""
    scheduler = Scheduler(PagePool(100, 4), max_num_seqs=2, max_num_batched_tokens=40)
    scheduler.add(make(0, 26, mode="vanilla", max_tokens=4))
    ran = []
    for forward in range(1, 8):
        scheduler.add(make(forward, 26, mode="vanilla", max_tokens=4))
        ((sequence, _),) = scheduler.schedule()
        sequence.ran(forward)
        ran.append(sequence.request_id)
        if sequence.request_id > 0:
            scheduler.release(sequence)
    assert ran == [0, 1, 0, 2, 0, 3, 0]


def test_an_answer_waits_for_the_step_that_computes_its_prompt():
    """The first sibling's rows do not fit beside the other request's; the second's alone would."""
    scheduler = Scheduler(PagePool(100, 4), max_num_seqs=4, max_num_batched_tokens=40)
    other = make(0, 20, max_tokens=4, mode="vanilla")
    first = make(1, 20, siblings=[], mode="block")
    second = make(2, 20, siblings=first.siblings, mode="block")
    for sequence in (other, first, second):
        scheduler.add(sequence)
    for forward, expected in enumerate([[0], [1, 2], [0, 1, 2]], 1):
        scheduled = scheduler.schedule()
        assert [entry.sequence.request_id for entry in scheduled] == expected
        for entry in scheduled:
            entry.sequence.ran(forward)
            entry.sequence.advance([3])


def test_sequences_sit_out_where_more_blocks_are_open_than_a_step_takes(llm, monkeypatch):
    """One more block opens each step, and one or two tokens are revealed: so each has some five open at once."""
    options = dict(block_length=2, block_add_threshold=0.0, ignore_eos=True, unmasking="threshold", threshold=1.0)
    params = [SamplingParams(max_tokens=n, **options) for n in (60, 50, 40)]
    prompts = [[1], [2, 3], [4]]
    alone = [llm.generate(*pair, use_tqdm=False)[0] for pair in zip(prompts, params, strict=True)]
    scheduler, blocks, sat_out = llm.engine.scheduler, [], []
    schedule = scheduler.schedule

    def spy():
        scheduled = schedule()
        blocks.append(sum(entry.plan.blocks for entry in scheduled))
        sat_out.append(len(scheduled) < len(scheduler.running))
        return scheduled

    monkeypatch.setattr(scheduler, "schedule", spy)
    monkeypatch.setattr(scheduler, "max_blocks", 8)
    together = llm.generate(prompts, params, use_tqdm=False)
    assert 4 < max(blocks) <= 8 and any(sat_out)
    assert [o.outputs for o in together] == [o.outputs for o in alone]
    assert [o.metrics.nfe for o in together] == [o.metrics.nfe for o in alone]


def test_so_many_blocks_of_a_request_are_open_at_once():
    """Then the next one opens in the step that finishes one."""
    sequence = make(0, max_tokens=600, block_length=2, block_add_threshold=0.0, unmasking="threshold")
    for _ in range(200):
        sequence.advance([2] * len(sequence.window), [None] * 2 * len(sequence.window))
    assert len(sequence.window) == MAX_OPEN_BLOCKS and sequence.block_end == 5 + 2 * MAX_OPEN_BLOCKS
    token_ids = [7, 7] + [None] * 2 * (MAX_OPEN_BLOCKS - 1)
    sequence.finish(token_ids, sequence.advance([0] + [2] * (MAX_OPEN_BLOCKS - 1), token_ids))
    assert (sequence.block_start, sequence.block_end) == (5 + 2, 5 + 2 * MAX_OPEN_BLOCKS + 2)


@pytest.mark.parametrize(
    "token_ids, final",
    [([7, 9, None, 7], 2), ([7, 7, 9, None], 3), ([9, 7, 7, 7], 1), ([7, None, 9, 7], 0), ([7, 7, None, 9], 2)],
)
def test_what_is_final_of_open_blocks_ends_with_a_stop_token(token_ids, final):
    """Unless a mask is before it: then the blocks before that mask are final."""
    sequence = make(0, block_length=2, block_add_threshold=0.0, unmasking="threshold")
    sequence.stop_token_ids = frozenset({9})
    sequence.advance([2], [None, None])
    assert sequence.advance([token_ids[:2].count(None), token_ids[2:].count(None)], token_ids) == final


def test_a_step_of_one_request_takes_as_many(tmp_path):
    params = SamplingParams(max_tokens=630, block_length=3, block_add_threshold=0.0, ignore_eos=True)
    folder = write_checkpoint(tmp_path, n_layers=1, max_sequence_length=1024)
    with LLM(folder, device="cpu", dtype="float64", max_num_seqs=1) as llm:
        llm.engine.add_request([1], params)
        blocks, outputs = [], []
        while not outputs and len(blocks) < 700:
            outputs = llm.engine.step()
            blocks += [len(sequence.window) for sequence in llm.engine.scheduler.running]
    assert max(blocks) == MAX_OPEN_BLOCKS and len(outputs[0].outputs[0].token_ids) == 630
