"""What must not change a request's tokens: the batch, preemption, the pages' size, and how a commit is launched."""

import random

import numpy as np
import pytest
import torch

from blockinfer import LLM, SamplingParams
from blockinfer.decoding.modes import MODES, Segment
from blockinfer.decoding.unmasking import RULES
from blockinfer.engine.resident import Plan
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.sequence import Sequence
from blockinfer.kernels.segments import PART, Cutting
from blockinfer.kernels.wide_attention import wide_attention


def requests(count, seed=2):
    """Prompts and params of every mode and rule, with different lengths, steps, temperatures and seeds."""
    r = random.Random(seed)
    prompts = [[r.randrange(250) for _ in range(r.randint(1, 40))] for _ in range(count)]
    pairs = [(mode, rule) for mode in MODES for rule in RULES]
    params = [
        SamplingParams(
            mode=pairs[i % len(pairs)][0],
            unmasking=pairs[i % len(pairs)][1],
            max_tokens=r.randint(1, 60),
            block_length=r.choice([1, 5, 8, 32]),
            denoising_steps=r.choice([None, None, 3, 50]),
            temperature=r.choice([0.0, 0.0, 0.8]),
            seed=r.randrange(2**64),
            ignore_eos=r.random() < 0.5,
        )
        for i in range(count)
    ]
    return prompts, params


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(shared_llm):
    """Every request run by itself."""
    prompts, params = requests(60)
    return [shared_llm.generate(*pair, use_tqdm=False)[0] for pair in zip(prompts, params, strict=True)]


def test_the_batch_changes_no_tokens(llm, alone):
    together = llm.generate(*requests(60), use_tqdm=False)
    assert tokens(together) == tokens(alone)
    assert [o.outputs[0].finish_reason for o in together] == [o.outputs[0].finish_reason for o in alone]
    assert [o.metrics.nfe for o in together] == [o.metrics.nfe for o in alone]


@pytest.mark.parametrize("page_size", [3, 64])
def test_preemption_and_sitting_out_change_no_tokens(checkpoint, alone, page_size):
    # pages for 130 tokens, where six requests want up to 100 each; rows for one and a half
    page_bytes = 2 * 2 * 32 * 8  # layers, K and V, d_model, float64
    options = dict(max_model_len=100, max_num_batched_tokens=150, max_num_seqs=6, page_size=page_size)
    with LLM(checkpoint, device="cpu", dtype="float64", kv_cache_memory=130 * page_bytes, **options) as llm:
        together = llm.generate(*requests(60), use_tqdm=False)
        assert llm.engine.pool.num_free == llm.engine.pool.num_pages
    assert tokens(together) == tokens(alone)
    assert sum(o.metrics.preemptions for o in together) >= 3
    preempted = [(a, b) for a, b in zip(together, alone, strict=True) if a.metrics.preemptions]
    assert all(a.metrics.denoising_steps == b.metrics.denoising_steps for a, b in preempted)
    assert any(a.metrics.nfe > b.metrics.nfe for a, b in preempted)


def test_it_does_not_matter_which_attention_serves_a_segment(llm, alone, monkeypatch):
    """Wide ones, which are the last of their keys: all such segments, or only those that are all of them."""
    served = []

    def count(qk, v, kv_pages, table, out):
        paged, wide = table.num_tiles.tolist()
        served.append(int((table.tiles[paged : paged + wide, PART.value] > 0).sum()))
        wide_attention(qk, v, kv_pages, table, out)

    monkeypatch.setattr("blockinfer.kernels.attention.wide_attention", count)
    monkeypatch.setattr(Cutting, "may_split", lambda self, rows: np.zeros_like(rows, dtype=bool))
    assert tokens(llm.generate(*requests(60), use_tqdm=False)) == tokens(alone)
    assert max(served) >= 3


@pytest.mark.parametrize("mode", ["block", "block_refresh"])
def test_max_tokens_does_not_change_whole_blocks(llm, mode):
    prompt = [5, 17, 40, 3, 9]
    long, short = (
        llm.generate(prompt, SamplingParams(mode=mode, max_tokens=n, block_length=8, ignore_eos=True), use_tqdm=False)
        for n in (37, 21)
    )
    assert tokens(long)[0][:16] == tokens(short)[0][:16]
    assert len(tokens(long)[0]) == 37 and len(tokens(short)[0]) == 21


def test_a_merged_commit_equals_a_separate_one(llm):
    """What the last layer's attention gives a new block, with the commit in the same forward and in one before it."""
    prompt = [7, 8, 9, 10, 11]
    runner = llm.engine.runner
    sequence = Sequence(0, None, prompt, SamplingParams(max_tokens=8, block_length=4), 0, frozenset())
    sequence.slot = 0
    sequence.advance([0])
    sequence.finish([20, 21, 22, 23], 4)
    runner.start(sequence)
    runner.page_tables[0, :4] = torch.tensor([3, 1, 2, 5])

    def forward(segments):
        rows = sum(segment.stop - segment.start for segment in segments)
        with torch.inference_mode():
            runner._begin([ScheduledSequence(sequence, Plan(segments, rows, segments[-1].kv_len, 1, 9))])
            return torch.cat([runner._attended[:rows], runner._residual[:rows]], dim=1)

    prompt_segment, commit, block = Segment(0, 5, 5), Segment(5, 9, 9), Segment(9, 13, 13)
    runner.kv_pages.fill_(torch.nan)
    merged = forward([prompt_segment, commit, block])[-4:]
    runner.kv_pages.fill_(torch.nan)
    for segment in (prompt_segment, commit):
        forward([segment])
    separate = forward([block])
    torch.testing.assert_close(merged, separate, rtol=1e-12, atol=1e-12)
    # one segment over prompt and commit is something else: the prompt would see the committed block
    runner.kv_pages.fill_(torch.nan)
    assert not torch.allclose(forward([Segment(0, 9, 9), block])[-4:], separate, rtol=1e-6)


def test_counts(llm):
    """nfe, forwards, rows and LM-head rows of one request, by hand: prompt 5, two blocks of 4, 2 steps each."""
    before = llm.stats
    params = SamplingParams(max_tokens=8, block_length=4, denoising_steps=2, ignore_eos=True)
    (output,) = llm.generate([1, 2, 3, 4, 5], params, use_tqdm=False)
    after = llm.stats
    assert (output.metrics.nfe, output.metrics.denoising_steps, output.metrics.preemptions) == (4, 4, 0)
    assert after.forwards - before.forwards == 4
    assert after.rows - before.rows == (5 + 4) + 4 + (4 + 4) + 4
    assert after.lm_head_rows - before.lm_head_rows == 4 + 2 + 4 + 2


@pytest.mark.parametrize("rule, others", [("low_confidence", 0), ("scheduled_threshold", 3 * 4)])
def test_what_no_rule_may_reveal_is_not_predicted(llm, rule, others):
    """Two blocks of 4, of which the second opens after a step, and in which the schedule counts once the first is
    revealed: until then others are predicted for a threshold's sake alone."""
    before = llm.stats
    options = dict(block_length=4, unmasking=rule, threshold=1.0 if others else None, block_add_threshold=0.25)
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True, **options), use_tqdm=False)
    assert llm.stats.lm_head_rows - before.lm_head_rows == 2 * (4 + 3 + 2 + 1) + others
