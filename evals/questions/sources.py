"""The sources that the suite knows, and the grader of a row's answers."""

import re
import string
from collections.abc import Mapping
from typing import Any

# Each with its grader, which its rows need not name.
SOURCES = {"gsm8k": "number", "math500": "math", "mmlu": "choice", "longbench_hotpotqa": "squad"}
GRADERS = ("number", "math", "choice", "squad")
# A user's own function: package.module:function, or package.module.function.
FUNCTION = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*[.:][^\W\d]\w*")
# It is part of tests' ids, and --source takes a comma-separated list.
SOURCE = re.compile(r"[\w.+/-]{1,60}")
LETTERS = string.ascii_uppercase


def grader_of(row: Mapping[str, Any]) -> str:
    """One of GRADERS, or a function's path. Raises ValueError for a row without one."""
    name = SOURCES.get(row["source"]) or row.get("grader")
    if name is None:
        raise ValueError(f"row {row.get('id')}: there is no grader for the source {row['source']!r}")
    return name
