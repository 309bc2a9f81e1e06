"""What goes wrong while the engine runs: an error that names it, and an engine that can go on."""

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


def test_float16_that_overflows(tmp_path):
    folder = write_checkpoint(tmp_path, scale=8e4)
    with LLM(folder, device="cpu", dtype="float16") as llm:
        with pytest.raises(FloatingPointError, match="overflow torch.float16"):
            llm.generate([1, 2, 3], PARAMS, use_tqdm=False)
        assert not llm.engine.has_unfinished()
    with LLM(folder, device="cpu", dtype="float32") as llm:
        assert llm.generate([1, 2, 3], PARAMS, use_tqdm=False)
