"""What OpenAI's own client gets: the engine's answers, whole and as they come."""

import asyncio
import json
import re

import pytest

from blockinfer import SamplingParams
from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from tests.serve.conftest import MODEL

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Héllo €"}]
OPTIONS = {"max_tokens": 14, "block_length": 4, "ignore_eos": True}


SAMPLED = {"temperature": 1.5, "seed": 2, "max_tokens": 20}
# of the text of these
STOPS = [{"stop": "<"}, {"stop": ["nowhere", "_\x04"]}, {"stop": ["\x04\x04"], "include_stop_str_in_output": True}]
STOPS += [{"stop": "\x04x"}]


@pytest.fixture(scope="module")
def expected(served_llm):
    """expected(prompt or messages, **options): the engine's own output, made before a server has it."""
    made = {}

    def make(asked, **options):
        key = json.dumps([asked, options])
        if key not in made:
            params = SamplingParams(**OPTIONS | options)
            ask = served_llm.chat if isinstance(asked, list) and isinstance(asked[0], dict) else served_llm.generate
            (made[key],) = ask(asked, params, use_tqdm=False)
        return made[key]

    for options in ({}, {"temperature": 1.5, "seed": 2}, {"temperature": 1.5, "seed": 4}):
        make(MESSAGES, **options)
        make("Hello", **options)
    for mode in MODES:
        make("Hello", mode=mode)
    for rule in RULES:
        make("Hello", unmasking=rule, seed=3)
    make([5, 6, 7])
    for asked in ("Hello", MESSAGES):
        make(asked, **SAMPLED, n=3)
        make(asked, **SAMPLED, logprobs=2)
    for prompt in ("Hello", [5, 6, 7]):
        make(prompt, **SAMPLED, n=2)
    for stop in STOPS:
        make("Hello", **SAMPLED, **stop)
    make("Hello", ignore_eos=False, stop_token_ids=list(range(0, 300, 4)))
    return make


def extra(options):
    known = {k: options[k] for k in ("max_tokens", "temperature", "seed") if k in options}
    return known | {"extra_body": {k: v for k, v in options.items() if k not in known}}


def test_a_chat(expected, server):
    with server.openai() as client:
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, **extra(OPTIONS))
    output = expected(MESSAGES)
    assert answer.object == "chat.completion" and answer.model == MODEL and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == output.outputs[0].text
    assert choice.finish_reason == "length" and choice.index == 0
    prompt = len(output.prompt_token_ids)
    usage = {"prompt_tokens": prompt, "completion_tokens": 14, "total_tokens": prompt + 14, "forwards": 14}
    assert {name: getattr(answer.usage, name) for name in usage} == usage


def test_a_completion(expected, server):
    with server.openai() as client:
        answer = client.completions.create(model=MODEL, prompt="Hello", **extra(OPTIONS))
    assert answer.object == "text_completion" and answer.choices[0].text == expected("Hello").outputs[0].text


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.5, "seed": 2}, {"temperature": 1.5, "seed": 4}]
    + [{"mode": mode} for mode in MODES]
    + [{"unmasking": rule, "seed": 3} for rule in RULES]
    + [{"ignore_eos": False, "stop_token_ids": list(range(0, 300, 4))}],
    ids=str,
)
def test_options_are_followed(expected, server, options):
    output = expected("Hello", **options)
    with server.openai() as client:
        answer = client.completions.create(model=MODEL, prompt="Hello", **extra(OPTIONS | options))
    assert answer.choices[0].text == output.outputs[0].text
    assert answer.choices[0].finish_reason == output.outputs[0].finish_reason
    assert answer.usage.forwards == output.metrics.nfe
    assert answer.usage.completion_tokens == len(output.outputs[0].token_ids)


