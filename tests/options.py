"""The suite's options at their defaults, as the tests want them whatever stands on their own command line."""

import argparse
import runpy
from pathlib import Path
from typing import Any

# dest: default, of what the root conftest.py adds
_parser = argparse.ArgumentParser()
_parser.getgroup = lambda *about: _parser
_parser.addoption = _parser.add_argument
runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))["pytest_addoption"](_parser)
DEFAULTS = vars(_parser.parse_args([]))


class Options:
    """What read_settings asks of pytest's config; options of other plugins are None."""

    def __init__(self, **changed: Any) -> None:
        self.values = DEFAULTS | changed

    def getoption(self, name: str) -> Any:
        return self.values.get(name.removeprefix("--").replace("-", "_"))
