import pytest
from transformers import PreTrainedTokenizerFast

from evals.runs.settings import TINY_MODEL


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(TINY_MODEL)
