"""Hypothesis's profiles, and the random checkpoints and engines that the tests share."""

import os
import signal
from contextlib import ExitStack

import hypothesis
import pytest
import torch

from blockinfer import LLM
from evals.results.samples import Samples
from evals.runs.resume import Generations
from evals.runs.settings import read_settings
from evals.suite import Suite
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.options import Options
from tests.test_rows import GSM, MMLU, QA, write

# a worker of pytest-xdist says so to the processes that tests start, whose pytest-benchmark would measure nothing
os.environ.pop("PYTEST_XDIST_WORKER", None)

hypothesis.settings.register_profile("ci", max_examples=25, derandomize=True, deadline=None)
# on a GPU most examples compile a kernel, about a second each
hypothesis.settings.register_profile("gpu", max_examples=100, deadline=None)
# under a tool that slows kernels down: pytest --hypothesis-profile=few
hypothesis.settings.register_profile("few", max_examples=8, derandomize=True, deadline=None)
hypothesis.settings.load_profile("gpu" if torch.cuda.is_available() else "ci")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A dense random checkpoint with a byte-level tokenizer and a chat template."""
    folder = write_checkpoint(tmp_path_factory.mktemp("dense"), vocab_size=300)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def shared_llm(checkpoint):
    with LLM(checkpoint, device="cpu", dtype="float64", max_num_seqs=8) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm):
    """The shared engine, which every test must leave empty, with all its pages free."""
    yield shared_llm
    assert not shared_llm.engine.has_unfinished()
    assert shared_llm.engine.pool.num_free == shared_llm.engine.pool.num_pages


@pytest.fixture(scope="session")
def chat_llm(tmp_path_factory):
    # every fifth token ends an answer, so that lengths differ
    options = dict(vocab_size=300, max_sequence_length=1024, eos_token_id=[295, *range(0, 295, 5)])
    folder = write_checkpoint(tmp_path_factory.mktemp("chat"), **options)
    write_tokenizer(folder)
    with LLM(folder, device="cpu", dtype="float64", max_num_seqs=1) as llm:
        yield llm


@pytest.fixture
def make_suite(tmp_path, chat_llm):
    """A suite of seven rows, two of which ask the same, and two configurations, a row at a time.

    `resume=` is its file, which the next suite finds closed.
    """
    rows = [GSM, MMLU, QA | {"revision": "LongBench@1"}, GSM | {"id": "a2"}, MMLU | {"id": "b2", "question": "Which?"}]
    rows += [GSM | {"id": "a3", "question": "3 + 4?"}, GSM | {"id": "a4", "question": "Half of 8?"}]
    dataset = write(tmp_path / "rows.jsonl", rows)
    fixed = {"dataset": str(dataset), "model": str(chat_llm.config.model), "device": "cpu", "max_tokens": 12}
    fixed |= {"samples": os.devnull, "block_length": [8], "batch_size": 1, "mode": ["vanilla", "block"]}
    fixed |= {"max_seconds": 600.0, "relative_error": 9.0}  # three rounds

    def make(**changed):
        settings = read_settings(Options(**(fixed | changed)))
        opened.close()
        kept = opened.enter_context(Generations(settings.resume)) if settings.resume else None
        samples = opened.enter_context(Samples(settings.samples)) if settings.samples else None
        return Suite(chat_llm, settings, kept, samples=samples)

    with ExitStack() as opened:
        yield make


@pytest.fixture
def heeding_signals():
    """A shell's background ignores SIGINT and nohup SIGHUP, and what they start would do so as well."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
