"""Random checkpoints and engines shared by the tests."""

import pytest

from blockinfer import LLM
from tests.checkpoints import write_checkpoint, write_tokenizer


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
