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
