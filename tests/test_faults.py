"""What goes wrong while the engine runs: an error that names it, and an engine that can go on."""

import dataclasses
import re

import pytest
import torch

from blockinfer import LLM, SamplingParams, ScoringParams
from blockinfer.engine import model_runner
from tests.checkpoints import write_checkpoint

PARAMS = SamplingParams(max_tokens=12, block_length=4, ignore_eos=True)


@pytest.fixture
def break_once(llm, monkeypatch):
    """break_once(n): of the n-th forward from now on, and no other, these rows of logits get a NaN."""

    def start(number, rows=(0,)):
        logits, calls = llm.engine.model.logits, iter(range(1000))

        def broken(*args):
            out = logits(*args)
            if next(calls) == number:
                out[list(rows), 5] = torch.nan
            return out

        monkeypatch.setattr(llm.engine.model, "logits", broken)

    return start


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite(llm, monkeypatch, value):
    """In the sixth forward, the middle of a block, one row of logits is broken."""
    expected = llm.generate([1, 2, 3], PARAMS, use_tqdm=False)[0].outputs
    logits, calls = llm.engine.model.logits, iter(range(1000))

    def broken(*args):
        out = logits(*args)
        if next(calls) == 5:
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
    monkeypatch.setattr(llm.engine.model, "logits", lambda *a: logits(*a).index_fill_(1, torch.tensor(mask), torch.nan))
    assert llm.generate([1, 2, 3], PARAMS, use_tqdm=False)[0].outputs == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_forbidden_token_s_logit_still_says_that_the_model_is_broken(llm, monkeypatch, value):
    params = dataclasses.replace(PARAMS, logits_eos_inf=True)
    logits, eos = llm.engine.model.logits, torch.tensor(llm.model_config.eos_token_ids)
    monkeypatch.setattr(llm.engine.model, "logits", lambda *a: logits(*a).index_fill_(1, eos, value))
    with pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
        llm.generate([1, 2, 3], params, use_tqdm=False)


def finish(engine):
    """Steps until nothing is left, aborting what an error names -> the outputs, and the ids that were named."""
    outputs, named = [], []
    while engine.has_unfinished():
        try:
            outputs += engine.step()
        except FloatingPointError as error:
            (ids,) = re.findall(r"for request ([\d, ]+):", str(error))
            named.append([int(request_id) for request_id in ids.split(",")])
            for request_id in named[-1]:
                engine.abort(request_id)
    return outputs, named


@pytest.mark.parametrize("rule", ["low_confidence", "threshold", "random"])
@pytest.mark.parametrize("step", [0, 1, 3, 9])
def test_the_others_lose_nothing_to_a_broken_one(llm, break_once, rule, step):
    """Of three requests the first breaks in a block's first, a middle and its last step, and in its last block."""
    prompts, rules = [[1, 2, 3], [4, 5], [6, 7, 8]], ["sequential", "low_confidence", rule]
    params = [dataclasses.replace(PARAMS, unmasking=rule, seed=1) for rule in rules]
    expected = llm.generate(prompts, params, use_tqdm=False)[1:]
    before = llm.stats.forwards
    break_once(step)
    bad, *good = [llm.engine.add_request(*pair) for pair in zip(prompts, params, strict=True)]
    outputs, named = finish(llm.engine)
    assert named == [[bad]]
    assert sorted(output.request_id for output in outputs) == good
    outputs.sort(key=lambda output: output.request_id)
    assert [output.outputs for output in outputs] == [output.outputs for output in expected]
    assert [output.metrics.nfe for output in outputs] == [output.metrics.nfe for output in expected]
    assert llm.stats.forwards - before == outputs[0].metrics.nfe == 12  # where step raises it runs nothing


def test_a_broken_request_stands_still(llm, break_once):
    """One forward breaks it, in the middle of a block: nothing is revealed from then on, whatever follows."""
    break_once(1)
    engine, mask = llm.engine, llm.config.mask_token_id
    bad = engine.add_request([1, 2, 3], PARAMS)
    for _ in range(4):
        assert engine.step() == []
    (sequence,) = engine.scheduler.running
    assert (engine.runner.state.tokens[sequence.slot, 3:7] == mask).sum() == 3
    for _ in range(3):  # nothing hangs, and nothing runs
        with pytest.raises(FloatingPointError, match=f"for request {bad}:"):
            engine.step()
    assert sequence.nfe == 4
    engine.abort(bad)


def test_every_broken_request_is_named(llm, break_once):
    expected = llm.generate([4, 5], PARAMS, use_tqdm=False)[0].outputs
    break_once(1, rows=[0, -1])
    first, good, last = (llm.engine.add_request(prompt, PARAMS) for prompt in ([1, 2, 3], [4, 5], [6]))
    outputs, named = finish(llm.engine)
    assert named == [[first, last]]
    assert [(output.request_id, output.outputs) for output in outputs] == [(good, expected)]


