"""gsm8k: the number that a text settles on, compared exactly.

lm-eval's gsm8k task reads what follows "####" (strict-match) or the last number of all (flexible-extract); here the
last statement counts, and a number near the end only if nothing is stated.
"""

import re
from fractions import Fraction
from typing import Any

from evals.questions.graders.arithmetic import (
    NUMBER,
    SCALE,
    SUM,
    evaluate,
    exact,
    from_words,
    same,
    shown,
    to_plain,
)
from evals.questions.graders.statements import (
    FILLER,
    SENTENCE_END,
    boxes,
    clean,
    correction,
    stated,
    stated_before,
    undecided,
)

_LENGTH = 500  # characters of a sentence that are read

_VALUE = re.compile(rf"(?<![\w.^])(?<!\d:)-?\s?{NUMBER}(?![\d]|\.\d|:\d|(?-i:[A-Za-z])\d)", re.IGNORECASE)
_UNIT = r"(?:\s*%|\s*°|\s*[A-Za-z][\w./^²³-]*){0,4}"
_NEGATED = re.compile(
    rf"(?:\b(?:not|never|nor|neither)|n't|\bcannot be|\b(?:rather|other) than|\binstead of)\s+(?:be\s+"
    rf"|equal to\s+|just\s+|only\s+|[a-z]+ly\s+)*"
    rf"-?{NUMBER}%?(?![\d])|(?<![\w.])-?{NUMBER}%?\s+(?:is|was|seems|looks)\s+(?:wrong|incorrect|not\b|too\b|false)"
    rf"|(?<![\w.])-?{NUMBER}(?:\s+(?:is|was)n't|\s*\?\s*(?:no|wrong)\b)|\b(?:anything|everything|all"
    rf"|any number) (?:but|except)\s+-?{NUMBER}",
    re.I,
)  # fmt: skip
_UNSURE = re.compile(
    r"\b(?:do not know|don't know|cannot tell|can't tell|not sure|unsure|whether|(?:could|might"
    r"|may)\s+(?:also\s+)?be)\b",
    re.I,
)
_RANGE = re.compile(
    rf"\s*(?:between|from|either|neither|(?:more|less|greater|fewer|larger|smaller|higher|lower) than|over"
    rf"|under|above|below|twice|double|triple|half(?: of)?|one of|any of)\s+"
    rf"-?{NUMBER}",
    re.I,
)
_BOUNDS = re.compile(
    rf"\b(?:(?:somewhere|lies?|falls?) (?:between|around)|at least)\s[^.\n]{{0,60}}{NUMBER}[^.\n]{{0,60}}\b(?:and|to"
    rf"|at most)\b[^.\n]{{0,60}}{NUMBER}[^\n]{{0,200}}\Z",
    re.I,
)
_OR_ELSE = re.compile(r"(?:\s*%|\s*°|(?!\s*or\b)\s*[A-Za-z][\w./^²³-]*){0,4},?\s+or\b")
_MEASURE = re.compile(
    r"\s*(second|minute|hour|day|week|month|year|cent|dollar|inch|feet|foot|yard|mile|ounce|pound|gram|kilogram"
    r"|meter|centimeter|kilometer|liter|gallon|quart|pint|cup|dozen)",
    re.I,
)
# "33.4, which we round up to 34"; not "rounded to 2 decimal places"
_ROUNDED = re.compile(
    rf"(?:(?!\b(?:because|since|as)\b).)*?\bround(?:s|ed|ing)?(?:\s+(?:it|this|up|down|off))*\s+to\s+(?P<to>{NUMBER})"
    r"(?!\w|\s+(?:decimal|significant|digits?|places?))",
    re.I,
)
_CHECK = re.compile(
    r"(?<=[.!?\n])\W*(?:now,?\s+)?(?:to (?:check|verify)|(?:let's|let us|let me|we can) (?:double-?\s?)?"
    r"(?:check|verify)|check|verification)\b.*",
    re.I | re.DOTALL,
)
_ALTERNATIVE = re.compile(
    rf"{_UNIT}\s*(?P<by>,?\s*\bor\b|,?\s*\band\b|,|/|\bto\b|–)\s*(?:maybe|perhaps|possibly|even|also"
    rf"|then)?\s*(?P<other>-?{NUMBER})",
    re.I,
)
_ASIDE = re.compile(r"\([^()]*[A-Za-z=][^()]*\)|\s[—–]\s.*", re.DOTALL)
_REASON = re.compile(r"[,;]?\s*\b(?:because|since|as|which|who|whose|where|given that|so that|if|when|due to)\b", re.I)
_IS_WHAT = re.compile(rf"\s*-?{NUMBER}{_UNIT}\s+(?:is|are|was|were|would be)\s+(?:the|what|how)\b", re.I)
_MEANS = re.compile(r"(?<! and),?\s+(?:after|before|by|when|while|without|from|for|upon)\s+[a-z]+ing\b")
_COLON = re.compile(r":\s+(?![^=]*=)")
_THEREFORE = re.compile(
    r"\b(?:so|therefore|thus|hence|(?<!after )(?<!before )(?<!by )(?:leaving|giving)|for a total of|that makes"
    r"|this gives|which (?:gives|makes|leaves|equals|means"
    r"|is(?!\s+(?:more|less|fewer|greater|larger|smaller|higher|lower|what|not)\b)))\b",
    re.I,
)
_BESIDE = re.compile(
    r"(?:\b(?:(?<!land )(?<!lands )on|in|for|over|after|within|at|per|each|from|than|by|the|these|those|all"
    r"|both|as|since"
    r"|(?<!up )(?<!left )with|every|among|"
    r"between|times|step|day|week|part|case|passage|until"
    r"|(?<!comes )(?<!come )(?<!amounts )(?<!up )(?<!down )(?<!equal )(?<!equals )to|of (?:the|his|her|its|their|our"
    r"|my) [a-z]+|(?<!total )(?<!result )(?<!answer )(?<!sum )(?<!amount )(?<!profit )(?<!cost )(?<!average )of))"
    r"\s+(?:(?:the|about|his|her|its|their|our|my|[a-z]+'s)\s+)?\Z",
    re.I,
)
_ENDS_UNIT = re.compile(
    r"\s*(?:\Z|[.,;:!?()\n\"'\]—–-]|(?:because|since|as|which|in|per|for|from|on|after|or|and|when|if|by|this"
    r"|with|left|remaining"
    r"|total|altogether|each|a|an|every|of|at|is|was)\b)",
    re.I,
)
_LIST_MARK = re.compile(r"^\s*(?:step\s+)?\d+[.):]\s+(?=\S)", re.I | re.M)


