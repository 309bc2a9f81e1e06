"""The command line's settings."""

import pytest

from evals.settings import read_settings
from tests.test_rows import GSM, MATH, MMLU, QA, write


@pytest.fixture
def settings(pytestconfig, tmp_path):
    """read_settings of the command line's defaults on a CPU, with some options changed."""
    dataset = write(tmp_path / "rows.jsonl", [GSM, MATH, MMLU, QA])

    class Config:
        def __init__(self, **changed):
            self.changed = {"dataset": str(dataset), "device": "cpu"} | changed

        def getoption(self, name):
            key = name.removeprefix("--").replace("-", "_")
            return self.changed[key] if key in self.changed else pytestconfig.getoption(name)

    return lambda **changed: read_settings(Config(**changed))
