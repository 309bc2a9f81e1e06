"""One grader per source, each with a version that is stored with every result.

gsm8k is judged by exact arithmetic, math500 by math-verify where texts and numbers do not settle it, mmlu by the letter
settled on, longbench_hotpotqa by the words stated; LongBench's own F1 stands beside it. math-verify is imported late,
for with random weights nothing is graded.
"""

import importlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from evals.questions.graders.letters import grade_letter
from evals.questions.graders.limit import within
from evals.questions.graders.mathematics import grade_math
from evals.questions.graders.numbers import grade_number
from evals.questions.graders.spans import grade_span, longbench_f1

GRADER_VERSIONS = {"gsm8k": 4, "math500": 4, "mmlu": 5, "longbench_hotpotqa": 4}


SECONDS = 5  # that judging one answer may take; one that takes longer is wrong


class Grade(NamedTuple):
    """correct decides the accuracy; score is the source's finer measure, from 0 to 1: for longbench_hotpotqa the F1 of
    the stated answer. longbench_f1 is LongBench's own measure, None for the other sources. extracted is what the grader
    took for the answer and judged; None where the text is empty, says that it does not know, names several, or holds
    nothing that could be one, and where judging took too long.
    """

    correct: bool
    score: float
    longbench_f1: float | None = None
    extracted: str | None = None


def require(sources: Iterable[str]) -> None:
    """Imports what grading these sources takes. Raises ImportError, saying how to install what is missing."""
    for source in sources:
        library = {"gsm8k": "math_verify", "math500": "math_verify"}.get(source)
        try:
            if library:
                importlib.import_module(library)
        except ImportError as error:
            raise ImportError(f"grading {source} needs {library}: pip install 'blockinfer[test]' ({error})") from error


def grade(row: dict[str, Any], text: str) -> Grade:
    """Judges the answer `text` to `row`. Raises ValueError for an unknown source."""
    if row["source"] not in _GRADERS:
        raise ValueError(f"row {row['id']}: there is no grader for the source {row['source']!r}")
    return within(
        SECONDS,
        _GRADERS[row["source"]],
        row,
        text,
        late=Grade(False, 0.0, 0.0 if row["source"] == "longbench_hotpotqa" else None),
    )


def _gsm8k(row: dict[str, Any], text: str) -> Grade:
    correct, extracted = grade_number(row, text)
    if correct is None:
        correct, extracted = grade_math(row, text)
    return Grade(correct, float(correct), extracted=extracted)


def _math500(row: dict[str, Any], text: str) -> Grade:
    correct, extracted = grade_math(row, text)
    return Grade(correct, float(correct), extracted=extracted)


def _mmlu(row: dict[str, Any], text: str) -> Grade:
    correct, extracted = grade_letter(row, text)
    return Grade(correct, float(correct), extracted=extracted)


def _hotpotqa(row: dict[str, Any], text: str) -> Grade:
    correct, score, extracted = grade_span(row, text)
    return Grade(correct, score, longbench_f1(text, row["answers"]), extracted)


_GRADERS = {"gsm8k": _gsm8k, "math500": _math500, "mmlu": _mmlu, "longbench_hotpotqa": _hotpotqa}
