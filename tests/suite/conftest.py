"""The command line's settings."""

import pytest

from evals.runs.settings import read_settings
from tests.options import Options
from tests.test_rows import GSM, MATH, MMLU, QA, write


@pytest.fixture
def settings(tmp_path):
    """read_settings of the command line's defaults on a CPU, with some options changed."""
    dataset = write(tmp_path / "rows.jsonl", [GSM, MATH, MMLU, QA])
    return lambda **changed: read_settings(Options(**({"dataset": str(dataset), "device": "cpu"} | changed)))
