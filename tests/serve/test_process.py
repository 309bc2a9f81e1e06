"""The command itself: its options, its end, and two hundred requests at once, of which a third goes away."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from blockinfer import LLM, SamplingParams
from blockinfer.serve.__main__ import _bind, main
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.serve.conftest import until

NUM_PAGES = 60


class Process:
    """A server of its own process; `url` is there once it answers."""

    def __init__(self, *arguments, cwd=None, **environment):
        command = [sys.executable, "-m", "blockinfer.serve", *map(str, arguments), "--port", "0", "--device", "cpu"]
        options = dict(stderr=subprocess.PIPE, text=True, cwd=cwd, env=os.environ | environment)
        self.process = subprocess.Popen(command, **options)
        self.log, self.url = [], None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"blockinfer: (http://\S+)", line):
                self.url = found[1]

    def __enter__(self):
        try:
            until(lambda: self.url or self.process.poll() is not None, 60)
            assert self.url, "".join(self.log)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A checkpoint whose canvas of a thousand positions takes some 10 ms a step."""
    folder = write_checkpoint(
        tmp_path_factory.mktemp("slow"), vocab_size=300, d_model=64, mlp_hidden_size=128, max_sequence_length=1024
    )
    write_tokenizer(folder)
    return folder


def ask(slow, tokens):
    return {"model": str(slow), "prompt": "Hello", "stream": True, "max_tokens": tokens, "mode": "vanilla"} | {
        "ignore_eos": True
    }


@pytest.mark.usefixtures("heeding_signals")
def test_sigterm_lets_what_runs_finish(slow):
    with Process(slow, BLOCKINFER_API_KEY="sk-env") as server, httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = "Bearer sk-env"
        with client.stream("POST", "/v1/completions", json=ask(slow, 160)) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "Shutting down" in "".join(server.log))
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{server.url}/health")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert server.process.wait(20) == -signal.SIGTERM
    assert "Traceback" not in "".join(server.log)


@pytest.mark.usefixtures("heeding_signals")
def test_ctrl_c_ends_what_does_not_finish_in_time(slow):
    with Process(slow, "--shutdown-timeout", "0.3", "--served-model-name", "slow") as server:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            with client.stream("POST", "/v1/completions", json=ask("slow", 1000)) as answer:
                lines = answer.iter_lines()
                next(lines)
                start = time.monotonic()
                server.process.send_signal(signal.SIGINT)
                *_, last = (line for line in lines if line)
            assert "0.3 s were not enough to finish this answer" in last and time.monotonic() - start < 10
        assert server.process.wait(20) == 130
    assert "Traceback" not in "".join(server.log)


def test_two_hundred_at_once_of_which_a_third_goes_away(checkpoint):
    """Streamed or whole, with too few pages, twice: none is lost or mixed up, and nothing is left."""
    draw = random.Random(0)
    prompts = [f"Prompt {i}: {'x' * draw.randint(0, 40)}" for i in range(200)]
    params = [
        SamplingParams(
            max_tokens=draw.randint(1, 40), block_length=4, ignore_eos=True, temperature=0.7, seed=i, mode=mode
        )
        for i, mode in enumerate(draw.choices(["block", "dual_cache", "vanilla"], [6, 1, 1], k=200))
    ]
    with LLM(checkpoint, device="cpu", dtype="float64") as llm:
        expected = [o.outputs[0].text for o in llm.generate(prompts, params, use_tqdm=False)]
        page_bytes = llm.engine.runner.kv_pages[:, :, 0].nbytes
    limits = ["--max-num-seqs", 16, "--kv-cache-memory", NUM_PAGES * page_bytes, "--dtype", "float64"]
    with Process(checkpoint, *limits) as server:
        first = asyncio.run(storm(server.url, str(checkpoint), prompts, params, expected, seed=1))
        before = resident(server.process.pid)
        second = asyncio.run(storm(server.url, str(checkpoint), prompts, params, expected, seed=2))
        grown = resident(server.process.pid) - before
        text = httpx.get(f"{server.url}/metrics").text
        assert "Traceback" not in "".join(server.log)
    counts = dict(re.findall(r'requests_total\{.*status="(\w+)"\} ([\d.]+)', text))
    answered, aborted = float(counts["200"]), float(counts["aborted"])
    # who left while connecting is in neither
    assert counts.keys() == {"200", "aborted"} and first + second <= answered <= 400 - aborted
    assert aborted >= 20
    assert grown < 20 << 20


