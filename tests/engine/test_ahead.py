"""The host reads a step's result only where it must, and runs ahead of the device everywhere else."""

import pytest
import torch

from blockinfer import LLM, SamplingParams
from blockinfer.decoding.unmasking import RULES
from blockinfer.engine import model_runner
from blockinfer.engine.scheduler import ScheduledSequence
from tests.checkpoints import write_checkpoint

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


@pytest.fixture
def launched(llm, monkeypatch):
    """Of the steps whose layers were launched the requests in them, and the number of steps that were over by then."""
    runner, before, seen = llm.engine.runner, llm.stats.forwards, []
    launch = runner.launch

    def spy(scheduled):
        seen.append((runner.stats.forwards - before, [s.request_id for s, _ in scheduled]))
        launch(scheduled)

    monkeypatch.setattr(runner, "launch", spy)
    return seen


def step_until(engine, finished):
    outputs = []
    while len(outputs) < finished:
        outputs += engine.step()
    return outputs


@pytest.mark.parametrize("options", [{"unmasking": "threshold"}, {"unmasking": "random", "block_add_threshold": 0.9}])
def test_layers_of_a_step_that_repeats_are_launched_ahead(llm, launched, options):
    """All but those of a block's first step; a schedule at one block is not waited for, and launches nothing ahead."""
    (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=12, block_length=4, **options), use_tqdm=False)
    assert len(launched) == output.metrics.nfe
    ahead = [over for number, (over, _) in enumerate(launched) if over == number and number > 0]
    assert len(ahead) >= output.metrics.nfe // 2
    launched.clear()
    llm.generate([[1, 2, 3]], params("low_confidence"), use_tqdm=False)
    assert len(launched) == 10


def test_who_comes_after_a_launch_joins_the_step_after_it(llm, launched):
    """And changes no token; the step that was launched is run as it was."""
    prompts, options = [[1, 2, 3], [4, 5]], params("threshold", threshold=1.0)
    expected = llm.generate(prompts, options, use_tqdm=False)
    launched.clear()
    engine = llm.engine
    first = engine.add_request(prompts[0], options)
    engine.step()
    engine.step()
    second = engine.add_request(prompts[1], options)
    outputs = step_until(engine, 2)
    assert [ids for _, ids in launched[:4]] == [[first]] * 3 + [[first, second]]
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert [o.metrics.nfe for o in outputs] == [o.metrics.nfe for o in expected]


@pytest.mark.parametrize("how", ["abort", "restart"])
def test_a_launch_of_what_is_no_more_is_forgotten(llm, launched, how):
    """Layers that were launched for a batch which has changed since are not taken for the next step's."""
    prompts, options = [[1, 2, 3], [4, 5]], params("threshold", threshold=1.0)
    expected = llm.generate(prompts, options, use_tqdm=False)
    engine = llm.engine
    first, second = (engine.add_request(prompt, options) for prompt in prompts)
    for _ in range(2):
        engine.step()
    launched.clear()
    if how == "abort":
        engine.abort(first)
    else:
        engine.restart()
    outputs = step_until(engine, 1 if how == "abort" else 2)
    assert launched[0][1] == ([second] if how == "abort" else [first, second])
    assert outputs[-1].outputs[0].token_ids == expected[1].outputs[0].token_ids


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
