"""What goes wrong while the engine runs: an error that names it, and an engine that can go on."""

import dataclasses
import inspect
import sys
from pathlib import Path

import pytest
import torch

from blockinfer import LLM, SamplingParams
from tests.checkpoints import write_checkpoint

PARAMS = SamplingParams(max_tokens=12, block_length=4, ignore_eos=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite(llm, monkeypatch, value):
    """From the fifth forward on, one row of logits is broken."""
    expected = llm.generate([1, 2, 3], PARAMS, use_tqdm=False)[0].outputs
    logits, calls = llm.engine.model.logits, iter(range(1000))

    def broken(hidden):
        out = logits(hidden)
        if next(calls) >= 4:
            out[0] = value
        return out

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.model, "logits", broken)
        with pytest.raises(FloatingPointError, match=r"logits are NaN or infinite for request \d+: .*wider dtype"):
            llm.generate([[1, 2, 3], [4, 5]], PARAMS, use_tqdm=False)
    assert llm.generate([1, 2, 3], PARAMS, use_tqdm=False)[0].outputs == expected


def test_the_mask_token_s_logit_may_be_anything(llm, monkeypatch):
    expected = llm.generate([1, 2, 3], PARAMS, use_tqdm=False)[0].outputs
    logits, mask = llm.engine.model.logits, llm.config.mask_token_id
    monkeypatch.setattr(llm.engine.model, "logits", lambda h: logits(h).index_fill_(1, torch.tensor(mask), torch.nan))
    assert llm.generate([1, 2, 3], PARAMS, use_tqdm=False)[0].outputs == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_forbidden_token_s_logit_still_says_that_the_model_is_broken(llm, monkeypatch, value):
    params = dataclasses.replace(PARAMS, logits_eos_inf=True)
    logits, eos = llm.engine.model.logits, torch.tensor(llm.model_config.eos_token_ids)
    monkeypatch.setattr(llm.engine.model, "logits", lambda h: logits(h).index_fill_(1, eos, value))
    with pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
        llm.generate([1, 2, 3], params, use_tqdm=False)


def test_the_other_requests_go_on_once_the_broken_one_is_aborted(llm, monkeypatch):
    expected = llm.generate([4, 5], PARAMS, use_tqdm=False)[0].outputs
    engine = llm.engine
    bad, good = engine.add_request([1, 2, 3], PARAMS), engine.add_request([4, 5], PARAMS)
    logits = engine.model.logits

    def broken(hidden):
        out = logits(hidden)
        if len(engine.scheduler.running) == 2:
            out[0, 5] = torch.nan
        return out

    monkeypatch.setattr(engine.model, "logits", broken)
    for _ in range(3):  # nothing hangs, and nothing moves
        with pytest.raises(FloatingPointError, match=f"for request {bad}:"):
            engine.step()
    engine.abort(bad)
    finished = []
    while engine.has_unfinished():
        finished += engine.step()
    assert [output.request_id for output in finished] == [good]
    assert [output.outputs for output in finished] == [expected]


def test_forwards_that_fail_are_counted(llm, monkeypatch):
    logits, calls = llm.engine.model.logits, iter(range(1000))
    monkeypatch.setattr(llm.engine.model, "logits", lambda h: logits(h) * (torch.nan if next(calls) == 2 else 1))
    before = llm.stats.forwards
    llm.engine.add_request([1, 2, 3], PARAMS)
    for _ in range(2):
        assert llm.engine.step() == []
    with pytest.raises(FloatingPointError):
        llm.engine.step()
    finished = []
    while llm.engine.has_unfinished():
        finished += llm.engine.step()
    assert finished[0].metrics.nfe == llm.stats.forwards - before == 13
    assert finished[0].metrics.denoising_steps == 12


def test_a_request_that_could_not_be_started_is_started_later(llm, monkeypatch):
    """Nothing of the slot's former request is taken for it."""
    prompts = [[1, 2, 3], [7, 8], [9, 10, 11]]
    expected = [output.outputs for output in llm.generate(prompts, PARAMS, use_tqdm=False)]
    engine, start = llm.engine, llm.engine.runner.start
    llm.generate([[20, 21, 22, 23]] * 3, PARAMS, use_tqdm=False)
    for prompt in prompts:
        engine.add_request(prompt, PARAMS)
    calls = iter(range(1000))

    def failing(sequence):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        start(sequence)

    monkeypatch.setattr(engine.runner, "start", failing)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    finished = []
    while engine.has_unfinished():
        finished += engine.step()
    assert [output.outputs for output in finished] == expected


def test_ctrl_c_at_any_line_leaves_an_engine_that_can_go_on(llm):
    """The interrupt comes at the n-th line that the engine executes, for n all over a run but its clean-up."""
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
    params = SamplingParams(max_tokens=4, block_length=2)
    expected = [output.outputs for output in llm.generate(prompts, params, use_tqdm=False)]
    files = {"llm.py", "engine.py", "scheduler.py", "page_pool.py", "sequence.py"}
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


def test_an_abort_from_on_finish_is_reported(llm):
    ids, finished = [], []

    def on_finish(output):
        finished.append(output)
        for request_id in [i for i in list(llm.engine._sequences) if i != output.request_id]:
            ids.append(request_id)
            llm.engine.abort(request_id)

    params = [SamplingParams(max_tokens=2), SamplingParams(max_tokens=40), SamplingParams(max_tokens=40)]
    with pytest.raises(RuntimeError, match=r"prompts \[1, 2\] were aborted, so their outputs are missing"):
        llm.generate([[1], [2], [3]], params, use_tqdm=False, on_finish=on_finish)
    assert len(ids) == 2 and len(finished) == 1


def test_float16_that_overflows(tmp_path):
    folder = write_checkpoint(tmp_path, scale=8e4)
    with LLM(folder, device="cpu", dtype="float16") as llm:
        with pytest.raises(FloatingPointError, match="overflow torch.float16"):
            llm.generate([1, 2, 3], PARAMS, use_tqdm=False)
        assert not llm.engine.has_unfinished()
    with LLM(folder, device="cpu", dtype="float32") as llm:
        assert llm.generate([1, 2, 3], PARAMS, use_tqdm=False)
