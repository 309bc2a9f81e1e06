"""The host reads a step's result only where it must, and runs ahead of the device everywhere else."""

import random

import pytest
import torch

from blockinfer import LLM, SamplingParams
from blockinfer.decoding.unmasking import RULES
from blockinfer.engine import model_runner
from blockinfer.engine.scheduler import ScheduledSequence
from tests import test_equivalence as equivalence
from tests.checkpoints import write_checkpoint, write_tokenizer

# so few pages that requests are preempted
OPTIONS = dict(device="cpu", dtype="float64", max_num_seqs=8, page_size=4, kv_cache_memory=28 * 2 * 2 * 4 * 48 * 8)

SCHEDULED = [name for name, rule in RULES.items() if rule.scheduled]
OTHERS = [name for name, rule in RULES.items() if not rule.scheduled]


@pytest.fixture
def reads(llm, monkeypatch):
    """The numbers of the forwards whose results were read, from 1."""
    runner, before, numbers = llm.engine.runner, llm.stats.forwards, []
    read = runner._read
    monkeypatch.setattr(runner, "_read", lambda s: numbers.append(runner.stats.forwards - before) or read(s))
    return numbers


def params(rule, **options):
    return SamplingParams(**dict(max_tokens=10, block_length=4, unmasking=rule, ignore_eos=True) | options)


@pytest.mark.parametrize("rule", SCHEDULED)
def test_a_schedule_is_read_once_a_block(llm, reads, rule):
    llm.generate([[1], [2, 3], [4, 5, 6]], params(rule), use_tqdm=False)
    assert reads == [4, 8, 10]


def test_a_schedule_of_fewer_steps_is_read_once_a_block(llm, reads):
    llm.generate([[1], [2, 3]], params("low_confidence", denoising_steps=3), use_tqdm=False)
    assert reads == [3, 6, 8]


@pytest.mark.parametrize("rule", OTHERS)
def test_a_rule_without_a_schedule_is_read_every_step(llm, reads, rule):
    outputs = llm.generate([[1], [2, 3]], params(rule), use_tqdm=False)
    assert reads == list(range(1, max(output.metrics.nfe for output in outputs) + 1))


@pytest.mark.parametrize("at", [0, 1])
def test_ctrl_c_while_inputs_are_written_leaves_no_other_step_s(llm, monkeypatch, at):
    """A step of one request is cut off once its inputs are there, or the columns of its step; the next step of both is
    not taken to have them."""
    prompts, options = [[1, 2], [3, 4, 5]], params("low_confidence")
    expected = llm.generate(prompts, options, use_tqdm=False)
    engine = llm.engine
    first, _ = (engine._sequences[engine.add_request(prompt, options)] for prompt in prompts)
    for _ in range(2):
        engine.step()
    write, calls = model_runner.write, iter(range(1000))

    def interrupted(target, values):
        write(target, values)
        if next(calls) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model_runner, "write", interrupted)
        engine.runner.run([ScheduledSequence(first, first.plan())])
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]


def test_every_request_s_block_ends_with_a_read(llm, reads):
    """The second comes a step later."""
    llm.engine.add_request([1], params("low_confidence"))
    llm.engine.step()
    llm.engine.add_request([2, 3], params("sequential", max_tokens=8))
    while llm.engine.has_unfinished():
        llm.engine.step()
    assert reads == [4, 5, 8, 9, 10]


@pytest.fixture
def repeats(llm, monkeypatch):
    """How many sequences each step had that began before the last one was evaluated, as on a GPU."""
    runner, numbers = llm.engine.runner, []
    repeat = runner.repeat
    monkeypatch.setattr(runner, "is_asynchronous", True)
    monkeypatch.setattr(runner, "repeat", lambda scheduled: numbers.append(len(scheduled)) or repeat(scheduled))
    return numbers