async def storm(url, model, prompts, params, expected, seed):
    """Sends all of them; every third goes away at some moment -> how many were answered, rightly."""
    draw = random.Random(seed)
    leave = {i: draw.random() * 1.5 for i in draw.sample(range(len(prompts)), 67)}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def one(i):
            body = {name: getattr(params[i], name) for name in ("max_tokens", "temperature", "seed", "mode")}
            body |= {"model": model, "prompt": prompts[i], "block_length": 4, "ignore_eos": True, "stream": i % 2 == 0}
            assert await text_of(client, body) == expected[i]

        tasks = [asyncio.create_task(one(i)) for i in range(len(prompts))]
        for i, seconds in leave.items():
            asyncio.get_running_loop().call_later(seconds, tasks[i].cancel)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        lost = [(i, r) for i, r in enumerate(results) if r is not None and not isinstance(r, asyncio.CancelledError)]
        assert not lost and all(results[i] is None for i in range(len(prompts)) if i not in leave)
        while re.search(r"^blockinfer_(kv_pages_used|requests_(running|waiting)) [^0]", await metrics(client), re.M):
            await asyncio.sleep(0.01)
        return sum(r is None for r in results)


async def metrics(client):
    return (await client.get("/metrics")).text


async def text_of(client, body):
    if not body["stream"]:
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]
    text = ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            elif line == "data: [DONE]":
                return text
    raise AssertionError("the stream broke off")


def resident(pid):
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: model"),
        (["MODEL", "--port", "70000"], "--port: must be an integer from 0 to 65535, got '70000'"),
        (["MODEL", "--port", "http"], "--port: must be an integer from 0 to 65535, got 'http'"),
        (["MODEL", "--max-queue", "-1"], "--max-queue: must be an integer of at least 0, got '-1'"),
        (["MODEL", "--max-request-bytes", "0"], "must be an integer of at least 1, got '0'"),
        (["MODEL", "--receive-timeout", "nan"], "--receive-timeout: must be a number of at least 0.01, got 'nan'"),
        (["MODEL", "--shutdown-timeout", "inf"], "--shutdown-timeout: must be a number of at least 0, got 'inf'"),
        (["MODEL", "--max-num-seqs", "many"], "--max-num-seqs: invalid int value: 'many'"),
        (["MODEL", "--max-num-seqs", "0"], "max_num_seqs must be at least 1, got 0"),
        (["MODEL", "--max-num", "4"], "unrecognized arguments: --max-num 4"),
        (
            ["MODEL", "--cudagraph-capture-sizes", "8,x"],
            "--cudagraph-capture-sizes: must be integers, as 8,16,32, got '8,x'",
        ),
        (["MODEL", "--dtype", "float8"], "dtype must be one of auto, float64"),
        (["MODEL", "--quantization", "fp9"], "quantization must be one of fp8, got 'fp9'"),
        (["MODEL", "--served-model-name", ""], "--served-model-name must not be empty"),
        (["MODEL", "--api-key", ""], "--api-key must not be empty"),
        (["/nowhere/at/all", "--api-key", "sk-1\n"], "the key of --api-key or BLOCKINFER_API_KEY has spaces around it"),
        (["/nowhere/at/all"], "/nowhere/at/all"),
        (["MODEL", "--host", "no such host"], "cannot listen on no such host:0: "),
        (["MODEL", "--host", "a..b"], "cannot listen on a..b:0: this cannot be the name of a host"),
    ],
)
def test_options_that_cannot_be_used(checkpoint, capsys, arguments, message):
    arguments = [str(checkpoint) if a == "MODEL" else a for a in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["--port", "0", "--device", "cpu", *arguments])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and last.startswith("python -m blockinfer.serve: error: ") and message in last


def test_a_model_without_a_tokenizer(tmp_path, capsys):
    write_checkpoint(tmp_path)
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--port", "0", "--device", "cpu"])
    assert "there is no tokenizer, and answers are text; pass --tokenizer" in capsys.readouterr().err


def test_an_address_that_is_taken_is_told_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            main(["/nowhere/at/all", "--port", str(port)])
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_an_address_that_was_taken_while_the_model_was_loaded(checkpoint, capsys, monkeypatch):
    """Two servers can bind it until one listens."""
    with _bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]

        def load(**options):
            taken.listen()
            return LLM(**options)

        monkeypatch.setattr("blockinfer.serve.__main__.LLM", load)
        with pytest.raises(SystemExit):
            main([str(checkpoint), "--device", "cpu", "--port", str(port)])
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_without_the_extra_s_packages(checkpoint, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "blockinfer.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with contextlib.suppress(SystemExit):
        main([str(checkpoint)])
    assert "pip install 'blockinfer[serve]'" in capsys.readouterr().err


def test_every_option_of_the_engine_can_be_given(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    names = LLM.__init__.__kwdefaults__
    assert ended.value.code == 0 and len(names) > 10
    assert not [name for name in names if "--" + name.replace("_", "-") not in text]