def test_several_prompts_are_several_choices(expected, server):
    with server.openai() as client:
        answer = client.completions.create(model=MODEL, prompt=["Hello", "Hello"], **extra(OPTIONS))
        of_ids = client.completions.create(model=MODEL, prompt=[[5, 6, 7], [5, 6, 7]], **extra(OPTIONS))
        one = client.completions.create(model=MODEL, prompt=[5, 6, 7], **extra(OPTIONS))
    assert [(c.index, c.text) for c in answer.choices] == [(i, expected("Hello").outputs[0].text) for i in range(2)]
    assert answer.usage.completion_tokens == 28
    text = expected([5, 6, 7]).outputs[0].text
    assert [c.text for c in of_ids.choices] == [text, text] and [c.text for c in one.choices] == [text]


def test_max_completion_tokens_and_content_in_parts(expected, server):
    parts = [{"role": "system", "content": "Be brief.", "type": "text", "name": None, "tool_calls": []}]
    parts.append({"role": "user", "content": [{"type": "text", "text": "Héllo"}, {"type": "text", "text": " €"}]})
    options = extra(
        OPTIONS
        | {"tools": [], "parallel_tool_calls": True, "n": 1, "top_p": 1.0, "logit_bias": {}, "bad_words": []}
        | {"logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}}
    )
    del options["max_tokens"]
    with server.openai() as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=parts, max_completion_tokens=14, stop=[], presence_penalty=0, user="me", **options
        )
    assert answer.choices[0].message.content == expected(MESSAGES).outputs[0].text


def joined(chunks):
    """The chunks of a chat with one choice -> text, finish_reason, usage."""
    first, *rest = chunks
    assert first.choices[0].delta.role == "assistant" and first.object == "chat.completion.chunk"
    text = "".join(c.choices[0].delta.content or "" for c in rest if c.choices)
    reasons = [c.choices[0].finish_reason for c in rest if c.choices]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert len({c.id for c in chunks}) == 1
    return text, reasons[-1], rest[-1].usage


def test_a_streamed_chat(expected, server):
    options = {"temperature": 1.5, "seed": 2}
    with server.openai() as client:
        stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **extra(OPTIONS | options))
        chunks = list(stream)
    text, reason, usage = joined(chunks)
    assert text == expected(MESSAGES, **options).outputs[0].text and reason == "length" and usage is None
    assert len(chunks) == 5, "who speaks, the three blocks that end a character, the end"


def test_a_streamed_chat_with_usage(expected, server):
    with server.openai() as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **extra(OPTIONS)
        )
        *chunks, last = stream
    assert last.choices == [] and (last.usage.completion_tokens, last.usage.forwards) == (14, 14)
    assert all(c.usage is None for c in chunks)
    assert joined(chunks)[0] == expected(MESSAGES).outputs[0].text


def test_streams_of_the_asynchronous_client(expected, server):
    async def ask(client, seed):
        options = extra(OPTIONS | {"temperature": 1.5, "seed": seed})
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **options)
        return joined([chunk async for chunk in stream])[0]

    async def main():
        async with server.async_openai() as client:
            return await asyncio.gather(*(ask(client, seed) for seed in [2, 4] * 6))

    wanted = [expected(MESSAGES, temperature=1.5, seed=seed).outputs[0].text for seed in (2, 4)]
    assert asyncio.run(main()) == wanted * 6 and wanted[0] != wanted[1]


def test_streamed_completions_are_told_apart(expected, server):
    texts = {0: "", 1: ""}
    with server.openai() as client:
        for chunk in client.completions.create(model=MODEL, prompt=["Hello", [5, 6, 7]], stream=True, **extra(OPTIONS)):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {i: expected(p).outputs[0].text for i, p in enumerate(["Hello", [5, 6, 7]])}


def test_a_stream_on_the_wire(server):
    body = {"model": MODEL, "prompt": "Hello", "stream": True} | OPTIONS
    with server.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(re.fullmatch(r"data: \{.*\}", e) for e in events[:-2])


