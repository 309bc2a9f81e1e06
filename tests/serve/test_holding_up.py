"""A server under bad conditions: too many, too slow, too large, gone, broken. Nothing hangs, and nothing is left."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx
import openai
import pytest
import torch

from blockinfer import SamplingParams
from blockinfer.serve.errors import ApiError
from tests.serve.conftest import MODEL, until

LONG = {"model": MODEL, "prompt": "Hello", "max_tokens": 200, "block_length": 2, "ignore_eos": True}
SHORT = LONG | {"max_tokens": 8}


@pytest.fixture
def gate(served_llm, monkeypatch):
    """The engine's steps wait while it is not set."""
    gate, run = threading.Event(), served_llm.engine.runner.run
    gate.set()
    monkeypatch.setattr(served_llm.engine.runner, "run", lambda scheduled: gate.wait(20) and run(scheduled))
    yield gate
    gate.set()


@contextlib.contextmanager
def connection(server):
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=20) as one:
        yield one


def send(one, body, path="/v1/completions"):
    body = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    one.sendall(head.encode() + body)


def rest(one):
    """What comes until the server closes."""
    parts = []
    while part := one.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def test_who_leaves_a_stream_frees_its_pages_at_once(serve, gate):
    server = serve()
    with server.client() as client, client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        gate.clear()
        until(lambda: server.pages_used)
        forwards = server.llm.stats.forwards
    until(lambda: not server.service.in_flight)
    gate.set()
    until(server.is_empty)
    assert server.llm.stats.forwards <= forwards + 1, "the step that was under way was the last"
    with server.client() as client:
        assert 'requests_total{endpoint="/v1/completions",status="aborted"} 1.0' in client.get("/metrics").text


def test_who_leaves_before_the_answer_frees_its_pages(serve, gate):
    """Of more than run at once, so some wait in the queue."""
    server = serve()
    gate.clear()
    with contextlib.ExitStack() as stack:
        for _ in range(9):
            send(stack.enter_context(connection(server)), LONG)
        until(lambda: server.service.in_flight == 9 and server.pages_used)
    until(lambda: server.service.in_flight == 0)
    forwards = server.llm.stats.forwards
    gate.set()
    until(server.is_empty)
    assert server.service.engine.unfinished == 0
    assert server.llm.stats.forwards <= forwards + 1


def test_who_leaves_while_the_template_runs_is_forgotten(serve, monkeypatch):
    server = serve()
    go, render = threading.Event(), server.llm.chat_prompts
    monkeypatch.setattr(server.llm, "chat_prompts", lambda messages: go.wait(20) and render(messages))
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "ignore_eos": True}
    for stream in (True, False):
        go.clear()
        with connection(server) as one:
            send(one, {"model": MODEL, "stream": stream} | asked, "/v1/chat/completions")
            until(lambda: server.service.in_flight)
        go.set()
        until(server.is_empty)


def test_a_full_queue_says_so(serve, gate):
    server = serve(max_queue=2)
    gate.clear()

    async def main():
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            tasks = [asyncio.create_task(client.post("/v1/completions", json=SHORT)) for _ in range(6)]
            while server.service.in_flight < 6 and not any(task.done() for task in tasks):
                await asyncio.sleep(0.002)
            refused = await client.post("/v1/completions", json=SHORT)
            bad = await client.post("/v1/completions", json=SHORT | {"seed": -1})
            gate.set()
            done = await asyncio.gather(*tasks)
            later = await client.post("/v1/completions", json=SHORT)
            return refused, bad, done, later

    refused, bad, done, later = asyncio.run(main())
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["message"] == "the queue is full: 6 answers run and wait, at most 6 may"
    assert bad.status_code == 400, "a bad request is told that it is, however full the queue"
    assert [a.status_code for a in done] == [200] * 6 and later.status_code == 200


def test_each_answer_of_a_request_takes_a_place(serve):
    """Of four that run and two that wait."""
    service = serve(max_queue=2).service
    service.admit(6).close()
    with pytest.raises(ApiError, match="7 answers at once are more than the 6 that may run and wait"):
        service.admit(7)
    job = service.admit(4)
    with pytest.raises(ApiError, match="the queue is full: 4 answers run and wait, at most 6 may"):
        service.admit(3)
    service.admit(2).close()
    job.close()


def test_the_openai_client_comes_again(serve, gate):
    server = serve(max_queue=0)
    gate.clear()
    with server.openai() as client, contextlib.ExitStack() as stack:
        for _ in range(4):
            send(stack.enter_context(connection(server)), SHORT)
        until(lambda: server.service.in_flight == 4)
        threading.Timer(0.2, gate.set).start()
        options = {name: SHORT[name] for name in ("block_length", "ignore_eos")}
        answer = client.with_options(max_retries=20).completions.create(
            model=MODEL, prompt="Hello", max_tokens=8, extra_body=options
        )
        assert answer.usage.completion_tokens == 8