def test_the_same_batch_begins_its_next_step_at_once(llm, repeats):
    """From a block's second step, whose plan has no prompt or commit, to its last but one."""
    llm.generate([[1], [2, 3]], params("threshold", threshold=0.999, max_tokens=8), use_tqdm=False)
    assert set(repeats) == {2}
    steps = llm.engine.runner.stats.forwards
    llm.generate([[1], [2, 3]], params("low_confidence", max_tokens=8), use_tqdm=False)
    assert llm.engine.runner.stats.forwards - steps == 8 and repeats[-4:] == [2] * 4
    del repeats[:]
    llm.generate([1, 2], params("low_confidence", max_tokens=3, denoising_steps=1), use_tqdm=False)
    assert not repeats


def counted(function, calls, what):
    """The function, whose calls are noted in a list as `what`."""
    return lambda *args: calls.append(what) or function(*args)


def test_what_begins_early_changes_nothing(tmp_path, monkeypatch):
    """In all modes and rules, with windows, edits and shadows, and so few pages that requests are preempted."""
    folder = write_checkpoint(tmp_path)
    write_tokenizer(folder)
    draw = random.Random(0)
    kinds = [(mode, rule, index) for mode in equivalence.MODES for rule in equivalence.RULES for index in (1, 2)]
    cases = [equivalence.draw_case(draw, "dense", *kind) for kind in kinds]
    made, begun = [], []
    for is_asynchronous in (False, True):
        with LLM(folder, **OPTIONS) as llm:
            runner = llm.engine.runner
            monkeypatch.setattr(runner, "is_asynchronous", is_asynchronous)
            monkeypatch.setattr(runner, "repeat", counted(runner.repeat, begun, is_asynchronous))
            outputs = equivalence.run(llm, cases)
            outputs += [output for i in range(0, len(cases), 4) for output in equivalence.run(llm, cases[i : i + 4])]
            made.append([(o.outputs[0].token_ids, o.outputs[0].logprobs, o.metrics.nfe) for o in outputs])
            assert any(o.metrics.preemptions for o in outputs)
    assert made[0] == made[1] and len(begun) > 50 and all(begun)


@pytest.mark.parametrize("rule", ["low_confidence", "threshold"])
def test_requests_that_come_and_go_while_a_step_has_begun(llm, repeats, rule):
    options = params(rule, max_tokens=20, block_length=10)
    prompts = [[1], [2, 3], [4, 5, 6]]
    alone = [llm.generate(prompt, options, use_tqdm=False)[0] for prompt in prompts]
    engine = llm.engine
    ids = [engine.add_request(prompt, options) for prompt in prompts[:2]]
    while len(repeats) < 4 or not engine.runner.begun:
        engine.step()
    ids.append(engine.add_request(prompts[2], options))
    for _ in range(2):
        # it joins the step after the one that has begun
        assert engine._sequences[ids[2]].nfe == 0
        engine.step()
    assert engine._sequences[ids[2]].nfe == 1
    engine.abort(ids[0])
    outputs = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
    for i in (1, 2):
        output = outputs[ids[i]]
        assert output.outputs[0].token_ids == alone[i].outputs[0].token_ids
        assert output.metrics.nfe == alone[i].metrics.nfe


def test_ctrl_c_while_the_next_step_begins(llm, repeats, monkeypatch):
    options = params("threshold", threshold=0.999, max_tokens=8)
    (expected,) = llm.generate([1, 2], options, use_tqdm=False)
    engine, repeat = llm.engine, llm.engine.runner.repeat

    def interrupted(scheduled):
        repeat(scheduled)
        raise KeyboardInterrupt

    engine.add_request([1, 2], options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.runner, "repeat", interrupted)
        while engine.has_unfinished():
            engine.step()
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert [o.outputs[0].token_ids for o in outputs] == [expected.outputs[0].token_ids]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("prompt_len", [3, 3000])
def test_a_gpu_is_not_waited_for_within_a_block(tmp_path, prompt_len):
    """With CUDA graphs, and with too many rows for one. PyTorch tells of every wait."""
    options = params("low_confidence", max_tokens=12, mode="vanilla")
    folder = write_checkpoint(tmp_path, max_sequence_length=4096)
    with LLM(folder, device="cuda", dtype="float32") as llm:
        llm.engine.add_request([1] * prompt_len, options)
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(3):
                llm.engine.step()
            with pytest.raises(RuntimeError, match="synchronizing"):
                llm.engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            llm.engine.abort_all()
