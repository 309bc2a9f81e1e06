"""math500: the result that a text settles on, compared by math-verify unless it is the same text or number.

lm-eval's hendrycks_math also reads the last box; here statements without a box are read as well.
"""

import logging
import math
import re
from functools import lru_cache
from typing import Any

from evals.questions.graders.arithmetic import same
from evals.questions.graders.spans import grade_span, normal
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
from evals.questions.graders.tex import number, parts, standard, words

_LENGTH = 1000  # characters of a result that are compared

_FORMULA = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$((?:\\\$|[^$])+?)(?<!\\)\$", re.DOTALL)
_FORMULA_BEGINS = re.compile(r"[-+(\[{]*\s*(?:[$\\\d]|\w\s*=)")
_PLAIN = re.compile(r"\$?[-+(\[{\\√π]*\s*(?:\d|\w\b(?!\s+[a-z]{2})|[A-Za-z]+\s*(?:=|\Z|\.\s*\Z)|sqrt|pi\b)")
_IS = re.compile(
    r"\b(?:is|are|be|equals?|gives?|gets?|obtain|find|have|yields?|becomes)\s+(?!it\b|this\b|that\b)(?=\S)",
    re.IGNORECASE,
)
# "we get $x$, as $y$ is even"
_REASONED = re.compile(
    rf"\b(?:is|are|be|equals?|gives?|gets?|obtain|find|have|yields?|becomes)\s+(?:then\s+|just\s+|[a-z]+ly\s+)*(?P<formula>{_FORMULA.pattern})"
    r"\s*,?\s+(?:as|because|since|where|which|when|whenever"
    r"|(?:attained|achieved|reached|occurring)\s+(?:at|when|for|by|if))\b",
    re.IGNORECASE | re.DOTALL,
)
_TEXT_FIRST = re.compile(
    r"(\$\$?|\\\[|\\\()\s*\\text\s*\{([^{}]*\b(?:answer|result|solution)\b[^{}]*)\}", re.IGNORECASE
)
_MAYBE = r"(?:\s*(?:possibly|maybe|perhaps|else))?"
_JOIN = re.compile(rf"\s*(?:,?\s*\b(?:and|or)\b{_MAYBE}|,|;|/)\s*(?:[a-z]\s*=\s*)?")
_JOIN_BOXES = re.compile(
    rf"[\s$\\()\[\].]*(?:,|;|/|and|or|\\text\s*\{{\s*,?\s*(?:and|or)\s*\}})[\s$\\()\[\],]*(?:and|or)?{_MAYBE}"
    rf"[\s$\\()\[\]]*(?:[a-z]\s*=\s*)?[\s$\\()\[\]]*"
)
# Where a result outside formulas ends.
_STOP = re.compile(
    r"\.(?=\s|\Z)|(?<!\\)[!?](?=\s|\Z)|\n|;\s|[,;]?\s+(?:because|since|as|which|where|so|when|if|by|obtained"
    r"|found|using|for|that|with|from|not"
    r"|rather|instead|but|given|i\.e|we|this|it|is|after|assuming|here|exactly)\b|,\s+(?!infinity|sqrt|sin|cos"
    r"|tan|log|union|and\b|or\b)[a-z]{3,}\b|\s\((?=[a-zA-Z]{2,})|\s[—–]\s|\"|`",
    re.IGNORECASE,
)
_NOT = re.compile(
    r"(?:\bnot(?! (?:know|sure|clear|certain|tell|say|able|enough)\b)|\bdoubt(?: that)? it is|\b(?:is|was|are)n't"
    r"|\b(?:cannot|can't) be|\brather than|\binstead of|\b(?:any|every)thing but)\s+(?:equal to\s+|simply\s+)?(?=\S)",
    re.IGNORECASE,
)
_NOT_ENDS = re.compile(r",?\s+(?:but|it|so|rather)\b|,\s+(?:the|I|we)\b|[.;](?=\s|\Z)|\n|\Z", re.IGNORECASE)
_WRONG = re.compile(
    r"\A[\s$\\()\[\].,?]*(?:(?:(?:is|was|seems|looks)\s|first\b)[^$\\\n.]{0,40}\b(?:wrong|incorrect|mistaken"
    r"|false)\b|(?:is|was)(?:n't|\s+not)\b|(?:can't|cannot|can not) be\b|\?\s*no\b)",
    re.IGNORECASE,
)
_EXPLAINS = re.compile(
    r"\s*\n\s*(?:explanation|reason|because|this|here|solution|we\b|to\b|proof|justification|steps?|note|check)",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"(?<=[.!?\n])\W*(?:check|note|verif|to (?:check|verify|see)|alternatively|here|indeed|this (?:follows|can)"
    r"|we (?:used|checked|can"
    r" check)|remark|proof|i assumed)\w*\b.*",
    re.IGNORECASE | re.DOTALL,
)
_ENVIRONMENT = re.compile(r"\\(begin|end)\{(?:equation|align|gather|multline|displaymath)\*?\}")
# a word that is no part of a result
_PROSE = re.compile(
    r"(?<![\\A-Za-z{])(?!(?:pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|infinity|infty|and|or|union|degrees?|cents?|percent|units?"
    r"|cm|mm|km|kg|ft)\b)[A-Za-z][a-z']+\b"
)
_CLOSES = re.compile(
    r"(?:,?\s+(?:in (?:total|all|the end)|altogether|overall|here|now|then|left|remaining|as (?:required"
    r"|desired|needed)|exactly))?"
    r"[\s.!]*\Z",
    re.IGNORECASE,
)
_FIRST_ENDS = re.compile(r"\.(?=\s|\Z)|(?<!\\)[!?](?=\s|\Z)|\n|,?\s+(?:because|since|as)\b|\s[—–]\s")
_THE_KIND = re.compile(
    r"(?:either|(?:the\s+)?(?:set|interval|point|ordered pair|matrix|vector|value|number|expression|equation"
    r"|function))\s+(?=\S)"
)
_HEAD = re.compile(r"(?:[a-zA-Z](?:_\w|_\{\w+\})?|[a-zA-Z]\([a-zA-Z]\))(?:=|\\in(?![a-z])\s?)")
# Such powers and factorials are numbers of thousands of digits or more.
_TOO_LARGE = re.compile(r"\^\{?-?\(?(?:\d{5,}|\d+\^|[^{}]{0,20}\^\{|\{?\d+\}?!)|\d{4,}!|!!|\d{300,}|\)\^\{?\d{4,}")


