"""The graders, each with a version that is stored with every result.

`number` (gsm8k) judges by exact arithmetic, `math` (math500) by math-verify if texts and numbers do not settle it,
`choice` (mmlu) by the letter settled on, `squad` (longbench_hotpotqa) by the words stated; LongBench's own F1 stands
beside it. Rows of other sources name one of these, or a user's function. math-verify is imported late, as nothing is
graded with random weights.
"""

import importlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from evals.questions.graders import own
from evals.questions.graders.letters import grade_letter
from evals.questions.graders.limit import within
from evals.questions.graders.mathematics import grade_math
from evals.questions.graders.numbers import grade_number
from evals.questions.graders.spans import grade_span, longbench_f1
from evals.questions.sources import GRADERS, grader_of

GRADER_VERSIONS = {"gsm8k": 5, "math500": 5, "mmlu": 6, "longbench_hotpotqa": 5}


SECONDS = 5  # the limit for judging one answer; one that takes longer is wrong


class Grade(NamedTuple):
    """correct decides the accuracy; score is the grader's finer measure, from 0 to 1: for `squad` the F1 of the stated
    answer, for a function its result, correct only if 1. longbench_f1 is LongBench's own measure, None for the other
    sources. extracted is the text that the grader took for the answer and judged, for a function the whole text; None
    if the text is empty, says that it does not know, names several answers, or holds nothing that could be one, and if
    judging took too long."""

    correct: bool
    score: float
    longbench_f1: float | None = None
    extracted: str | None = None


def require(rows: Iterable[dict[str, Any]]) -> None:
    """Imports what grading these rows needs. Raises ImportError, saying how to install what is missing."""
    for source in dict.fromkeys(row["source"] for row in rows if grader_of(row) in ("number", "math")):
        try:
            importlib.import_module("math_verify")
        except ImportError as error:
            raise ImportError(
                f"grading {source} needs math_verify: pip install 'blockinfer[test]' ({error})"
            ) from error


def versions(rows: Iterable[dict[str, Any]]) -> dict[str, int | str]:
    """The versions of these rows' graders, and for each function a hash of its file.

    Raises ValueError for a function that does not exist.
    """
    named = dict.fromkeys(grader_of(row) for row in rows)
    return GRADER_VERSIONS | {name: own.version(name) for name in named if name not in GRADERS}


def grade(row: dict[str, Any], text: str) -> Grade:
    """Judges the answer `text` to `row`. Raises ValueError for a row without a grader, and if a function fails."""
    name = grader_of(row)
    if name not in GRADERS:
        score = own.judge(row, text, name)
        return Grade(score == 1, score, extracted=text.strip() or None)
    return within(
        SECONDS,
        _GRADERS[name],
        row,
        text,
        late=Grade(False, 0.0, 0.0 if row["source"] == "longbench_hotpotqa" else None),
    )


def _number(row: dict[str, Any], text: str) -> Grade:
    correct, extracted = grade_number(row, text)
    if correct is None:
        correct, extracted = grade_math(row, text)
    return Grade(correct, float(correct), extracted=extracted)


def _math(row: dict[str, Any], text: str) -> Grade:
    correct, extracted = grade_math(row, text)
    return Grade(correct, float(correct), extracted=extracted)


def _choice(row: dict[str, Any], text: str) -> Grade:
    correct, extracted = grade_letter(row, text)
    return Grade(correct, float(correct), extracted=extracted)


def _squad(row: dict[str, Any], text: str) -> Grade:
    correct, score, extracted = grade_span(row, text)
    f1 = longbench_f1(text, row["answers"]) if row["source"] == "longbench_hotpotqa" else None
    return Grade(correct, score, f1, extracted)


_GRADERS = {"number": _number, "math": _math, "choice": _choice, "squad": _squad}
