"""A live server under load: requests through httpx, their results, and the same requests without HTTP."""

import asyncio
import contextlib
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from blockinfer import LLM, SamplingParams
from evals.runs.configurations import SERVING

if TYPE_CHECKING:
    import httpx

# Options of a request that the engine and the server take alike.
Request = dict[str, Any]
# A server that takes longer to answer is an error.
_STARTED_SECONDS = 1800.0


class Answer(NamedTuple):
    """One request, in seconds since it was sent: when each chunk of text came, and its end."""

    blocks: list[float]
    seconds: float
    tokens: int


class Load(NamedTuple):
    """Requests sent to a server, and the wall time from the first one's arrival to the last one's end."""

    answers: list[Answer]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Server(NamedTuple):
    """A process that serves at `url`."""

    url: str
    pid: int

    @property
    def cpu_seconds(self) -> float:
        """The CPU time that it has used so far."""
        with open(f"/proc/{self.pid}/stat") as stat:
            user, system = stat.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def live_server(model: str, arguments: Sequence[str]) -> Iterator[Server]:
    """`python -m blockinfer.serve` as a process of its own. Raises RuntimeError, with its output, if it does not
    start."""
    command = [sys.executable, "-m", "blockinfer.serve", model, "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    address: list[str] = []
    told = threading.Event()

    def read() -> None:
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"blockinfer: (http://\S+)", line):
                address.append(found[1])
                told.set()
        told.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        told.wait(_STARTED_SECONDS)
        if not address:
            raise RuntimeError(f"the server did not start: {''.join(log[-1:]).strip()}")
        yield Server(address[0], process.pid)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        process.stderr.close()


def poisson(number: int, rate: float, seed: int = 0) -> list[float]:
    """Arrival times of `number` requests, in seconds from the first, `rate` a second on average; the same in every
    run."""
    draw, at, arrivals = random.Random(seed).random, 0.0, []
    for _ in range(number):
        arrivals.append(at)
        at -= math.log(1 - draw()) / rate
    return arrivals


def send(url: str, model: str, requests: Sequence[Request], arrivals: Sequence[float]) -> Load:
    """Sends all requests, streamed, each when it is due."""
    return asyncio.run(_send(url, model, requests, arrivals))


async def _send(url: str, model: str, requests: Sequence[Request], arrivals: Sequence[float]) -> Load:
    # the rest of the suite does without this package
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        start = time.perf_counter()

        async def one(request: Request, at: float) -> Answer:
            await asyncio.sleep(start + at - time.perf_counter())
            return await _ask(client, {"model": model, "stream": True} | request)

        answers = await asyncio.gather(*map(one, requests, arrivals))
        return Load(answers, time.perf_counter() - start)


async def _ask(client: "httpx.AsyncClient", body: dict[str, Any]) -> Answer:
    body |= {"stream_options": {"include_usage": True}}
    start, blocks, tokens = time.perf_counter(), [], None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"the server answered {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(f"the server failed: {chunk['error']['message']}")
            if chunk["choices"] and chunk["choices"][0]["text"]:
                blocks.append(time.perf_counter() - start)
            tokens = (chunk["usage"] or {}).get("completion_tokens")
    return Answer(blocks, time.perf_counter() - start, tokens)


def without_http(llm: LLM, requests: Sequence[Request]) -> tuple[float, int]:
    """Sends the same requests, all at once, to the engine -> seconds, tokens."""
    options = [{name: value for name, value in request.items() if name != "prompt"} for request in requests]
    start = time.perf_counter()
    prompts, params = [request["prompt"] for request in requests], [SamplingParams(**one) for one in options]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start, sum(len(output.outputs[0].token_ids) for output in outputs)


def figures(load: Load) -> dict[str, Any]:
    """What is stored of a load: p50 and p99 in milliseconds."""
    firsts = [answer.blocks[0] for answer in load.answers if answer.blocks]
    between = [b - a for answer in load.answers for a, b in zip(answer.blocks, answer.blocks[1:], strict=False)]
    times = {"first_block": firsts, "between_blocks": between, "request": [a.seconds for a in load.answers]}
    shares = {f"{name}_p{p}_ms": _percentile(values, p) for name, values in times.items() for p in (50, 99)}
    known = {"tokens": load.tokens, "seconds": load.seconds, "tokens_per_second": load.tokens_per_second}
    return known | {"requests_per_second": len(load.answers) / load.seconds} | shares


def _percentile(seconds: list[float], percent: int) -> float | None:
    """By nearest rank, in milliseconds; None if there are no values."""
    return 1000 * sorted(seconds)[math.ceil(percent / 100 * len(seconds)) - 1] if seconds else None


def beside_engine(
    loads: Sequence[Load], alone: Sequence[tuple[float, int]], cpu: tuple[float, float] | None = None
) -> dict[str, Any]:
    """The server's tokens/s and those of the engine without HTTP, in alternating rounds: the fastest of each, since
    other load on the machine only slows them down. cpu: the CPU seconds of server and engine in all rounds, whose ratio
    other load hardly changes."""
    engine = [tokens / seconds for seconds, tokens in alone]
    server = [load.tokens_per_second for load in loads]
    rounds = [one / other for one, other in zip(server, engine, strict=True)]
    best = {"engine_tokens_per_second": max(engine), "of_engine": max(server) / max(engine)}
    return best | {"of_engine_rounds": rounds, "of_engine_cpu": cpu[1] / cpu[0] if cpu else None}


def table(infos: list[dict[str, Any]]) -> list[str]:
    """A line for each load, and the server's share of the engine's speed."""
    heads = "tokens/s", "requests/s", "first block ms", "between blocks ms", "request ms"
    lines = [f"{'load':<16}" + "".join(f"{head:>20}" for head in heads), f"{'':<56}" + f"{'p50 / p99':>20}" * 3]
    for info in infos:
        pairs = [(info[f"{n}_p50_ms"], info[f"{n}_p99_ms"]) for n in ("first_block", "between_blocks", "request")]
        cells = [f"{info['tokens_per_second']:.1f}", f"{info['requests_per_second']:.2f}"]
        cells += ["-" if None in pair else f"{pair[0]:.0f} / {pair[1]:.0f}" for pair in pairs]
        lines.append(f"{info[SERVING]:<16}" + "".join(f"{cell:>20}" for cell in cells))
    for info in infos:
        if "of_engine" in info:
            share, speed = 100 * info["of_engine"], info["engine_tokens_per_second"]
            by_cpu = f", {100 * info['of_engine_cpu']:.1f} % by CPU time" if info["of_engine_cpu"] else ""
            lines.append(f"{info[SERVING]}: {share:.1f} % of the {speed:.1f} tokens/s without HTTP{by_cpu}")
    return lines