def grade_math(row: dict[str, Any], text: str) -> tuple[bool, str | None]:
    """Whether the text settles on the row's result, and the result it settles on."""
    gold = row["answer"].strip()
    cleaned = clean(text, [gold])
    plain = _ENVIRONMENT.sub(lambda m: "\\[" if m[1] == "begin" else "\\]", cleaned)
    plain = _TEXT_FIRST.sub(r"\2 \1", plain)
    later = correction(plain)
    result = (_settled(later) if later else None) or _settled(plain)
    extracted = (result or "").strip()[:_LENGTH] or None
    if result is not None and is_same(gold, result):
        return True, extracted
    word = words(gold)
    if word is not None and len(word) > 3 and "$" not in plain and "\\" not in plain:
        correct, _, said = grade_span({"answers": [word]}, text)
        if correct:
            return True, said
    return False, extracted


def _settled(text: str) -> str | None:
    """What the text states last; a list joined by commas if it states several results at once."""
    text = _strike(text).strip()
    found = boxes(text)
    for position, segment in stated(text):
        if found and position < found[-1][1]:
            break
        result = None if undecided(text, position) else _leading(segment)
        # after a box only a formula is a statement: "this answer is easy to check" is not
        if result and (not found or _FORMULA_BEGINS.match(segment, FILLER.match(segment).end())):
            return result
    if found:
        return None if undecided(text, found[-1][1]) else _joined(text, found, _JOIN_BOXES)
    if before := stated_before(text):
        return _last_formula(before) or _last_words(SENTENCE_END.split(before)[-1])
    end = _FIRST_ENDS.search(text, 1)
    first = text[: end.start()] if end else text
    if not _PROSE.search(_FORMULA.sub(" ", first)) and re.search(r"\w", first) and not (end and end[0] == "?"):
        return _last_formula(first) or _leading(first)
    first, _, _ = text.partition("\n")
    if _EXPLAINS.match(text[len(first) :]) and len(first) < 200:
        return _leading(first)
    if undecided(_FORMULA.sub(" 0 ", text)):
        return None
    told = _REMARK.sub("", text)
    text = told if re.search(r"[\d$\\]", told) else text
    reasoned = list(_REASONED.finditer(text))
    if reasoned and not re.search(r"\b(?:so|hence|thus|therefore|we (?:get|have))\b", text[reasoned[-1].end() :], re.I):
        text = text[: reasoned[-1].end("formula")]
    return _last_formula(text) or _last_words(text)


def _strike(text: str) -> str:
    """Removes what is said not to be the answer."""
    for start, end, _ in reversed(_formulas(text) + boxes(text)):
        if _WRONG.match(text[end : end + 80]):
            text = text[:start] + " " + text[end:]
    for match in reversed(list(_NOT.finditer(text))):
        start = match.end()
        formula = _FORMULA.match(text, start)
        ends = [formula.end()] if formula else [box[1] for box in boxes(text) if box[0] == start]
        text = text[: match.start()] + " " + text[(ends or [_NOT_ENDS.search(text, start).start()])[0] :]
    return text


