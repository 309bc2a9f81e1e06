"""Ctrl-C at any line of the engine: nothing hangs, nothing is lost, and no token changes."""

import dataclasses
import inspect
import sys
from pathlib import Path

import pytest

from blockinfer import LLM, SamplingParams, ScoringParams
from tests.checkpoints import write_checkpoint

PARAMS = SamplingParams(max_tokens=12, block_length=4, ignore_eos=True)


def interrupting(files, stop_at, functions=None):
    """A trace function that raises KeyboardInterrupt at the stop_at-th line of these files of the engine, or of these
    functions there."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        path = Path(frame.f_code.co_filename)
        if path.name not in files or "blockinfer" not in path.parts or frame.f_code.co_name == "has_unfinished":
            return None
        if functions and frame.f_code.co_name not in functions:
            return None
        lines += event == "line"
        if lines == stop_at:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    return trace


def answers(output):
    """A request's answers; log-probabilities to nine places, as a step repeated among other rows may round its sums
    differently, which depends on the CPU."""
    return [
        dataclasses.replace(
            answer,
            logprobs=answer.logprobs
            and [
                {token: dataclasses.replace(value, logprob=round(value.logprob, 9)) for token, value in each.items()}
                for each in answer.logprobs
            ],
        )
        for answer in output.outputs
    ]


def test_ctrl_c_at_any_line_leaves_an_engine_that_can_go_on(llm):
    """The interrupt comes at the n-th line that the engine executes, for n all over a run but its clean-up."""
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
    params = SamplingParams(max_tokens=4, block_length=2)
    expected = [output.outputs for output in llm.generate(prompts, params, use_tqdm=False)]
    files = {"llm.py", "engine.py", "scheduler.py", "page_pool.py", "resident.py", "sequence.py"}
    source, first_line = inspect.getsourcelines(LLM.generate)
    (clean_up,) = [first_line + i for i, line in enumerate(source) if line.strip() == "engine.abort_all()"]
    lines = 0

    def run(stop_at):
        nonlocal lines
        lines = 0

        def trace(frame, event, _):
            nonlocal lines
            if Path(frame.f_code.co_filename).name not in files:
                return None
            cleans = frame.f_code.co_name in ("abort_all", "__init__") or frame.f_lineno == clean_up
            if event == "line" and not cleans:
                lines += 1
                if lines == stop_at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            return [output.outputs for output in llm.generate(prompts, params, use_tqdm=False)]
        finally:
            sys.settrace(None)

    former = sys.gettrace()
    assert run(0) == expected
    total = lines
    assert total > 500
    try:
        for stop_at in range(40, total - 1, 7):
            with pytest.raises(KeyboardInterrupt):
                run(stop_at)
            engine = llm.engine
            assert not engine.has_unfinished() and engine.pool.num_free == engine.pool.num_pages
        assert [output.outputs for output in llm.generate(prompts, params, use_tqdm=False)] == expected
    finally:
        sys.settrace(former)


def test_ctrl_c_at_any_line_of_a_step_or_an_abort_loses_nothing(tmp_path):
    """Whoever steps by hand goes on after it. The pages are few, so that requests are preempted, too, and some have
    several blocks open."""
    page_bytes = 2 * 2 * 32 * 8 * 4
    options = dict(dtype="float64", max_num_seqs=3, page_size=4, kv_cache_memory=8 * page_bytes)
    prompts, one = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], dataclasses.replace(PARAMS, max_tokens=8)
    several = dataclasses.replace(one, block_add_threshold=0.3, decoded_token_threshold=0.3, commit_delay=1, logprobs=0)
    params = [one, several, several, one]
    files = {"engine.py", "scheduler.py", "page_pool.py", "resident.py", "sequence.py"}
    with LLM(write_checkpoint(tmp_path), device="cpu", **options) as llm:
        expected = [answers(output) for output in llm.generate(prompts, params, use_tqdm=False)]
        engine = llm.engine

        def run(stop_at):
            """-> whether there was an interrupt, at the stop_at-th line."""
            trace = interrupting(files, stop_at)
            ids = [engine.add_request(*request) for request in zip(prompts, params, strict=True)]
            dropped = engine.add_request([9, 9], one)
            outputs, interrupted, steps = {}, 0, 0
            sys.settrace(trace)
            while engine.has_unfinished():
                steps += 1
                assert steps < 100, "it hangs"
                try:
                    if dropped in engine._sequences and steps > 3:
                        engine.abort(dropped)
                    outputs |= {output.request_id: answers(output) for output in engine.step()}
                except KeyboardInterrupt:
                    interrupted += 1
            sys.settrace(None)
            assert [outputs[i] for i in ids] == expected
            assert engine.pool.num_free == engine.pool.num_pages
            return interrupted

        former = sys.gettrace()
        try:
            stop_at = 1
            while run(stop_at):
                stop_at += 61
        finally:
            sys.settrace(former)
        assert stop_at > 3000


@pytest.mark.parametrize(
    "prompt, options",
    [
        ([1, 2, 3], {}),
        ([1, 2, 3], dict(block_add_threshold=0.3, commit_delay=1, logprobs=0)),
        ({"prompt": "a{fill:4}b"}, dict(mode="vanilla")),
    ],
)
def test_ctrl_c_at_every_line_that_makes_tokens_final_loses_nothing(llm, prompt, options):
    params, engine = dataclasses.replace(PARAMS, max_tokens=4, block_length=2, **options), llm.engine
    expected = [answers(output) for output in llm.generate([prompt], params, use_tqdm=False)]
    former, stop_at, interrupted = sys.gettrace(), 0, True
    while interrupted:
        stop_at, interrupted, outputs, steps = stop_at + 1, False, [], 0
        engine.add_request(prompt, params)
        sys.settrace(interrupting({"sequence.py", "infilling.py"}, stop_at, {"finish", "_go_on"}))
        while engine.has_unfinished() and steps < 20:
            steps += 1
            try:
                outputs += [answers(output) for output in engine.step()]
            except KeyboardInterrupt:
                interrupted = True
        sys.settrace(former)
        assert not engine.has_unfinished(), f"it hangs after an interrupt at line {stop_at}"
        assert outputs == expected
    assert stop_at > 20


def test_ctrl_c_at_every_line_of_an_abort_drops_all_answers_or_none(llm):
    """Answers left without their first one are never returned: whoever steps to the end would not get there."""
    engine, other = llm.engine, dataclasses.replace(PARAMS, max_tokens=16)
    params = dataclasses.replace(PARAMS, temperature=1.0, seed=0, n=3)
    (expected,) = llm.generate([4, 5], other, use_tqdm=False)
    former, stop_at, interrupted = sys.gettrace(), 0, True
    while interrupted:
        stop_at, interrupted, outputs = stop_at + 1, False, []
        dropped, kept = engine.add_request([1, 2, 3], params), engine.add_request([4, 5], other)
        engine.step()
        sys.settrace(interrupting({"engine.py", "scheduler.py", "page_pool.py"}, stop_at))
        try:
            engine.abort(dropped)
        except KeyboardInterrupt:
            interrupted = True
        sys.settrace(former)
        engine.step()
        if dropped in engine._sequences:
            assert [dropped + i in engine._sequences for i in range(3)] == [True] * 3
            engine.abort(dropped)
        assert list(engine._sequences) == [kept], f"answers are left after an interrupt at line {stop_at}"
        while engine.has_unfinished():
            outputs += engine.step()
        assert [(output.request_id, output.outputs) for output in outputs] == [(kept, expected.outputs)]
        assert engine.pool.num_free == engine.pool.num_pages
    assert stop_at > 20


def test_ctrl_c_leaves_answers_shadows_and_scores_whole(tmp_path):
    """Several answers that share their prompt's pages, one with a shadow, and forwards not yet read."""
    sampled = dataclasses.replace(PARAMS, max_tokens=8, temperature=0.8, seed=3, n=3)
    guided = dataclasses.replace(PARAMS, max_tokens=8, cfg_scale=1.0)
    canvas, answer = [3, 1, 4, 1, 5, 9, 2, 6], range(5, 8)
    files = {"engine.py", "scheduler.py", "page_pool.py", "resident.py", "sequence.py", "scoring.py"}
    options = dict(dtype="float64", max_num_seqs=4, page_size=4)
    with LLM(write_checkpoint(tmp_path), device="cpu", **options) as llm:
        engine = llm.engine

        def run(stop_at):
            """-> the outputs, and whether there was an interrupt, at the stop_at-th line."""
            trace = interrupting(files, stop_at)
            ids = [engine.add_request(canvas, sampled), engine.add_request([5, 6], guided)]
            reads = [[(i, canvas[i])] for i in answer]
            ids.append(engine.add_scoring(canvas, answer, [(i,) for i in answer], reads, ScoringParams(mode="block")))
            outputs, interrupted = {}, False
            sys.settrace(trace)
            for _ in range(100):
                try:
                    outputs |= {output.request_id: output for output in engine.step()}
                except KeyboardInterrupt:
                    interrupted = True
                if not engine.has_unfinished():
                    break
            sys.settrace(None)
            assert engine.pool.num_free == engine.pool.num_pages and engine.pool._holders == [0] * engine.pool.num_pages
            *answers, scored = [outputs[i] for i in ids]
            return [a.outputs for a in answers], pytest.approx([v for row in scored.values for v in row]), interrupted

        former = sys.gettrace()
        try:
            *expected, _ = run(0)
            stop_at, interrupted = 1, True
            while interrupted:
                *found, interrupted = run(stop_at)
                assert found[0] == expected[0] and found[1].expected == expected[1]
                stop_at += 97
        finally:
            sys.settrace(former)
        assert stop_at > 1500