@pytest.mark.parametrize("chat", [True, False])
def test_a_canvas_is_told_as_provisional(expected, server, chat):
    asked = {"messages": MESSAGES} if chat else {"prompt": "Hello"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"model": MODEL, "stream": True, "stream_mode": "denoise"} | asked | OPTIONS
    with server.client() as client:
        events = client.post(path, json=body).text.split("\n\n")[:-2]
    choices = [json.loads(e.removeprefix("data: "))["choices"][0] for e in events]
    canvases = [c["denoise"] for c in choices if "denoise" in c]
    assert len(canvases) == 10 and all(c["provisional"] and len(c["canvas"]) in (4, 2) for c in canvases)
    assert [c["forwards"] for c in canvases] == [1, 2, 3, 5, 6, 7, 9, 10, 11, 13]
    assert [sum(t is not None for t in c["canvas"]) for c in canvases] == [1, 2, 3] * 3 + [1]
    texts = [c["delta"].get("content", "") if chat else c["text"] for c in choices]
    assert "".join(texts) == expected(MESSAGES if chat else "Hello").outputs[0].text


def test_models_health_metrics_and_page(server):
    with server.openai() as client:
        (model,) = client.models.list().data
        assert model.id == MODEL and client.models.retrieve(MODEL).id == MODEL
    with server.client() as client:
        assert client.get("/health").json() == {"status": "ok"}
        client.post("/v1/completions", json={"model": MODEL, "prompt": "Hello"} | OPTIONS)
        client.post("/v1/completions", json={})
        text = client.get("/metrics").text
        page = client.get("/")
    values = dict(re.findall(r"^(blockinfer_\S+) ([\d.e+]+)$", text, re.MULTILINE))
    assert float(values['blockinfer_requests_total{endpoint="/v1/completions",status="200"}']) >= 1
    assert float(values['blockinfer_requests_total{endpoint="/v1/completions",status="400"}']) >= 1
    assert float(values["blockinfer_generated_tokens_total"]) >= 14
    assert float(values["blockinfer_first_block_seconds_count"]) >= 1
    assert float(values["blockinfer_tokens_per_forward_count"]) >= 1
    assert values["blockinfer_kv_pages"] == str(float(server.llm.engine.pool.num_pages))
    assert values["blockinfer_kv_pages_used"] == values["blockinfer_requests_waiting"] == "0.0"
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]


def streamed(client, path, body):
    """-> by choice the text, the log-probabilities' parts, and how it ended."""
    texts, logprobs, reasons = {}, {}, {}
    with client.stream("POST", path, json=body | {"stream": True}) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                index, part = choice["index"], choice["logprobs"]
                texts[index] = texts.get(index, "") + (choice.get("text") or choice.get("delta", {}).get("content", ""))
                if part:
                    logprobs.setdefault(index, []).append(part)
                if choice["finish_reason"]:
                    assert index not in reasons
                    reasons[index] = choice["finish_reason"]
    return texts, logprobs, reasons


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_stop_strings(expected, server, stop):
    (one,) = expected("Hello", **SAMPLED, **stop).outputs
    body = {"model": MODEL, "prompt": "Hello"} | OPTIONS | SAMPLED | stop
    with server.client() as client:
        (choice,) = client.post("/v1/completions", json=body).json()["choices"]
        texts, _, reasons = streamed(client, "/v1/completions", body)
    assert (choice["text"], choice["finish_reason"]) == (one.text, one.finish_reason)
    assert (texts, reasons) == ({0: one.text}, {0: one.finish_reason})


def test_stop_strings_were_met(expected):
    reasons = [expected("Hello", **SAMPLED, **stop).outputs[0].finish_reason for stop in STOPS]
    assert reasons == ["stop", "stop", "stop", "length"]