class Undecided(Exception):
    """The text names several answers, or says that there is none."""


def grade_number(row: dict[str, Any], text: str) -> tuple[bool | None, str | None]:
    """Whether the text settles on the row's number, and the number. (None, None) if row or text need more than plain
    arithmetic."""
    gold = exact(row["answer"])
    if gold is None:
        return None, None
    try:
        value = _final(clean(text))
    except Undecided:
        return False, None
    if value is None:
        return (None if "\\" in text and boxes(text) else False), None
    return same(gold, value), shown(value)


def _final(text: str) -> Fraction | None:
    later = correction(text)
    if later and re.search(NUMBER, later):
        value = _settled(later)
        if value is not None:
            return value
    return _settled(text)


def _settled(text: str) -> Fraction | None:
    """The last box or statement that holds a number; else the result of a sentence near the end."""
    found = boxes(text)
    where = found[-1][0] if found else -1
    boxed = _boxed(text, found) if found else None
    plain = _strike(to_plain(text))
    after = [(position, _strike(to_plain(segment))) for position, segment in stated(text) if "\\boxed" not in segment]
    for position, segment in after:
        if boxed is not None and position < where:
            break
        value = _leading(segment)
        if value is not None:
            if undecided(text, position):
                raise Undecided
            return value
    if boxed is not None:
        return boxed
    before = stated_before(plain)
    if before and (value := _in_prose(SENTENCE_END.split(before)[-1])[0]) is not None:
        return value
    for _, segment in after:
        value, _ = _in_prose(SENTENCE_END.split(segment.strip(), maxsplit=1)[0])
        if value is not None and not _is_heading(segment):
            return value
    if len(plain) < 80 and (value := exact(plain.strip("()[]\"' \n"))) is not None:
        return value
    if undecided(plain) or _BOUNDS.search(plain):
        raise Undecided
    checked = _checked(plain)
    return _last_sentence(plain) if checked is None else checked


