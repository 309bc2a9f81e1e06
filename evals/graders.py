"""One grader per source, each with a version that is stored with every result.

gsm8k and math500 are judged by math-verify, longbench_hotpotqa by torchmetrics' SQuAD metric, mmlu by the letter named
last. The libraries are imported late: with random weights nothing is graded, and none is needed.
"""

import importlib
import re
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

GRADER_VERSIONS = {"gsm8k": 2, "math500": 2, "mmlu": 3, "longbench_hotpotqa": 2}

# Final answers stand at the end; what comes before this many characters is not looked at.
_TAIL = 4000
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
_ANSWER_IS = re.compile(r"answer(?:\s+is\s*:?|\s*:)\s*", re.IGNORECASE)
# Emphasis, quotes and TeX around a letter; taken away before one is looked for.
_DRESS = re.compile(r"\*\*|[\"$]|\\(?:text|textbf|textrm|mathrm|mathbf)\b")
_STATED_LETTER = re.compile(
    r"(?i:answer(?:\s+is)?\s*:?\s*(?:option\s+|choice\s+)?)[{(]?([A-D])[)}]?(?![A-Za-z0-9'])"
    r"|\\boxed\{[\s{(]*([A-D])(?:[).:}][^{}]*)?\}"
)
_LEADING_LETTER = re.compile(r"\s*(?:\*\*)?\(?([A-D])(?:[).:](?![A-Za-z])|\*\*|\s*(?:\n|$))")
_OPTION_LETTER = re.compile(r"\b(?i:option|choice)\b(?i:\s+is)?\s*:?\s*\(?([A-D])\b")


class Grade(NamedTuple):
    """correct decides the accuracy; score is the source's finer measure, from 0 to 1 (F1 for longbench_hotpotqa)."""

    correct: bool
    score: float


def require(sources: Iterable[str]) -> None:
    """Imports what grading these sources takes. Raises ImportError, saying how to install what is missing."""
    for source in sources:
        library = {"gsm8k": "math_verify", "math500": "math_verify", "longbench_hotpotqa": "torchmetrics"}.get(source)
        try:
            if library:
                importlib.import_module(library)
        except ImportError as error:
            raise ImportError(f"grading {source} needs {library}: pip install 'blockinfer[test]' ({error})") from error


def grade(row: dict[str, Any], text: str) -> Grade:
    """Judges the answer `text` to `row`. Raises ValueError for an unknown source."""
    if row["source"] not in _GRADERS:
        raise ValueError(f"row {row['id']}: there is no grader for the source {row['source']!r}")
    return _GRADERS[row["source"]](row, text[-_TAIL:])


def _grade_math(row: dict[str, Any], text: str) -> Grade:
    from math_verify import parse, verify

    # math-verify keeps time with signal.alarm, which only the main thread may use
    timeout = 5 if threading.current_thread() is threading.main_thread() else None
    gold = row["answer"].replace(",", "") if _THOUSANDS.fullmatch(row["answer"]) else row["answer"]
    gold = parse(f"${gold}$", parsing_timeout=timeout)
    prediction = parse(_final_math(text), parsing_timeout=timeout)
    correct = bool(verify(gold, prediction, timeout_seconds=timeout))
    return Grade(correct, float(correct))


def _final_math(text: str) -> str:
    """What math-verify is to read: the last box alone, else what follows the last "answer is", else all of it.

    Two boxes would be read as a set, and an earlier number might be taken for the answer.
    """
    box = _last_braces(text)
    if box is not None:
        return rf"$\boxed{{{box}}}$"
    found = list(_ANSWER_IS.finditer(text))
    if not found:
        return text
    stated = text[found[-1].end() :].strip().removesuffix(".")
    # TeX without its dollars is not read as such
    return f"The answer is ${stated}$" if "\\" in stated and "$" not in stated else text[found[-1].start() :]


def _last_braces(text: str) -> str | None:
    r"""The inside of the last \boxed{...}, or, without one, of a last outermost {...} that ends the text."""
    starts = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    for start in reversed(starts):
        inside = _balanced(text, start)
        if inside is not None:
            return inside
    for bare in re.finditer(r"(?<![^\s$=:])\{", text):
        inside = _balanced(text, bare.end())
        if inside is not None and not text[bare.end() + len(inside) + 1 :].strip(" \n.$"):
            return inside
    return None


def _balanced(text: str, start: int) -> str | None:
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i]
    return None


def _grade_letter(row: dict[str, Any], text: str) -> Grade:
    correct = _last_letter(text, row["choices"]) == row["answer"]
    return Grade(correct, float(correct))


def _last_letter(text: str, choices: list[str]) -> str | None:
    """The letter that the text settles on: after the last "answer is" or in the last box; else the one that it begins
    with, alone, in bold or as "(B)" or "B."; else after the last "option".

    A letter inside a sentence is not one, so the article "A" never counts. Without a letter, the words of one choice
    are taken for it where they are the whole answer.
    """
    plain = _DRESS.sub("", text)
    stated = _STATED_LETTER.findall(plain)
    if stated:
        return next(letter for letter in stated[-1] if letter)
    leading = _LEADING_LETTER.match(text)
    if leading:
        return leading.group(1)
    options = _OPTION_LETTER.findall(plain)
    if options:
        return options[-1]
    bare = _ANSWER_IS.split(plain)[-1].strip().rstrip(".").casefold()
    words = [
        letter for letter, choice in zip("ABCD", choices, strict=True) if choice.strip().rstrip(".").casefold() == bare
    ]
    return words[0] if len(words) == 1 else None


def _grade_squad(row: dict[str, Any], text: str) -> Grade:
    from torchmetrics.functional.text import squad

    found = list(_ANSWER_IS.finditer(text))
    stated = text[found[-1].end() :] if found else text
    box = _last_braces(stated) if "\\boxed" in stated else None
    answer = (stated if box is None else box).strip().partition("\n")[0]
    answers = {"answer_start": [0] * len(row["answers"]), "text": row["answers"]}
    target = [{"id": row["id"], "answers": answers}]
    scores = squad([{"id": row["id"], "prediction_text": answer}], target)
    return Grade(float(scores["exact_match"]) == 100, float(scores["f1"]) / 100)


_GRADERS = {
    "gsm8k": _grade_math,
    "math500": _grade_math,
    "mmlu": _grade_letter,
    "longbench_hotpotqa": _grade_squad,
}