def test_a_prompt_that_is_refused_takes_the_others_of_its_request_along(serve):
    server = serve()
    with server.client() as client:
        answer = client.post("/v1/completions", json=LONG | {"prompt": ["a", "b", ""]})
        assert answer.status_code == 400 and "the prompt is empty" in answer.text
    until(server.is_empty)


def test_the_key(serve):
    server = serve(api_key="sk-none")
    with server.openai() as client:
        assert client.models.list().data[0].id == MODEL
        assert client.completions.create(model=MODEL, prompt="Hello", max_tokens=4).usage.completion_tokens == 4
        with pytest.raises(openai.AuthenticationError, match="this server asks for its key"):
            client.with_options(api_key="sk-other").completions.create(model=MODEL, prompt="Hello")
    with server.client() as client:
        for headers in ({}, {"Authorization": "sk-none"}, {"Authorization": "Bearer x"}, {"Authorization": b"\xff"}):
            for path in ("/v1/models", f"/v1/models/{MODEL}"):
                assert client.get(path, headers=headers).status_code == 401
            answer = client.post("/v1/completions", json=SHORT, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert [client.get(path).status_code for path in ("/health", "/metrics", "/")] == [200] * 3


def test_a_key_that_is_not_ascii(serve):
    """Clients send it as UTF-8."""
    server = serve(api_key="ключ-ü")
    with server.client() as client:
        for key, status in (("ключ-ü", 200), ("ключ-u", 401)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert client.get("/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize("size", [1001, 5000, 15_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body(serve, size, chunked):
    server = serve(max_request_bytes=1000)
    body = json.dumps(SHORT).encode().ljust(size)
    content = iter([body[i : i + 700] for i in range(0, size, 700)]) if chunked else body
    with server.client() as client:
        answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == "the body has more than 1000 bytes"
        good = client.post(
            "/v1/completions",
            content=json.dumps(SHORT).encode().ljust(1000),
            headers={"Content-Type": "application/json"},
        )
        assert good.status_code == 200


def test_a_body_without_end_is_not_read_for_ever(serve):
    server = serve(max_request_bytes=1000)
    with connection(server) as one, contextlib.suppress(ConnectionError):
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000000"
        one.sendall(head.encode() + b"\r\n\r\n")
        for _ in range(10_000):
            one.sendall(b" " * 10_000)
        pytest.fail("all of it was taken")


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHos"])
def test_headers_that_do_not_come(serve, sent):
    server = serve(receive_timeout=0.2)
    with connection(server) as one:
        start = time.monotonic()
        one.sendall(sent)
        assert rest(one) == b"" and 0.1 < time.monotonic() - start < 10


def test_headers_that_come_byte_by_byte(serve):
    server = serve(receive_timeout=0.2)
    with connection(server) as one, pytest.raises(ConnectionError):
        for _ in range(100):
            one.sendall(b"x")
            time.sleep(0.02)


def test_second_headers_that_do_not_come(serve):
    server = serve(receive_timeout=0.3)
    with connection(server) as one:
        one.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while b'{"status": "ok"}' not in answer:
            answer += one.recv(4096)
        start = time.monotonic()
        one.sendall(b"GET /health HTTP/1.1\r\n")
        assert rest(one) == b"" and 0.2 < time.monotonic() - start < 10


def test_a_body_that_does_not_come(serve):
    server = serve(receive_timeout=0.2)
    with connection(server) as one:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        start = time.monotonic()
        one.sendall(head.encode())
        answer = rest(one)
        assert 0.1 < time.monotonic() - start < 10
    assert answer.startswith(b"HTTP/1.1 408 ") and b"the body did not arrive within 0.2 s" in answer


def test_an_answer_may_take_longer_than_its_request(serve, gate):
    server = serve(receive_timeout=0.2)
    gate.clear()
    threading.Timer(0.6, gate.set).start()
    with server.client() as client:
        assert client.post("/v1/completions", json=SHORT).status_code == 200


def test_who_goes_away_before_the_body_is_there(serve):
    server = serve()
    with connection(server) as one:
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50")
        one.sendall(b"\r\n\r\n{")
        time.sleep(0.05)
    with server.client() as client:
        assert client.post("/v1/completions", json=SHORT).status_code == 200


def test_what_is_no_http(serve):
    server = serve()
    with connection(server) as one:
        one.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
        assert rest(one).startswith(b"HTTP/1.1 400 ")


def test_data_that_a_client_does_not_take_ends_the_connection(serve):
    """The kernel ends it; here is seen that it was told to."""
    server = serve()
    with connection(server):
        until(lambda: server.server.server_state.connections)
        (protocol,) = server.server.server_state.connections
        taken = protocol.transport.get_extra_info("socket")
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("stream", [False, True])
def test_nan_logits_end_their_request_alone(serve, monkeypatch, stream):
    server = serve()
    logits, calls = server.llm.engine.model.logits, iter(range(10_000))

    def broken(*args):
        out = logits(*args)
        if next(calls) == 2:
            out[0] = torch.nan
        return out

    expected = None
    with server.client() as client:
        expected = client.post("/v1/completions", json=SHORT).json()["choices"][0]["text"]
        monkeypatch.setattr(server.llm.engine.model, "logits", broken)

    async def main():
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            return await asyncio.gather(
                *(client.post("/v1/completions", json=SHORT | {"stream": stream}) for _ in range(4))
            )

    answers = asyncio.run(main())
    failed = [a for a in answers if "logits are NaN or infinite" in a.text]
    assert len(failed) == 1 and failed[0].status_code == (200 if stream else 500)
    if stream:
        last = failed[0].text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    for answer in answers:
        if answer is failed[0]:
            continue
        if stream:
            events = [json.loads(e.removeprefix("data: ")) for e in answer.text.split("\n\n")[:-2]]
            assert "".join(e["choices"][0]["text"] for e in events) == expected
        else:
            assert answer.json()["choices"][0]["text"] == expected


def test_the_openai_package_raises_what_broke_a_stream(serve, monkeypatch):
    server = serve()
    run, calls = server.llm.engine.runner.run, iter(range(10_000))

    def fail(scheduled):
        if next(calls) >= 3:
            raise RuntimeError("no more")
        return run(scheduled)

    monkeypatch.setattr(server.llm.engine.runner, "run", fail)
    with server.openai() as client:
        options = {"block_length": 2, "ignore_eos": True}
        stream = client.completions.create(model=MODEL, prompt="Hello", max_tokens=200, stream=True, extra_body=options)
        with pytest.raises(openai.APIError, match="the engine failed: RuntimeError: no more"):
            list(stream)


def test_an_engine_that_fails_is_not_healthy(serve, monkeypatch):
    server = serve()
    with server.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(server.llm.engine.runner, "run", lambda _: 1 / 0)
            for _ in range(3):
                answer = client.post("/v1/completions", json=SHORT)
                assert answer.status_code == 500 and "ZeroDivisionError" in answer.json()["error"]["message"]
            assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json=SHORT).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_server_that_shuts_down(served_llm, gate):
    """What runs finishes; what comes on an open connection is refused."""
    from tests.serve.conftest import running

    with running(served_llm) as server, server.client() as client:
        assert client.get("/health").status_code == 200
        gate.clear()
        with connection(server) as one:
            send(one, SHORT)
            until(lambda: server.pages_used)
            server.service.draining = True
            refused = client.post("/v1/completions", json=SHORT)
            assert refused.status_code == 503
            assert refused.json()["error"]["message"] == "the server is shutting down"
            assert client.get("/health").status_code == 503
            server.server.should_exit = True
            gate.set()
            assert b'"finish_reason": "length"' in rest(one)


def test_what_does_not_finish_in_time_is_told(served_llm, gate):
    from tests.serve.conftest import running

    with running(served_llm, shutdown_timeout=0.2) as server:
        with connection(server) as whole, connection(server) as streamed:
            send(whole, LONG)
            send(streamed, LONG | {"stream": True})
            until(lambda: len(server.llm.engine.scheduler.running) == 2)
            gate.clear()
            server.server.should_exit = True
            time.sleep(0.5)
            gate.set()
            message = b"the server is shutting down, and 0.2 s were not enough to finish this answer"
            answer = rest(whole)
            assert answer.startswith(b"HTTP/1.1 503 ") and message in answer
            assert message in rest(streamed)


def test_answers_do_not_depend_on_the_company(serve, served_llm):
    prompts = [f"{i} times" for i in range(12)]
    params = SamplingParams(max_tokens=12, block_length=4, ignore_eos=True)
    expected = [o.outputs[0].text for o in served_llm.generate(prompts, params, use_tqdm=False)]
    server = serve()
    body = {"model": MODEL, "max_tokens": 12, "block_length": 4, "ignore_eos": True}

    async def main():
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body | {"prompt": p}) for p in prompts))

    assert [a.json()["choices"][0]["text"] for a in asyncio.run(main())] == expected
