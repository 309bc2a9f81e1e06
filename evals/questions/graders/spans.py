"""longbench_hotpotqa: the words that a text states, compared as in SQuAD, but without accents.

LongBench itself (arXiv 2308.14508) takes the token F1 of the whole output, the best over the answers; that is
`longbench_f1`, and it is reported under that name beside the accuracy.
"""

import re
import string
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

from evals.questions.graders.clauses import GOLD, Clauses
from evals.questions.graders.statements import boxes, clean, correction, sentences, stated, stated_before, undecided

_TEX = re.compile(
    r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|boldsymbol)\b\s*|\\[()\[\] ,;]|[\"$]|(?<!\w)_|_(?!\w)"
)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DASHES = str.maketrans(dict.fromkeys("–—‐‑", "-"))
# letters that Unicode does not decompose
_WHOLE = str.maketrans(
    {"ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ı": "i", "ß": "ss", "æ": "ae", "œ": "oe"}
)
_MONTHS = frozenset("january february march april may june july august september october november december".split())
_ORDINAL = re.compile(r"(?<=\d)(?:st|nd|rd|th)\Z")
_TOKEN = re.compile(r"(?:[^\s()\[\]{}<>|/:;,—–\"~*_`]|(?<=\d)[,:](?=\d)|(?<=\w)_(?=\w))+")
# a period that belongs to the answer, after which its sentence continues
_OWN_PERIOD = re.compile(r"\.(?=[,;:)/&]|\s+[a-z(/&\[—–-])")


def grade_span(row: dict[str, Any], text: str) -> tuple[bool, float, str | None]:
    """Whether the stated answer is one of the row's, the token F1 of the statement, and the statement: the row's answer
    if it is that, else what follows "the answer is" or the like, or the sentence that should have named it."""
    answers = row["answers"]
    golds = {normal(answer) for answer in answers}
    cleaned = clean(text, answers)
    plain = _TEX.sub("", cleaned).strip()
    if normal(plain) in golds:
        return True, 1.0, plain
    masked = _masked(re.sub(r"\bof course\b", "surely", plain, flags=re.IGNORECASE), answers)
    clauses = _clauses(row.get("question", ""), tuple(answers))
    if GOLD in masked and _states(masked, clauses):
        return True, 1.0, next((one for one in answers if GOLD in _masked(plain, [one])), answers[0])
    guess = _guess(cleaned)
    first = (guess or cleaned).strip().partition("\n")[0]
    said = first.strip() if guess else _judged(plain, clauses)
    return False, max(f1(first, answer) for answer in answers), said or None


def _judged(text: str, clauses: Clauses) -> str | None:
    """The last sentence that might name an answer, if nothing is stated."""
    parts = [part for part in sentences(text) if not clauses.silent(part)]
    return parts[-1] if parts and not undecided(text) else None


_clauses = lru_cache(256)(Clauses)


def longbench_f1(text: str, answers: list[str]) -> float:
    """Token F1 of the whole output, the best over the answers, from 0 to 1."""
    return max(f1(text, answer) for answer in answers)


def f1(prediction: str, answer: str) -> float:
    """The harmonic mean of the shares of tokens that prediction and answer have in common; 0 if either has none."""
    left, right = squad_normal(prediction).split(), squad_normal(answer).split()
    common = sum((Counter(left) & Counter(right)).values())
    return 2 * common / (len(left) + len(right)) if common else 0.0


def squad_normal(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces: what SQuAD compares (arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


@lru_cache(8192)
def normal(text: str) -> str:
    """The form compared here: SQuAD's, without accents and TeX. An answer of articles alone stays unchanged."""
    text = _TEX.sub("", text).replace("{", "").replace("}", "")
    if not text.isascii():
        apart = unicodedata.normalize("NFKD", text.translate(_DASHES).translate(_WHOLE))
        text = "".join(c for c in apart if unicodedata.category(c) not in ("Mn", "So", "Cf"))
    return squad_normal(text) or " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def _tokens(text: str) -> list[tuple[str, int, int]]:
    """Each word in the form compared, with its position; without articles, unless there is nothing else."""
    found = [(normal(m[0]), m.start(), m.end() - (len(m[0]) - len(m[0].rstrip(".!?'")))) for m in _TOKEN.finditer(text)]
    return [one for one in found if one[0] and one[0] not in ("a", "an", "the")] or found


def _ordered(words: list[str]) -> list[str]:
    """The words; of a date the month first: "5 June 1878" and "June 5th, 1878" are the same."""
    if _MONTHS.isdisjoint(words[:2]) or len(words) < 2:
        return words
    first, second = (_ORDINAL.sub("", word) for word in words[:2])
    return [second, first, *words[2:]] if second in _MONTHS and first.isdigit() else [first, second, *words[2:]]


def _masked(text: str, answers: list[str]) -> str:
    """The text with GOLD for each answer in it, so that nothing else is read into an answer's words."""
    for answer in sorted(answers, key=len, reverse=True):
        gold = _ordered([word for word, _, _ in _tokens(answer)])
        tokens = _tokens(text)
        spans = [
            (tokens[i][1], tokens[i + len(gold) - 1][2])
            for i in range(len(tokens) - len(gold) + 1)
            if gold and _ordered([word for word, _, _ in tokens[i : i + len(gold)]]) == gold
        ]
        for start, end in reversed(spans):
            mark = answer[-1:]
            if (mark in "?!" and text[end : end + 1] == mark) or (mark == "." and _OWN_PERIOD.match(text, end)):
                end += 1
            text = text[:start] + GOLD + text[end:]
    return text


def _states(text: str, clauses: Clauses) -> bool:
    """Whether a text, its answers masked, settles on one."""
    later = correction(text)
    if later and (stated(later) or boxes(later) or not clauses.silent(later)):
        text = later
    found = boxes(text)
    for position, segment in stated(text):
        if found and position < found[-1][1]:
            break
        verdict = clauses.follows(segment)
        if verdict is not None:
            return verdict and not undecided(text, position)
    if found:
        return clauses.follows(re.sub(r"[{}]", " ", found[-1][2])) is True
    parts = [part for part in sentences(text) if not clauses.silent(part)]
    if not parts or undecided(text):
        return False
    if clauses.says_first(parts):
        return True
    named = [part for part in parts if stated_before(part) is not None]
    if named:
        return clauses.tells(named[-1])
    if len(parts) > 1 and clauses.is_bare(parts[0]) and not (GOLD in parts[-1] and clauses.is_bare(parts[-1])):
        return clauses.tells(parts[0])
    while len(parts) > 1 and GOLD not in parts[-1] and clauses.goes_on(parts[-1]):
        parts.pop()
    return clauses.tells(parts[-1])


def _guess(text: str) -> str | None:
    """What the text states last, in a box or after "answer is"."""
    found = boxes(text)
    for position, segment in stated(text):
        if found and position < found[-1][1]:
            break
        if normal(segment):
            return segment
    return found[-1][2] if found else stated_before(text) or None
