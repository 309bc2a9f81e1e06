"""A live server: `python -m blockinfer.serve` as a process of its own, and requests through httpx.

`at-once` sends as many requests as run at once, and sends them again without HTTP to an engine of this process, in
turn: the server's tokens/s must be at least BAR of the engine's, taking the fastest round of each; on a CPU, which
others may use too, its CPU time a token is reported as well. The other cases are Poisson arrivals at shares of the rate
that `at-once` reached: tokens/s, and p50 and p99 of the time to the first block, between blocks and of whole requests.
All requests are random token ids, with answers of one length in 8 steps a block, streamed.

It runs on a GPU, or if the file is named. The model is that of evals/test_steps.py.
"""

import random
import time

import pytest

from blockinfer import LLM
from evals.conftest import close_suite, refuse_others, settings_of
from evals.runs.configurations import SERVING
from evals.runs.rounds import record
from evals.test_steps import measured_model
from evals.timing.serving import beside_engine, figures, live_server, poisson, send, without_http
from evals.timing.steps import environment_of, random_prompts

for package in ("fastapi", "httpx", "prometheus_client", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed: it comes with '.[test]'")

AT_ONCE = 32
BAR = {"cuda": 0.95, "cpu": 0.85}
# prompts and answers in tokens, requests of a Poisson case, rounds of at-once
SIZES = {"cuda": (128, 256, 200, 5), "cpu": (32, 64, 48, 5)}
SHARES = (0.25, 0.5, 0.75, 1.0)
# for two engines on one GPU, of requests of these sizes
KV_CACHE = 8 << 30


@pytest.fixture(scope="module")
def settings(request):
    close_suite(request.config)
    return measured_model(settings_of(request.config), request.config.getoption("--model"))


@pytest.fixture(scope="module")
def options(settings):
    """The engine's options, with HTTP and without."""
    options = {name: value for name, value in settings.engine_options.items() if value is not None}
    options |= {"max_num_seqs": AT_ONCE, "tokenizer": settings.tokenizer}
    if settings.load_format == "dummy" and settings.tokenizer is None:
        # any token will do: answers are text, and the prompts are not
        options["tokenizer"] = "evals/llada_tiny"
    return options | ({"kv_cache_memory": KV_CACHE} if settings.device == "cuda" else {})


@pytest.fixture(scope="module")
def llm(settings, options):
    try:
        llm = LLM(settings.model, **options)
    except (ValueError, OSError) as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    with llm:
        yield llm


@pytest.fixture(scope="module")
def server(settings, options, llm):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    with live_server(str(settings.model), [*arguments, "--max-queue=100000"]) as server:
        yield server


@pytest.fixture(scope="module")
def requests(settings, llm):
    """requests(number, seed): random ones."""
    prompt, new, _, _ = SIZES[settings.device]

    def make(number, seed=0):
        # without EOS every block has text
        fixed = {"max_tokens": new, "block_length": 32, "denoising_steps": 8, "logits_eos_inf": True}
        fixed["ignore_eos"] = True
        return [{"prompt": ids} | fixed for ids in random_prompts(llm, [(prompt, new)] * number, seed)]

    return make


@pytest.fixture
def about(request, settings, llm, benchmark):
    """about(name, requests): what the figures depend on."""

    def tell(name, requests):
        prompt, new, _, _ = SIZES[settings.device]
        known = environment_of(settings, llm) | {SERVING: name, "requests": len(requests), "max_num_seqs": AT_ONCE}
        known |= {"prompt_tokens": prompt, "new_tokens": new, "block_length": 32, "denoising_steps": 8}
        refuse_others(request, known)
        benchmark.extra_info.update(known)

    return tell


@pytest.fixture(scope="module")
def capacity(settings, server, requests):
    """Requests a second, once everything is warm."""
    sent = requests(AT_ONCE, seed=1)
    name = str(settings.model)
    send(server.url, name, sent, [0.0] * AT_ONCE)
    return AT_ONCE / send(server.url, name, sent, [0.0] * AT_ONCE).seconds


@pytest.mark.benchmark(group="serving")
def test_at_once(benchmark, about, settings, llm, server, requests, capacity):
    sent = requests(AT_ONCE)
    about("at-once", sent)
    without_http(llm, sent)
    alone, loads, cpu = [], [], [0.0, 0.0]

    def rounds():
        for _ in range(SIZES[settings.device][3]):
            before = server.cpu_seconds, time.process_time()
            alone.append(without_http(llm, sent))
            cpu[1] += time.process_time() - before[1]
            loads.append(send(server.url, str(settings.model), sent, [0.0] * AT_ONCE))
            cpu[0] += server.cpu_seconds - before[0]
        return [load.seconds for load in loads]

    record(benchmark, rounds)
    of_cpu = tuple(cpu) if settings.device == "cpu" else None
    info = figures(min(loads, key=lambda load: load.seconds)) | beside_engine(loads, alone, of_cpu)
    benchmark.extra_info.update(info)
    assert info["of_engine"] >= BAR[settings.device]


@pytest.mark.benchmark(group="serving: Poisson arrivals")
@pytest.mark.parametrize("share", SHARES)
def test_poisson(benchmark, about, settings, server, requests, capacity, share):
    number = SIZES[settings.device][2]
    sent, loads = requests(number, seed=2), []
    about(f"poisson-{share:g}", sent)
    arrivals = poisson(number, share * capacity, seed=random.Random(str(share)).randrange(2**32))

    def rounds():
        loads.append(send(server.url, str(settings.model), sent, arrivals))
        return [loads[0].seconds]

    record(benchmark, rounds)
    benchmark.extra_info.update(figures(loads[0]) | {"rate": share * capacity, "share_of_capacity": share})
