"""AsyncLLM: many coroutines on one engine, which is left empty whatever they do."""

import asyncio
import contextlib
import dataclasses
import random
import threading

import pytest
import torch

from blockinfer import LLM, SamplingParams
from blockinfer.async_llm import AsyncLLM
from tests.checkpoints import write_checkpoint

PARAMS = SamplingParams(max_tokens=12, block_length=4, ignore_eos=True)
PROMPTS = [[p, p + 1, 7] for p in range(1, 21)]


@pytest.fixture
def run(llm):
    """run(function): what a coroutine function makes of an AsyncLLM, within half a minute."""

    def start(function):
        async def main():
            engine = AsyncLLM(llm)
            try:
                return await asyncio.wait_for(function(engine), 30)
            finally:
                engine.close()
                assert engine.unfinished == 0

        return asyncio.run(main())

    return start


async def whole(engine, prompt, params=PARAMS):
    outputs = [output async for output in engine.generate(prompt, params)]
    return outputs[-1]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_many_at_once_get_what_each_gets_alone(llm, run):
    expected = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    outputs = run(lambda engine: asyncio.gather(*(whole(engine, prompt) for prompt in PROMPTS)))
    assert [o.outputs for o in outputs] == [o.outputs for o in expected]


def test_the_llm_s_own_calls_are_refused_meanwhile(llm, run):
    """Two that step one engine get each other's outputs, or wait for ever."""
    ask = [lambda: AsyncLLM(llm), lambda: llm.score("a", "b"), lambda: next(llm.stream("hi"))]
    ask += [lambda: llm.chat([{"role": "user", "content": "hi"}]), lambda: llm.generate("hi", PARAMS, use_tqdm=False)]

    async def others(engine):
        for call in ask:
            with pytest.raises(RuntimeError, match="an AsyncLLM has taken this LLM over; ask that one, or close"):
                call()
        return await whole(engine, PROMPTS[0])

    assert run(others).outputs == llm.generate(PROMPTS[0], PARAMS, use_tqdm=False)[0].outputs
    with pytest.raises(ValueError, match="llm must be an LLM, got str"):
        AsyncLLM("llada")


def test_outputs_come_block_by_block(run):
    async def streams(engine):
        return [o async for o in engine.generate("hi", PARAMS)], [o async for o in engine.generate("hi", stream=None)]

    blocks, alone = run(streams)
    assert [len(o.outputs[0].token_ids) for o in blocks] == [4, 8, 12]
    assert [o.finished for o in blocks] == [False, False, True] and blocks[0].prompt == "hi"
    assert len(alone) == 1 and alone[0].finished


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], None, "the prompt is empty"),
        ("a\ud800", None, "lone surrogate"),
        ([1], 5, "params must be a SamplingParams"),
        ([1], SamplingParams(max_tokens=1000), "more than max_model_len"),
    ],
)
def test_bad_requests_are_refused_when_they_are_added(run, prompt, params, message):
    async def bad(engine):
        with pytest.raises(ValueError, match=message):
            await engine.add(prompt, params)
        return await whole(engine, [1, 2])

    assert run(bad).finished


@pytest.mark.parametrize("how", ["close", "cancel", "abort"])
def test_who_leaves_frees_the_pages_at_once(llm, run, how):
    async def leave(engine):
        generation = engine.generate([1, 2, 3], SamplingParams(max_tokens=200, block_length=2, ignore_eos=True))
        first = await anext(generation)
        assert engine.unfinished == 1
        if how == "close":
            await generation.aclose()
        elif how == "abort":
            await engine.abort(first.request_id)
            with pytest.raises(RuntimeError, match=f"request {first.request_id} was aborted"):
                while True:
                    await anext(generation)
        else:
            task = asyncio.ensure_future(anext(generation))
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await until(lambda: llm.engine.pool.num_free == llm.engine.pool.num_pages)
        assert engine.unfinished == 0 and not llm.engine.has_unfinished()

    run(leave)


