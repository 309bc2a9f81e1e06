"""Several ranks give what one gives, at float64 token for token, in whatever a request may ask."""

import asyncio
import dataclasses
import random
import signal
from typing import NamedTuple

import pytest
import torch

from blockinfer import LLM, SamplingParams, ScoringParams
from blockinfer.async_llm import AsyncLLM
from tests.test_equivalence import MODES, RULES, draw_case

# so few pages that requests are preempted
OPTIONS = dict(device="cpu", dtype="float64", max_num_seqs=8, page_size=4)
PAGES = 28
PARAMS = SamplingParams(max_tokens=12, block_length=4, ignore_eos=True, seed=0)
PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]


class Pair(NamedTuple):
    one: LLM
    several: LLM


@pytest.fixture(scope="module", params=[(2, "dense"), (3, "tied")], ids=["2-dense", "3-tied"])
def pair(request, shared_folders):
    size, shape = request.param
    folder = shared_folders[shape]
    page_bytes = 2 * 2 * 4 * 48 * 8 // (2 if shape == "tied" else 1)
    with LLM(folder, kv_cache_memory=PAGES * page_bytes, **OPTIONS) as one:
        options = OPTIONS | dict(kv_cache_memory=PAGES * page_bytes // size)
        with LLM(folder, tensor_parallel_size=size, **options) as several:
            assert several.engine.pool.num_pages == one.engine.pool.num_pages == PAGES
            yield Pair(one, several)


def outputs(llm, prompts, params, **options):
    """All but what the clock says."""
    return [
        (output.outputs, output.metrics.nfe, output.metrics.preemptions, output.metrics.seed)
        for output in llm.generate(prompts, params, use_tqdm=False, **options)
    ]


def assert_same(pair, prompts, params):
    expected = outputs(pair.one, prompts, params)
    assert outputs(pair.several, prompts, params) == expected
    assert pair.several.engine.pool.num_free == PAGES
    return expected


def test_every_mode_and_rule_under_preemption(pair):
    draw = random.Random(0)
    cases = [draw_case(draw, "dense", mode, rule, index) for mode in MODES for rule in RULES for index in (1, 2)]
    draw.shuffle(cases)
    found = assert_same(pair, [list(case.prompt) for case in cases], [case.params for case in cases])
    assert sum(preemptions for _, _, preemptions, _ in found) > 0
    assert len({tuple(o.token_ids) for answers, *_ in found for o in answers}) > 50


def test_a_seed_that_is_drawn_is_every_rank_s(pair):
    drawn = dataclasses.replace(PARAMS, temperature=5.0, seed=None)
    for output in pair.several.generate(PROMPTS, drawn, use_tqdm=False):
        params = dataclasses.replace(drawn, seed=output.metrics.seed)
        (same,) = pair.one.generate([output.prompt_token_ids], params, use_tqdm=False)
        assert same.outputs == output.outputs


def test_what_is_read_of_the_logits_besides(pair):
    """Log-probabilities over the whole vocabulary, guidance, several answers, stop strings, masked spans."""
    params = [
        dataclasses.replace(PARAMS, logprobs=3),
        dataclasses.replace(PARAMS, logprobs=60, temperature=0.7, seed=5, cfg_scale=0.5),
    ]
    for one, several in zip(*(llm.generate(PROMPTS[:2], params, use_tqdm=False) for llm in pair), strict=True):
        (a,), (b,) = one.outputs, several.outputs
        assert b.token_ids == a.token_ids
        for expected, found in zip(a.logprobs, b.logprobs, strict=True):
            assert {i: p.rank for i, p in found.items()} == {i: p.rank for i, p in expected.items()}
            values = [p.logprob for p in expected.values()]
            assert [found[i].logprob for i in expected] == pytest.approx(values, rel=1e-9)
    text = pair.one.generate(PROMPTS[0], PARAMS, use_tqdm=False)[0].outputs[0].text
    assert len(text) > 6
    params = [
        dataclasses.replace(PARAMS, cfg_scale=1.5, unmasking="entropy"),
        dataclasses.replace(PARAMS, n=3, temperature=1.0, seed=3),
        dataclasses.replace(PARAMS, stop=[text[3:5]]),
        dataclasses.replace(PARAMS, logits_eos_inf=True, confidence_eos_eot_inf=True, temperature=0.9, seed=2),
    ]
    found = assert_same(pair, [PROMPTS[0]] * 4, params)
    assert found[2][0][0].finish_reason == "stop"
    spans = [{"prompt": "ab {fill:3} cd {fill:2}"}, {"prompt_token_ids": [1, 57, 57, 4], "infill": True}]
    assert_same(pair, spans, dataclasses.replace(PARAMS, mode="dual_cache"))


def test_scores_and_choices(pair):
    params = [ScoringParams(mc_num=4, seed=1), ScoringParams(mc_num=8, seed=2, mode="block", cfg_scale=0.5)]
    for scoring in params:
        one, several = (llm.score(PROMPTS, [[5, 6, 7]] * 4, scoring, use_tqdm=False) for llm in pair)
        assert [s.logprob for s in several] == pytest.approx([s.logprob for s in one], rel=1e-9)
        assert [s.nfe for s in several] == [s.nfe for s in one]
        one, several = (llm.choose(PROMPTS, [[5], [6], [7, 8]], scoring, use_tqdm=False) for llm in pair)
        for a, b in zip(one, several, strict=True):
            assert b.best == a.best and b.probabilities == pytest.approx(a.probabilities, rel=1e-9)


def test_ctrl_c_waits_for_the_end_of_a_call_and_the_ranks_go_on(pair, heeding_signals, monkeypatch):
    expected = outputs(pair.one, PROMPTS, PARAMS)
    runner, calls = pair.several.engine.runner, []
    run = runner.run

    def interrupted(scheduled):
        calls.append(len(scheduled))
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return run(scheduled)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            outputs(pair.several, PROMPTS, PARAMS)
    # those that the others had been told of were made
    assert len(calls) == 4
    assert outputs(pair.several, PROMPTS, PARAMS) == expected


def test_requests_that_come_and_go_between_steps(pair):
    """Whatever was told of steps before: the outputs are those of each alone, and a request that goes has none."""
    params = [
        dataclasses.replace(PARAMS, max_tokens=4 * (1 + i % 3), unmasking=RULES[i % len(RULES)]) for i in range(9)
    ]
    prompts = [PROMPTS[i % 4] + [i] for i in range(9)]
    expected = [output.outputs for output in pair.one.generate(prompts, params, use_tqdm=False)]
    engine, draw = pair.several.engine, random.Random(3)
    alive, given, gone, added = {}, {}, set(), 0
    while added < 9 or engine.has_unfinished():
        what = draw.random()
        if added < 9 and (what < 0.3 or not alive):
            alive[engine.add_request(prompts[added], params[added])] = added
            added += 1
        elif alive and what < 0.36:
            request_id = draw.choice(sorted(alive))
            engine.abort(request_id)
            gone.add(alive.pop(request_id))
        else:
            given |= {alive.pop(output.request_id): output.outputs for output in engine.step()}
    assert not alive and 1 <= len(gone) <= 4 and given == {i: expected[i] for i in range(9) if i not in gone}
    assert engine.pool.num_free == PAGES


@pytest.mark.parametrize("first", [0, 1])
def test_a_request_that_a_told_step_finishes(pair, first):
    """It may go like any other, and is given out by the next step if it stays."""
    engine = pair.several.engine
    params = dataclasses.replace(PARAMS, max_tokens=4, block_length=2, denoising_steps=1)
    ids = [engine.add_request(PROMPTS[0], params), engine.add_request(PROMPTS[1], PARAMS)]
    assert engine.step() == []
    # what comes between waits for the steps that were told, of which one finishes the first request
    engine.abort(ids[first])
    given = [output.request_id for output in engine.step()]
    assert given == [ids[0]] * first
    while engine.has_unfinished():
        given += [output.request_id for output in engine.step()]
    assert given == [ids[1 - first]]
    with pytest.raises(ValueError, match=f"there is no unfinished request {ids[first]}"):
        engine.abort(ids[first])


def test_what_is_refused_or_broken_leaves_the_others(pair):
    llm = pair.several
    expected = outputs(pair.one, PROMPTS, PARAMS)
    with pytest.raises(ValueError, match="prompt 1: .* more than max_model_len"):
        llm.generate([[1], [1] * 500], PARAMS, use_tqdm=False)
    with pytest.raises(ValueError, match="params must be a SamplingParams"):
        llm.engine.add_request([1], 5)
    head = llm.engine.model.lm_head
    with torch.inference_mode():
        right = head.clone()
        # of one rank alone: the others are told
        head.fill_(torch.nan)
        try:
            with pytest.raises(FloatingPointError, match="NaN or infinite"):
                outputs(llm, PROMPTS, PARAMS)
        finally:
            head.copy_(right)
    assert outputs(llm, PROMPTS, PARAMS) == expected


def test_coroutines(pair):
    """The engine on a thread of its own."""

    async def run():
        engine = AsyncLLM(pair.several)
        try:

            async def last(prompt):
                return [output async for output in engine.generate(prompt, PARAMS)][-1]

            return await asyncio.gather(*map(last, PROMPTS))
        finally:
            engine.close()

    expected = [output.outputs for output in pair.one.generate(PROMPTS, PARAMS, use_tqdm=False)]
    assert [output.outputs for output in asyncio.run(run())] == expected
