"""Configurations side by side: nothing but the time differs from `generate`, and seconds are each lane's own."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from blockinfer import SamplingParams
from evals.runs import lanes
from evals.runs.lanes import PARTS, Lane, side_by_side

PROMPTS = [{"prompt_token_ids": [5 + i, 6, 7][: 1 + i % 3]} for i in range(7)]
MODES = [("vanilla", "low_confidence"), ("block", "threshold"), ("dual_cache", "random")]


def params(mode, rule):
    # one that confidences of random weights meet now and then
    value = {"threshold": 0.01} if rule == "threshold" else {}
    return SamplingParams(max_tokens=12, block_length=4, mode=mode, unmasking=rule, seed=1, **value)


def test_answers_and_forwards_are_those_of_generate(chat_llm):
    finished = []
    made = [Lane(chat_llm, PROMPTS, params(*mode), finished.append) for mode in MODES]
    assert side_by_side(made) == {} and len(finished) == 21
    for lane, mode in zip(made, MODES, strict=True):
        before = chat_llm.stats.forwards
        expected = chat_llm.generate(PROMPTS, params(*mode), use_tqdm=False)
        assert [o.outputs for o in lane.outputs] == [o.outputs for o in expected]
        assert [o.metrics.nfe for o in lane.outputs] == [o.metrics.nfe for o in expected]
        assert lane.round.forwards == chat_llm.stats.forwards - before
        assert len(lane.round.parts) == PARTS and lane.round.seconds == pytest.approx(sum(lane.round.parts))
    assert not chat_llm.engine.has_unfinished()


def test_a_lane_whose_last_block_is_edited_is_run_to_its_end(chat_llm):
    edited = replace(params("block", "low_confidence"), editing_threshold=0.0, max_post_steps=3, ignore_eos=True)
    made = [Lane(chat_llm, PROMPTS[:2], p, lambda output: None) for p in (edited, params(*MODES[0]))]
    assert side_by_side(made) == {}
    expected = chat_llm.generate(PROMPTS[:2], edited, use_tqdm=False)
    assert [o and o.outputs for o in made[0].outputs] == [o.outputs for o in expected]


def test_seconds_are_those_in_which_the_lane_ran(chat_llm, monkeypatch):
    """Of two that take turns, one is slow: what the other waits for it is none of its time."""
    fast, slow = (Lane(chat_llm, PROMPTS[:2], params(*MODES[0]), lambda output: None) for _ in range(2))
    step = slow._engine.step

    def slowly():
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(slow._engine, "step", slowly)
    start = time.perf_counter()
    side_by_side([fast, slow])
    wall = time.perf_counter() - start
    assert slow.round.seconds >= 0.02 * slow.round.forwards and fast.round.seconds + slow.round.seconds <= wall
    for lane in (fast, slow):
        last = lane.outputs[-1].metrics
        assert 0 <= last.queued_seconds <= last.first_block_seconds <= last.total_seconds <= lane.round.seconds
    assert max(o.metrics.total_seconds for o in fast.outputs) < 0.02 * slow.round.forwards


def test_all_are_equally_far_at_any_time(chat_llm):
    filled = []

    def look(output):
        filled.append([lane._share_filled() for lane in both])

    both = [Lane(chat_llm, PROMPTS, params("vanilla", rule), look) for rule in ("random", "low_confidence")]
    side_by_side(both)
    # one answer of seven may be through in one and not in the other
    assert len(filled) == 14 and max(abs(a - b) for a, b in filled) <= 2 / 7


def test_a_lane_that_raises_is_left_and_the_others_go_on(chat_llm, monkeypatch):
    good, bad = (Lane(chat_llm, PROMPTS, params(*MODES[0]), lambda output: None) for _ in range(2))

    def broken():
        raise FloatingPointError("broken")

    monkeypatch.setattr(bad._engine, "step", broken)
    failed = side_by_side([bad, good])
    assert list(failed) == [bad] and isinstance(failed[bad], FloatingPointError)
    assert len(good.round.parts) == PARTS and None not in good.outputs


def test_what_slows_the_machine_slows_all(monkeypatch):
    """Two lanes of which one has four times the work, on a clock that runs three times as fast in the second half."""
    now = 0.0
    monkeypatch.setattr(lanes, "time", SimpleNamespace(perf_counter=lambda: now))

    class Steps:
        def __init__(self, work):
            self.work, self.left = work, 256

        def has_unfinished(self):
            return self.left > 0

        def step(self):
            nonlocal now
            now += self.work * (1 if now < 500 else 3)
            self.left -= 1
            return []

    made = []
    for work in (1.0, 4.0):
        lane = object.__new__(Lane)
        lane._engine, lane._turns, lane._on_finish = Steps(work), [], None
        lane._share_filled = lambda engine=lane._engine: 1 - engine.left / 256
        made.append(lane)
    side_by_side(made)
    seconds = [sum(end - begin for begin, end in lane._turns) for lane in made]
    assert seconds[1] / seconds[0] == pytest.approx(4, rel=0.02) and now > 1500