def test_who_leaves_before_the_engine_took_the_request(llm, run, monkeypatch):
    """The first waits in the thread for texts, the second for the engine."""
    go = threading.Event()
    read = llm.engine.prompts.read
    monkeypatch.setattr(llm.engine.prompts, "read", lambda prompt: go.wait(20) and read(prompt))

    async def leave(engine):
        tasks = [asyncio.ensure_future(engine.add([i + 1], PARAMS)) for i in range(2)]
        await until(lambda: engine.unfinished == 2)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert engine.unfinished == 0
        go.set()
        await whole(engine, [5])
        assert not llm.engine.has_unfinished()

    run(leave)


def test_an_id_that_no_request_has(run):
    async def abort(engine):
        with pytest.raises(ValueError, match="there is no unfinished request 10000000"):
            await engine.abort(10_000_000)

    run(abort)


def test_nan_logits_end_the_request_alone(llm, run, monkeypatch):
    expected = llm.generate(PROMPTS[:6], PARAMS, use_tqdm=False)
    logits, calls = llm.engine.model.logits, iter(range(1000))

    def broken(*args):
        out = logits(*args)
        if next(calls) == 1:
            out[0] = torch.nan
        return out

    monkeypatch.setattr(llm.engine.model, "logits", broken)

    async def all_of_them(engine):
        added = [await engine.add(prompt, PARAMS, stream=None) for prompt in PROMPTS[:6]]

        async def last(generation):
            return [output async for output in generation][-1]

        return await asyncio.gather(*map(last, added), return_exceptions=True)

    outputs = run(all_of_them)
    failed = [i for i, output in enumerate(outputs) if isinstance(output, Exception)]
    assert len(failed) == 1 and "NaN or infinite" in str(outputs[failed[0]])
    assert all(o.outputs == expected[i].outputs for i, o in enumerate(outputs) if i not in failed)


def test_an_error_that_names_no_request_ends_the_one_it_comes_from(llm, run, monkeypatch):
    expected = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    step = llm.engine.runner.run

    sizes = []

    def fail(scheduled):
        sizes.append(len(scheduled))
        results = step(scheduled)
        if any(s.prompt_token_ids == PROMPTS[3] and s.step == 2 for s, _ in scheduled):
            raise RuntimeError("kernel launch failed")
        return results

    monkeypatch.setattr(llm.engine.runner, "run", fail)
    tasks = [lambda e, p=p: whole(e, p) for p in PROMPTS]
    outputs = run(lambda engine: asyncio.gather(*(task(engine) for task in tasks), return_exceptions=True))
    assert str(outputs[3]) == "the engine failed: RuntimeError: kernel launch failed"
    assert all(o.outputs == expected[i].outputs for i, o in enumerate(outputs) if i != 3)
    assert 1 in sizes and sizes[-1] > 1, "alone, and then side by side again"


def test_an_error_before_anything_ran_ends_all_of_them_and_no_later_one(llm, run, monkeypatch):
    async def all_of_them(engine):
        with monkeypatch.context() as patch:
            patch.setattr("blockinfer.engine.scheduler.Scheduler.schedule", lambda _: 1 / 0)
            failed = await asyncio.gather(*(whole(engine, p) for p in PROMPTS[:4]), return_exceptions=True)
            assert all("ZeroDivisionError" in str(error) for error in failed)
        assert not llm.engine.scheduler.alone
        return await asyncio.gather(*(whole(engine, p) for p in PROMPTS[:4]))

    assert all(output.finished for output in run(all_of_them))


def test_an_engine_that_always_fails_is_not_healthy_until_a_step_succeeds(llm, run, monkeypatch):
    async def all_of_them(engine):
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.runner, "run", lambda _: 1 / 0)
            failed = await asyncio.gather(*(whole(engine, p) for p in PROMPTS[:4]), return_exceptions=True)
            assert all("ZeroDivisionError" in str(error) for error in failed)
            assert not engine.healthy
        await whole(engine, [1])
        assert engine.healthy

    run(all_of_them)


