"""Hypothesis's profiles, and the random checkpoints and engines that the tests share."""

import hypothesis
import pytest
import torch

from blockinfer import LLM
from tests.checkpoints import write_checkpoint, write_tokenizer

hypothesis.settings.register_profile("ci", max_examples=25, derandomize=True, deadline=None)
hypothesis.settings.register_profile("gpu", max_examples=300, deadline=None)
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