def _checked(plain: str) -> Fraction | None:
    """The result that a check of it follows: "5 remain. Check: 5 + 3 = 8"."""
    check = _CHECK.search(plain)
    if not check or re.search(rf"{_THEREFORE.pattern}.*{NUMBER}", check[0], re.I | re.DOTALL):
        return None
    value = _last_sentence(plain[: check.start()])
    return value if value in [evaluate(match[0]) for match in _VALUE.finditer(check[0])] else None


def _boxed(text: str, found: list[tuple[int, int, str]]) -> Fraction | None:
    values = []
    for start, end, inside in found[-2:]:
        value = _leading(_strike(to_plain(inside)))
        values.append((start, end, value))
    if len(values) == 2 and values[0][2] is not None and values[0][2] != values[1][2]:
        if re.fullmatch(r"[\s$\\()\[\],]*(?:or|and|,)[\s$\\()\[\]]*", text[values[0][1] : values[1][0]]):
            raise Undecided
    return values[-1][2]


def _strike(plain: str) -> str:
    return _NEGATED.sub(" ", plain)


def _is_heading(segment: str) -> bool:
    """Whether "Answer:" stands above several lines, so that the first is no statement."""
    return segment[:1] == "\n" and len([line for line in segment.splitlines() if line.strip()]) > 1


def _leading(segment: str) -> Fraction | None:
    """The number that a statement begins with, or that its equation ends with; None for a statement in words.

    Raises Undecided for "10 or 11", "between 10 and 11", "more than 10".
    """
    start = FILLER.match(segment).end()
    rest = segment[start : start + _LENGTH]
    opened = segment[:start].rstrip()
    brackets = opened[len(opened.rstrip("(")) :]
    if brackets and (whole := SUM.match(brackets + rest)) and evaluate(whole.group()) is not None:
        rest = brackets + rest
    if _RANGE.match(rest):
        raise Undecided
    sentence = SENTENCE_END.split(rest, maxsplit=1)[0]
    sentence = re.sub(r"\A(\d\d?):00\b", r"\1", sentence)
    match = SUM.match(sentence)
    if not match:
        return from_words(sentence)
    whole = _REASON.split(_ASIDE.sub(" ", sentence), maxsplit=1)[0]
    if "=" in whole and (value := _after_equals(whole)) is not None:
        return None if _chosen(_behind_equals(whole))[1] else value
    tail = sentence[match.end() :]
    if rounded := _ROUNDED.match(tail):
        return evaluate(rounded["to"])
    other = _ALTERNATIVE.match(tail)
    if (other and _is_choice(match.group(), other, tail)) or _is_another(match.group(), tail):
        raise Undecided
    if other and _THEREFORE.search(tail):
        return None
    if re.match(r"[:.]?\d|[A-Za-z_]\d", tail):
        return None
    unit = re.match(_UNIT, tail)
    words = unit.group().split()
    scale = SCALE.get(words[0].lower(), 1) if words else 1
    for count in range(len(words) + 1):
        skipped = re.match(rf"(?:\s*[%°]|\s*[A-Za-z][\w./^²³'-]*){{{count}}}", tail)
        if skipped and _ENDS_UNIT.match(tail[skipped.end() :]):
            value = evaluate(match.group())
            return value * scale if value is not None else None
    return None


def _is_choice(first: str, other: re.Match, tail: str) -> bool:
    """Whether two numbers are two answers: "10 and 11" at a sentence's end."""
    if "or" in other["by"].lower() or evaluate(first) == evaluate(other["other"]):
        return False
    return re.fullmatch(r"\s*[a-z%]*[\s)\]\"']*", tail[other.end() :], re.I) is not None


