"""Users' own graders: functions of (row, text), named by a row. They run without a sandbox."""

import copy
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, SupportsFloat

from evals.questions.graders.limit import within

SECONDS = 60  # the limit for judging one answer


@cache
def load(name: str) -> Callable[[dict[str, Any], str], SupportsFloat]:
    """The function `package.module:function` or `package.module.function`; modules are also searched for in the working
    directory. Raises ValueError if there is none, or it does not take (row, text)."""
    module_name, _, attribute = name.rpartition(":" if ":" in name else ".")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"the grader {name!r} cannot be imported: {_told(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"the grader {name!r} cannot be found: {module_name} has no function {attribute!r}")
    try:
        inspect.signature(function).bind({}, "")
    except (TypeError, ValueError) as error:
        raise ValueError(f"the grader {name!r} must be a function of (row, text): {_told(error)}") from error
    return function


def version(name: str) -> str:
    """A hash of the file of the function's module; "unknown" if it has none."""
    file = getattr(inspect.getmodule(load(name)), "__file__", None)
    return f"sha256:{hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}" if file else "unknown"


def judge(row: dict[str, Any], text: str, name: str) -> float:
    """The function's score of an answer, from 0 to 1; a truth value is 0 or 1.

    Raises ValueError, naming row and function, if it raises, takes too long, or returns anything else.
    """
    where = f"row {row['id']}: the grader {name!r}"
    try:
        # a copy: the function may change its row
        found = within(SECONDS, load(name), copy.deepcopy(row), text, late=_LATE)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where} failed: {_told(error)}") from error
    if found is _LATE:
        raise ValueError(f"{where} took more than {SECONDS} s")
    if not isinstance(found, SupportsFloat) or not 0 <= float(found) <= 1:
        raise ValueError(f"{where} must return True, False or a number from 0 to 1, got {found!r:.100}")
    return float(found)


_LATE: Any = object()


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