def test_aborted_forwards_that_are_still_to_be_read_break_nothing(llm, monkeypatch):
    """A score that breaks, and is aborted for it, has forwards whose values come later, and are NaN too."""
    engine, canvas, logits = llm.engine, [1, 2, 3, 4, 5, 6], llm.engine.model.logits
    (expected,) = llm.generate([4, 5], PARAMS, use_tqdm=False)
    masked = [(i,) for i in (3, 4, 5)] * 12
    reads = [[(i, canvas[i])] for (i,) in masked]
    bad = engine.add_scoring(canvas, range(3, 6), masked, reads, ScoringParams())
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "logits", lambda *args: logits(*args) * torch.nan)
        with pytest.raises(FloatingPointError, match=f"for request {bad}:"):
            for _ in range(9):
                engine.step()
    assert engine.scheduler.waiting and engine._scores, "too few forwards to tell"
    engine.abort(bad)
    good = engine.add_request([4, 5], PARAMS)
    outputs, named = finish(engine)
    assert [(output.request_id, output.outputs) for output in outputs] == [(good, expected.outputs)] and not named


@pytest.mark.parametrize("rule, steps", [("low_confidence", 4), ("threshold", 2)])
def test_a_broken_request_is_noticed_with_the_next_result_that_is_read(llm, break_once, rule, steps):
    break_once(1)
    engine = llm.engine
    engine.add_request([1, 2, 3], PARAMS)
    engine.add_request([4, 5], dataclasses.replace(PARAMS, unmasking=rule))
    for _ in range(steps):
        assert engine.step() == []
    with pytest.raises(FloatingPointError):
        engine.step()
    engine.abort_all()


def test_an_output_of_the_step_that_finds_a_broken_one_is_not_lost(llm, break_once):
    short = dataclasses.replace(PARAMS, max_tokens=4)
    expected = llm.generate([4, 5], short, use_tqdm=False)[0].outputs
    break_once(2)
    bad, good = llm.engine.add_request([1, 2, 3], PARAMS), llm.engine.add_request([4, 5], short)
    outputs, named = finish(llm.engine)
    assert [(output.request_id, output.outputs) for output in outputs] == [(good, expected)]
    assert named == [[bad]]


def test_a_slot_is_whole_again_for_its_next_request(llm, break_once):
    """The first was aborted before anyone knew that it was broken."""
    expected = llm.generate([4, 5], PARAMS, use_tqdm=False)[0].outputs
    engine = llm.engine
    break_once(1)
    bad = engine.add_request([1, 2, 3], PARAMS)
    for _ in range(3):
        engine.step()
    (sequence,) = engine.scheduler.running
    slot = sequence.slot
    assert engine.runner.state.broken[slot] and not sequence.broken
    engine.abort(bad)
    engine.add_request([4, 5], PARAMS)
    engine.step()
    assert engine.scheduler.running[0].slot == slot
    outputs, named = finish(engine)
    assert named == [] and [output.outputs for output in outputs] == [expected]


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


@pytest.mark.parametrize("at", range(4))
def test_a_step_that_was_cut_short_before_its_results_were_noted(llm, monkeypatch, at):
    """The device has revealed what the host takes to be masked still; nobody gets another's tokens for it."""
    prompts = [[1, 2, 3], [7, 8], [9, 10, 11]]
    expected = [output.outputs for output in llm.generate(prompts, PARAMS, use_tqdm=False)]
    engine, run = llm.engine, llm.engine.runner.run
    for prompt in prompts:
        engine.add_request(prompt, PARAMS)
    calls = iter(range(1000))

    def interrupted(scheduled):
        results = run(scheduled)
        if next(calls) == at:
            raise KeyboardInterrupt
        return results

    monkeypatch.setattr(engine.runner, "run", interrupted)
    outputs, interrupts = [], 0
    while engine.has_unfinished():
        try:
            outputs += engine.step()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1 and [output.outputs for output in outputs] == expected


def test_without_memory_for_a_prediction_nothing_is_revealed(llm, monkeypatch):
    prompts, rules = [[1, 2, 3], [7, 8]], ["low_confidence", "random"]
    params = [dataclasses.replace(PARAMS, unmasking=rule, seed=1) for rule in rules]
    expected = [output.outputs for output in llm.generate(prompts, params, use_tqdm=False)]
    engine, confidence, calls = llm.engine, model_runner.token_confidence, iter(range(1000))
    for prompt, p in zip(prompts, params, strict=True):
        engine.add_request(prompt, p)

    def failing(*args):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return confidence(*args)

    monkeypatch.setattr(model_runner, "token_confidence", failing)
    engine.step()
    before = [tensor.clone() for tensor in engine.runner.state]
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    assert all(torch.equal(*pair) for pair in zip(before, engine.runner.state, strict=True))
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert [output.outputs for output in outputs] == expected


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