def _is_another(first: str, tail: str) -> bool:
    """Whether an "or" after the first number adds another answer, not the same one in other words ("or half of 20")
    or in another measure ("60 minutes or 1 hour")."""
    later = _OR_ELSE.match(tail)
    found = _VALUE.finditer(tail, later.end()) if later else ()
    start = next((m.start() for m in found if not _BESIDE.search(tail[: m.start()][-40:])), None)
    if start is None:
        return False
    other = SUM.match(tail, start)
    measures = _MEASURE.match(tail), _MEASURE.match(tail, other.end())
    in_another = None not in measures and measures[0][1].lower() != measures[1][1].lower()
    return not in_another and evaluate(other.group()) != evaluate(first)


def _after_equals(text: str) -> Fraction | None:
    side = text.rpartition("=")[2]
    match = SUM.match(side.strip(" ~≈:\"'(["))
    return evaluate(match.group()) if match else None


def _behind_equals(text: str) -> str:
    """The text after the number that follows the last "="."""
    side = text.rpartition("=")[2]
    return side[SUM.search(side).end() :]


def _in_prose(sentence: str) -> tuple[Fraction | None, bool]:
    """The number that a sentence results in: after its "so", after its last "=", else the last number that does not say
    how many, how long or of what. And whether it is said to be the result, not named in a reason or beside another."""
    sentence = sentence[-_LENGTH:]
    if _UNSURE.search(sentence) or re.search(
        rf"{NUMBER}{_UNIT},?\s+or\s+(?:maybe\s+|perhaps\s+|possibly\s+)?-?{NUMBER}", sentence
    ):
        raise Undecided
    sentence = _ASIDE.sub(" ", sentence)
    last = _THEREFORE.split(sentence)[-1]
    if _VALUE.search(last):
        sentence = last
    is_result = True
    if ";" in sentence:
        sentence = next((part for part in reversed(sentence.split(";")) if _chosen(part)[1]), sentence)
    for pattern in (_REASON, _COLON, _MEANS):
        head = pattern.split(sentence, maxsplit=1)[0]
        if head != sentence and _VALUE.search(head) and (pattern is _REASON or _chosen(head)[1]):
            sentence = head
        elif head != sentence and pattern is _REASON and len(head.split()) > 1:
            is_result = False
    if "=" in sentence and (value := _after_equals(sentence)) is not None:
        sentence = _behind_equals(sentence)
        if not _chosen(sentence)[1]:
            return value, is_result
    match, is_free = _chosen(sentence)
    if match is None:
        return from_words(sentence), False
    words = re.match(r"\s*([a-z]+)", sentence[match.end() :])
    value = evaluate(match.group())
    return value * SCALE.get(words[1], 1) if words and value is not None else value, is_result and is_free


def _chosen(sentence: str) -> tuple[re.Match | None, bool]:
    """The last number that does not say how many, how long or of what, and True; else the last of all and False."""
    if first := _IS_WHAT.match(sentence):
        return _VALUE.search(first.group()), True
    chosen, is_free, beside = None, False, False
    for match in _VALUE.finditer(sentence):
        before = sentence[: match.start()]
        beside = bool(_BESIDE.search(before[-40:])) or (beside and re.search(r"\band\s+\Z", before[-10:]) is not None)
        if not beside or not is_free:
            chosen, is_free = match, not beside
    return chosen, is_free


def _last_sentence(plain: str) -> Fraction | None:
    """The result of the last sentence that names one, or else of the last one with a number."""
    marked = re.search(r"(?m)^\s*(?:step\s+)?1[.):]\s", plain, re.I)
    if marked:
        plain = _LIST_MARK.sub("", plain)
    parts = [part for part in SENTENCE_END.split(plain) if re.search(NUMBER, part)]
    if not parts:
        return from_words(SENTENCE_END.split(plain.strip())[0])
    if (value := exact(parts[0].strip("()[]\"' "))) is not None:
        return value
    found = None
    for part in reversed(parts):
        value, is_result = _in_prose(part)
        if is_result:
            return value
        found = value if found is None else found
    return found
