"""Answers as chat models phrase them: each phrasing with right answers, with wrong ones, and those that settle nothing.

A source's JSON file has its phrasings. Those called seen were used to write the graders, those called held only to
measure them. In them stand, for what is stated and what is mentioned beside it:

gsm8k     @n a number, @c the same with thousands separators, @o another number
math500   @a a result in TeX, @p the same without, @o another in TeX
mmlu      @L a letter, @l in lower case, @t its choice's words, @M another letter, @W the three other letters
hotpotqa  @a an answer, @S a sentence around it in the question's words, @o another answer

A row passes over what it has no words for.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.phrasings import rows

Case = tuple[dict[str, Any], str, str]  # row, text, phrasing
Filled = Iterator[tuple[dict[str, Any], dict[str, str | None]]]

FILES = {"gsm8k": "gsm8k", "math500": "math500", "mmlu": "mmlu", "longbench_hotpotqa": "hotpotqa"}


def phrasings(source: str) -> dict[str, list[str]]:
    return json.loads((Path(__file__).parent / f"{FILES[source]}.json").read_text(encoding="utf-8"))


def cases(source: str, stated: str, part: str, every: int = 1) -> Iterator[Case]:
    """Texts for every phrasing and `every`-th row of a source. stated "right" names the row's answer, "wrong" another
    one while the row's is mentioned, "nothing" both or none. part is "seen" or "held".
    """
    fill_in, all_rows = FILL[source]
    for i, phrasing in enumerate(phrasings(source)["undecided_" * (stated == "nothing") + part]):
        for number, row in enumerate(all_rows):
            if (i + number) % every:
                continue
            for answer, words in fill_in(row, number, stated):
                if all(word is not None for key, word in words.items() if key in phrasing):
                    yield answer | {"id": f"{source}-{number}", "source": source}, fill(phrasing, words), phrasing


def fill(phrasing: str, words: dict[str, str | None]) -> str:
    if "@S" in phrasing:
        phrasing = phrasing.replace("@S", words["@S"])
    for key, word in words.items():
        if key in phrasing:
            phrasing = phrasing.replace(key, word)
    return phrasing


def _both(right: Any, wrong: Any, stated: str) -> list[tuple[Any, Any]]:
    """(stated, mentioned) pairs."""
    return {"right": [(right, wrong)], "wrong": [(wrong, right)], "nothing": [(right, wrong), (wrong, right)]}[stated]


def _gsm8k(row: tuple[str, str], number: int, stated: str) -> Filled:
    for n, other in _both(*row, stated):
        whole, point, part = n.partition(".")
        with_commas = f"{int(whole):,}{point}{part}"
        # a decimal takes no further zeros
        zeros = {"@n.0": None, "@c.00": None} if point else {}
        yield {"question": "q", "answer": row[0]}, zeros | {"@n": n, "@c": with_commas, "@o": other}


def _math500(row: tuple, number: int, stated: str) -> Filled:
    right, wrong, plain_right, plain_wrong = row
    for (a, o), (p, _) in zip(_both(right, wrong, stated), _both(plain_right, plain_wrong, stated), strict=True):
        yield {"question": "q", "answer": right}, {"@a": a, "@o": o, "@p": p}


def _mmlu(choices: list[str], number: int, stated: str) -> Filled:
    for i, right in enumerate("ABCD"):
        wrong = "ABCD"[(i + 1 + number % 3) % 4]
        for letter, other in _both(right, wrong, stated):
            rest = [x for x in "ABCD" if x != letter]
            words = {"@L": letter, "@l": letter.lower(), "@t": choices["ABCD".index(letter)], "@M": other}
            words["@W"] = f"{rest[0]}, {rest[1]} and {rest[2]}"
            yield {"question": "q", "answer": right, "choices": choices}, words


def _hotpotqa(row: tuple, number: int, stated: str) -> Filled:
    question, right, wrong, sentence = row
    for a, o in _both(right, wrong, stated):
        yield {"question": question, "answer": right, "answers": [right]}, {"@a": a, "@o": o, "@S": sentence}


FILL = {
    "gsm8k": (_gsm8k, rows.GSM8K),
    "math500": (_math500, rows.MATH500),
    "mmlu": (_mmlu, rows.MMLU),
    "longbench_hotpotqa": (_hotpotqa, rows.HOTPOTQA),
}
