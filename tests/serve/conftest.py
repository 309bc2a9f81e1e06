"""Servers on the random checkpoint, each on a thread of this process, and their clients."""

import contextlib
import dataclasses
import socket
import threading
import time

import httpx
import openai
import pytest

from blockinfer import LLM
from blockinfer.async_llm import AsyncLLM
from blockinfer.serve.__main__ import make_parser
from blockinfer.serve.server import Server
from blockinfer.serve.service import ServeOptions, Service

MODEL = "random"
KEY = "sk-none"
# the command's
DEFAULTS = {
    name: value
    for name, value in vars(make_parser().parse_args([MODEL])).items()
    if name in ServeOptions.__dataclass_fields__
}


@dataclasses.dataclass
class Running:
    """A server that answers; `llm` is what it serves, and nothing else may use it meanwhile."""

    llm: LLM
    service: Service
    server: Server
    url: str

    @property
    def pages_used(self):
        return self.llm.engine.pool.num_pages - self.llm.engine.pool.num_free

    def is_empty(self):
        return not self.llm.engine.has_unfinished() and not self.service.in_flight and not self.pages_used

    def client(self, **options):
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def openai(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=30)

    def async_openai(self):
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=30)


def until(condition, seconds=20):
    """Waits for it, so long at most."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.002)


@contextlib.contextmanager
def running(llm, **options):
    service = Service(AsyncLLM(llm), ServeOptions(**DEFAULTS | options))
    server = Server(service, log_level="critical")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            until(lambda: server.started)
            yield Running(llm, service, server, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(30)
            service.engine.close()
    assert not thread.is_alive()


@pytest.fixture(scope="package")
def served_llm(checkpoint):
    with LLM(checkpoint, device="cpu", dtype="float64", max_num_seqs=4, seed=1) as llm:
        yield llm


@pytest.fixture
def serve(served_llm):
    """serve(**options) -> a server that ends with the test, which must leave it empty."""
    with contextlib.ExitStack() as stack:

        def start(**options):
            server = stack.enter_context(running(served_llm, **options))
            stack.callback(until, server.is_empty)
            return server

        yield start


@pytest.fixture(scope="module")
def server(served_llm):
    """One for many requests."""
    with running(served_llm) as server:
        yield server
        until(server.is_empty)