def test_several_answers(expected, server):
    wanted = [one.text for one in expected(MESSAGES, **SAMPLED, n=3).outputs]
    assert len(set(wanted)) == 3
    with server.openai() as client:
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=3, **extra(OPTIONS | SAMPLED))
        assert [(c.index, c.message.content) for c in answer.choices] == list(enumerate(wanted))
        output = expected(MESSAGES, **SAMPLED, n=3)
        assert answer.usage.completion_tokens == 60 and answer.usage.forwards == output.metrics.nfe
        assert answer.usage.prompt_tokens == len(output.prompt_token_ids)
        again = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, **extra(OPTIONS | SAMPLED | {"seed": answer.choices[2].seed})
        )
        assert again.choices[0].message.content == wanted[2], "every answer's seed makes it again"
    with server.client() as client:
        body = {"model": MODEL, "messages": MESSAGES, "n": 3} | OPTIONS | SAMPLED
        texts, _, reasons = streamed(client, "/v1/chat/completions", body)
    assert texts == dict(enumerate(wanted)) and reasons == dict.fromkeys(range(3), "length")


def test_several_answers_to_several_prompts(expected, server):
    prompts = ["Hello", [5, 6, 7]]
    wanted = [one.text for prompt in prompts for one in expected(prompt, **SAMPLED, n=2).outputs]
    body = {"model": MODEL, "prompt": prompts, "n": 2} | OPTIONS | SAMPLED
    with server.client() as client:
        choices = client.post("/v1/completions", json=body).json()["choices"]
        texts, _, _ = streamed(client, "/v1/completions", body)
    assert [(c["index"], c["text"]) for c in choices] == list(enumerate(wanted))
    assert texts == dict(enumerate(wanted))


def test_logprobs_of_a_chat(expected, server):
    (one,) = expected(MESSAGES, **SAMPLED, logprobs=2).outputs
    options = extra(OPTIONS | SAMPLED)
    with server.openai() as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2, **options
        )
        alone = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, **options)
    content = answer.choices[0].logprobs.content
    own = [tokens[token] for token, tokens in zip(one.token_ids, one.logprobs, strict=True)]
    assert [(c.token, c.logprob) for c in content] == [(t.decoded_token, t.logprob) for t in own]
    for position, tokens in zip(content, one.logprobs, strict=True):
        top = sorted(tokens.values(), key=lambda t: t.rank)
        assert [(t.token, t.logprob) for t in position.top_logprobs] == [(t.decoded_token, t.logprob) for t in top]
        assert bytes(position.bytes).decode() == position.token
    assert [c.logprob for c in alone.choices[0].logprobs.content] == [t.logprob for t in own]
    with server.client() as client:
        body = {"model": MODEL, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2} | OPTIONS | SAMPLED
        _, parts, _ = streamed(client, "/v1/chat/completions", body)
    assert [c for part in parts[0] for c in part["content"]] == [c.model_dump() for c in content]
    assert len(parts[0]) == 5, "a part for each block"


def test_logprobs_of_a_completion(expected, server):
    (one,) = expected("Hello", **SAMPLED, logprobs=2).outputs
    with server.openai() as client:
        answer = client.completions.create(model=MODEL, prompt="Hello", logprobs=2, **extra(OPTIONS | SAMPLED))
    found = answer.choices[0].logprobs
    own = [tokens[token] for token, tokens in zip(one.token_ids, one.logprobs, strict=True)]
    assert found.token_logprobs == [t.logprob for t in own] and found.tokens == [t.decoded_token for t in own]
    assert found.text_offset[:2] == [0, len(found.tokens[0])]
    # halves of characters are written alike: the likeliest of them is named
    assert all(top[t.decoded_token] >= t.logprob for top, t in zip(found.top_logprobs, own, strict=True))
    assert any(top[t.decoded_token] == t.logprob for top, t in zip(found.top_logprobs, own, strict=True))
    with server.client() as client:
        body = {"model": MODEL, "prompt": "Hello", "logprobs": 2} | OPTIONS | SAMPLED
        _, parts, _ = streamed(client, "/v1/completions", body)
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for part in parts[0] for x in part[name]] == getattr(found, name)