def _formulas(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of each formula."""
    found = [(m.start(), m.end(), next(g for g in m.groups() if g is not None)) for m in _FORMULA.finditer(text)]
    return [one for one in found if one[2].strip()]


def _joined(text: str, found: list[tuple[int, int, str]], between: re.Pattern) -> str:
    """The last of the found, with those listed before it: "1 and -2"."""
    items = [found[-1][2]]
    for (_, end, inside), (start, _, _) in zip(reversed(found[:-1]), reversed(found[1:]), strict=True):
        if not between.fullmatch(text[end:start]):
            break
        items.insert(0, inside)
    return ", ".join(items)


def _last_formula(text: str) -> str | None:
    found = _formulas(text)
    return _joined(text, found, _JOIN) if found else None


def _leading(segment: str) -> str | None:
    """The formulas that a statement begins with, or its first words up to a reason or the sentence's end."""
    rest = segment[FILLER.match(segment).end() :]
    opening = segment[: len(segment) - len(rest)].rstrip()[-1:]
    if opening in ("(", "[") and re.match(r"[^()\[\]]*,[^()\[\]]*[)\]]|[A-F]\)", rest):
        rest = opening + rest
    rest = rest[match.end() :] if (match := _THE_KIND.match(rest)) else rest
    match = _FORMULA.match(rest)
    if match:
        found = []
        while match:
            found.append(next(group for group in match.groups() if group is not None))
            joined = _JOIN.match(rest, match.end())
            match = _FORMULA.match(rest, joined.end()) if joined else None
        return ", ".join(found)
    stop = _STOP.search(rest, 1)
    plain = rest[: stop.start() if stop else len(rest)].strip(" ,")
    return (
        plain
        if re.search(r"[\d\\^=+π∞√]|\bpi\b", plain) or (len(plain.split()) <= 3 and re.search(r"\w", plain))
        else None
    )


def _last_words(text: str) -> str | None:
    """The last line, without "therefore"; of a long one what follows its "=", or its last number."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    for match in reversed(list(_IS.finditer(lines[-1]))):
        if _PLAIN.match(lines[-1], match.end()):
            return _leading(lines[-1][match.end() :])
    last = _CLOSES.sub("", lines[-1])
    prose = list(_PROSE.finditer(last))
    if prose and re.search(r"[\w∞]", end := last[prose[-1].end() :]):
        return _leading(end.lstrip(" :,"))
    if len(lines[-1].split()) <= 8:
        return _leading(lines[-1])
    if "=" in lines[-1]:
        return _leading(lines[-1].rpartition("=")[2])
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", lines[-1])
    return numbers[-1] if numbers else None


def is_same(gold: str, result: str) -> bool:
    """Whether two results are equal: as words, texts or numbers, or to math-verify."""
    result = result.strip()[:_LENGTH]
    word = words(gold)
    left, right = standard(gold), standard(result)
    if word is not None:
        return normal(word) in (normal(result), normal(right))
    if left == right:
        return bool(left)
    if "=" not in left or "=" not in right:
        left, right = _without_head(left), _without_head(right)
        if left == right:
            return True
    numbers = number(left), number(right)
    if None not in numbers:
        return same(*numbers)
    items = parts(left.removeprefix("\\{").removesuffix("\\}")), parts(right.removeprefix("\\{").removesuffix("\\}"))
    if len(items[0]) > 1 and sorted(items[0]) == sorted(items[1]):
        return True
    if _TOO_LARGE.search(right) or _TOO_LARGE.search(left) or right.count("{") > 60:
        return False
    return _verify(left, right)


def _without_head(tex: str) -> str:
    """ "x=1,x=-2" as "1,-2", "x\\in[0,1]" as "[0,1]", and of a chain of equations the last side."""
    items = [item[match.end() :] if (match := _HEAD.match(item)) else item for item in parts(tex)]
    if len(items) == 1 and not re.search(r"[<>]|\\[lg]e", items[0]):
        return items[0].rpartition("=")[2]
    return ",".join(items)


@lru_cache(4096)
def _verify(gold: str, result: str) -> bool:
    from math_verify import verify

    try:
        left, right = _parsed(gold), _parsed(result)
        if not verify(left, right, allow_set_relation_comp=True, timeout_seconds=None):
            return False
        zeros = _leading_zeros(left, right)
        if zeros <= 3:
            return True
        return bool(verify(left, right, float_rounding=zeros + 3, numeric_precision=15 + zeros, timeout_seconds=None))
    except Exception:  # sympy raises all kinds of errors for huge numbers and for anything but mathematics
        return False


@lru_cache(4096)
def _parsed(tex: str) -> list[Any]:
    from math_verify import parse

    # it warns of the missing time limit, which `within` provides
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(rf"$\boxed{{{tex}}}$", parsing_timeout=None)


def _leading_zeros(*results: list[Any]) -> int:
    """Leading zeros of the smallest number in the results: math-verify takes decimals below 1e-6, and differences below
    1e-15, for zero, however small the numbers that it compares."""
    from sympy import Basic, log, preorder_traversal

    zeros = 0
    for expression in (one for result in results for one in result if isinstance(one, Basic)):
        for part in preorder_traversal(expression):
            if getattr(part, "is_number", False):
                value = abs(part.evalf(5))
                if value.is_Float and 0 < value < 1:
                    zeros = max(zeros, math.ceil(-float(log(value, 10))))
    return zeros