def test_closing_ends_what_runs(llm):
    async def main():
        engine = AsyncLLM(llm)
        generation = await engine.add([1, 2], SamplingParams(max_tokens=200, block_length=2, ignore_eos=True))
        await anext(generation)
        engine.close()
        engine.close()
        with pytest.raises(RuntimeError, match="this AsyncLLM was closed"):
            while True:
                await anext(generation)
        with pytest.raises(RuntimeError, match="this AsyncLLM is closed"):
            await engine.add([1])
        assert not engine.healthy and engine.unfinished == 0

    asyncio.run(main())


def test_an_engine_in_use_is_not_taken_over(llm):
    request_id = llm.engine.add_request([1])
    with pytest.raises(RuntimeError, match="the engine has unfinished requests"):
        AsyncLLM(llm)
    llm.engine.abort(request_id)


def test_two_hundred_of_which_a_third_leaves(llm, run):
    draw = random.Random(0)
    prompts = [[draw.randrange(250) for _ in range(draw.randint(1, 9))] for _ in range(200)]
    params = [SamplingParams(max_tokens=draw.randint(1, 12), block_length=4, ignore_eos=True) for _ in prompts]
    leaving = set(draw.sample(range(200), 66))
    expected = llm.generate(prompts, params, use_tqdm=False)

    async def ask(engine, i):
        if i not in leaving:
            return await whole(engine, prompts[i], params[i])
        task = asyncio.ensure_future(whole(engine, prompts[i], params[i]))
        await asyncio.sleep(draw.random() * 0.5)
        task.cancel()
        return await asyncio.gather(task, return_exceptions=True)

    outputs = run(lambda engine: asyncio.gather(*(ask(engine, i) for i in range(200))))
    assert all(o.outputs == expected[i].outputs for i, o in enumerate(outputs) if i not in leaving)


def test_guidance_and_several_answers_when_an_error_names_no_request(llm, run, monkeypatch):
    """One runs at a time then, with its shadow and with its siblings."""
    guided = dataclasses.replace(PARAMS, cfg_scale=0.5)
    several = dataclasses.replace(PARAMS, n=3, temperature=1.0, seed=3)
    asked = [(PROMPTS[0], guided), (PROMPTS[1], several), (PROMPTS[2], PARAMS)]
    expected = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt, params in asked]
    step = llm.engine.runner.run
    together = []

    def fail(scheduled):
        together.append({s.request for s, _ in scheduled})
        if any(s.prompt_token_ids == PROMPTS[2] for s, _ in scheduled):
            raise RuntimeError("kernel launch failed")
        return step(scheduled)

    monkeypatch.setattr(llm.engine.runner, "run", fail)
    outputs = run(lambda e: asyncio.gather(*(whole(e, *one) for one in asked), return_exceptions=True))
    assert [o.outputs for o in outputs[:2]] == [o.outputs for o in expected[:2]]
    assert "kernel launch failed" in str(outputs[2])
    first = next((i for i, requests in enumerate(together) if len(requests) > 1), 0)
    assert all(len(requests) == 1 for requests in together[first + 2 :])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_from_another_thread(tmp_path):
    """With CUDA graphs, which the thread that loaded the model captured."""
    torch.cuda.set_device(torch.cuda.device_count() - 1)
    folder = write_checkpoint(tmp_path)
    with LLM(folder, device="cuda", dtype="float32") as llm:
        expected = llm.generate(PROMPTS, PARAMS, use_tqdm=False)

        async def main():
            engine = AsyncLLM(llm)
            try:
                return await asyncio.gather(*(whole(engine, prompt) for prompt in PROMPTS))
            finally:
                engine.close()

        try:
            outputs = asyncio.run(main())
        finally:
            torch.cuda.set_device(0)
    assert [o.outputs for o in outputs] == [o.outputs for o in expected]
