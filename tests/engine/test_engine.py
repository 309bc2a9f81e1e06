"""The whole engine under any order of arrivals, steps and aborts, with too few pages: a hypothesis state machine."""

import functools
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from blockinfer import LLM, SamplingParams
from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from tests.checkpoints import write_checkpoint

CATALOGUE = 90


@functools.cache
def request(index):
    """Request `index` of a fixed catalogue that covers every mode with every rule three times."""
    draw = random.Random(index)
    mode, unmasking = sorted(MODES)[index % 5], sorted(RULES)[index // 5 % 6]
    params = SamplingParams(
        mode=mode,
        unmasking=unmasking,
        max_tokens=draw.randint(1, 36),
        block_length=draw.choice([1, 4, 7, 32]),
        denoising_steps=draw.choice([None, None, 2, 9]),
        temperature=draw.choice([0.0, 0.9]),
        seed=draw.randrange(2**64),
        stop_token_ids=draw.sample(range(50), 5),
    )
    return [draw.randrange(55) for _ in range(draw.randint(1, 12))], params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("small"), n_layers=2, d_model=16, mlp_hidden_size=24)


@pytest.fixture(scope="module")
def alone(folder):
    """The outputs of a solitary run, request by request."""
    with LLM(folder, device="cpu", dtype="float64") as llm:
        return [llm.generate(*request(i), use_tqdm=False)[0] for i in range(CATALOGUE)]


def test_any_order_of_events(folder, alone):
    page_bytes = 2 * 2 * 16 * 8 * 5
    # 14 pages of 5 tokens, where six requests want up to 10 each
    options = dict(max_model_len=50, max_num_batched_tokens=100, max_num_seqs=6, page_size=5)
    llm = LLM(folder, device="cpu", dtype="float64", kv_cache_memory=14 * page_bytes, **options)
    engine = llm.engine
    assert engine.pool.num_pages == 14
    counts = {"steps": 0, "finished": 0, "preemptions": 0, "aborted": 0}

    class Machine(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            engine.abort_all()
            self.alive = {}

        @rule(indices=st.lists(st.integers(0, CATALOGUE - 1), min_size=1, max_size=5))
        def add(self, indices):
            for index in indices:
                self.alive[engine.add_request(*request(index))] = index

        @rule(number=st.integers(1, 40))
        def step(self, number):
            for _ in range(number):
                before, busy = llm.stats.forwards, bool(self.alive)
                for output in engine.step():
                    expected = alone[self.alive.pop(output.request_id)]
                    assert output.outputs == expected.outputs
                    assert output.metrics.denoising_steps == expected.metrics.denoising_steps
                    assert output.metrics.nfe >= expected.metrics.nfe
                    assert output.metrics.preemptions or output.metrics.nfe == expected.metrics.nfe
                    counts["finished"] += 1
                    counts["preemptions"] += output.metrics.preemptions
                assert llm.stats.forwards == before + busy
                counts["steps"] += busy
                self.every_page_is_free_or_owned_once()

        @precondition(lambda self: self.alive)
        @rule(data=st.data())
        def abort(self, data):
            request_id = data.draw(st.sampled_from(sorted(self.alive)))
            engine.abort(request_id)
            del self.alive[request_id]
            counts["aborted"] += 1

        @invariant()
        def every_page_is_free_or_owned_once(self):
            owned = [page for sequence in engine.scheduler.running for page in sequence.pages]
            assert sorted(owned + engine.pool._free) == list(range(14))

        @invariant()
        def no_request_is_lost(self):
            queued = [*engine.scheduler.waiting, *engine.scheduler.running]
            assert sorted(sequence.request_id for sequence in queued) == sorted(self.alive)
            assert engine.has_unfinished() == bool(self.alive)

        def teardown(self):
            for _ in range(10_000):
                if not self.alive:
                    break
                self.step(1)
            assert not self.alive, "requests hang"
            assert engine.pool.num_free == 14

    options = dict(max_examples=30, stateful_step_count=30, deadline=None, derandomize=True)
    run_state_machine_as_test(Machine, settings=settings(**options))
    assert counts["steps"] > 2000 and counts["finished"] > 100, counts
    assert counts["preemptions"] > 20 and counts["aborted"] > 20, counts
    llm.close()
