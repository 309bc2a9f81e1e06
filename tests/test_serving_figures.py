"""The figures of a server under load, and who runs the loads."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from blockinfer import LLM
from evals.timing.serving import Answer, Load, beside_engine, figures, live_server, poisson, send, table, without_http

ROOT = Path(__file__).parent.parent
REQUEST = {"prompt": [5, 6, 7], "max_tokens": 12, "block_length": 4, "ignore_eos": True}


def test_poisson_arrivals():
    arrivals = poisson(2000, 4.0)
    gaps = [b - a for a, b in zip(arrivals, arrivals[1:], strict=False)]
    assert arrivals == poisson(2000, 4.0) != poisson(2000, 4.0, seed=1) and arrivals[0] == 0
    # the mean and the deviation of an exponential distribution are alike; of 2,000 each is known to some 2 %
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.15)


def test_figures_of_a_load():
    answers = [Answer([0.1 * i, 0.1 * i + 0.05], 0.1 * i + 0.06, 10) for i in range(1, 101)]
    info = figures(Load([*answers, Answer([], 20.0, 0)], 50.0))
    assert info["tokens"] == 1000 and info["tokens_per_second"] == 20 and info["requests_per_second"] == 2.02
    wanted = {"first_block_p50_ms": 5000, "first_block_p99_ms": 9900, "between_blocks_p50_ms": 50}
    wanted |= {"between_blocks_p99_ms": 50, "request_p50_ms": 5160, "request_p99_ms": 10_060}
    assert {name: info[name] for name in wanted} == pytest.approx(wanted)


def test_a_load_of_single_blocks_has_no_time_between_them():
    info = figures(Load([Answer([0.1], 0.2, 3)], 1.0))
    assert info["between_blocks_p50_ms"] is None and info["first_block_p99_ms"] == pytest.approx(100)
    (line,) = [line for line in table([info | {"serving": "one"}]) if line.startswith("one")]
    assert line.split() == ["one", "3.0", "1.00", "100", "/", "100", "-", "200", "/", "200"]


def test_the_server_beside_the_engine():
    loads = [Load([Answer([], 1.0, 90)], seconds) for seconds in (1.0, 2.0, 1.0)]
    info = beside_engine(loads, [(1.0, 100), (1.5, 90), (1.0, 100)])
    assert info["of_engine"] == pytest.approx(0.9) and info["engine_tokens_per_second"] == 100
    assert info["of_engine_rounds"] == pytest.approx([0.9, 0.75, 0.9])
    load = figures(loads[0]) | {"serving": "at-once"} | info
    assert info["of_engine_cpu"] is None and table([load])[-1] == "at-once: 90.0 % of the 100.0 tokens/s without HTTP"
    load |= beside_engine(loads, [(1.0, 100), (1.5, 90), (1.0, 100)], (5.0, 4.9))
    assert table([load])[-1].endswith("without HTTP, 98.0 % by CPU time")


def test_a_live_server_s_answers_are_the_engine_s(checkpoint):
    with LLM(checkpoint, device="cpu") as llm:
        seconds, tokens = without_http(llm, [REQUEST] * 3)
    assert tokens == 36 and seconds > 0
    with live_server(str(checkpoint), ["--device=cpu"]) as server:
        before = server.cpu_seconds
        load = send(server.url, str(checkpoint), [REQUEST] * 3, [0.0, 0.1, 0.2])
        assert load.tokens == 36 and load.seconds > 0.2
        assert all(answer.seconds < load.seconds for answer in load.answers)
        assert 0 < before < server.cpu_seconds < 60
        with pytest.raises(RuntimeError, match="the server answered 400: .*max_tokens must be at least 1"):
            send(server.url, str(checkpoint), [REQUEST | {"max_tokens": 0}], [0.0])


def test_a_server_that_does_not_start_says_why():
    with pytest.raises(RuntimeError, match="^the server did not start: .*: argument --max-queue: must be"):
        with live_server("/nowhere", ["--max-queue=-1"]):
            pytest.fail("it started")


def test_on_a_cpu_a_server_is_timed_only_where_that_is_asked_for():
    command = [sys.executable, "-m", "pytest", "evals", "--collect-only", "-q", "--device=cpu"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert "test_throughput.py::" in out and "test_serving.py::" not in out