def test_a_second_ctrl_c_within_the_clean_up_of_the_first(llm):
    """The first comes while requests run, the second at each line that is executed from then on."""
    prompts = [[1, 2, 3], [4, 5], [6]]
    params = [dataclasses.replace(PARAMS, max_tokens=4 * i) for i in (1, 2, 3)]
    expected = [output.outputs for output in llm.generate(prompts, params, use_tqdm=False)]

    def run(stop_at):
        lines = 0

        def trace(frame, event, _):
            nonlocal lines
            if "blockinfer" not in frame.f_code.co_filename:
                return None
            lines += event == "line"
            if lines == stop_at:
                sys.settrace(None)
                raise KeyboardInterrupt("the second")
            return trace

        def first(output):
            frame = sys._getframe(1)
            while frame.f_code.co_name != run.__name__:
                frame.f_trace, frame = trace, frame.f_back
            sys.settrace(trace)
            raise KeyboardInterrupt("the first")

        with pytest.raises(KeyboardInterrupt) as caught:
            try:
                llm.generate(prompts, params, use_tqdm=False, on_finish=first)
            finally:
                sys.settrace(None)
        return str(caught.value)

    former, engine, seen = sys.gettrace(), llm.engine, 0
    try:
        while run(seen + 1) == "the second":
            seen += 1
            assert not engine.has_unfinished() and engine.pool.num_free == engine.pool.num_pages
            assert [output.outputs for output in llm.generate(prompts, params, use_tqdm=False)] == expected
    finally:
        sys.settrace(former)
    assert seen > 20
