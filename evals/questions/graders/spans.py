"""longbench_hotpotqa: the words that a text states, compared as SQuAD compares them, accents aside.

LongBench itself (arXiv 2308.14508) takes the token F1 of the whole output, the best over the answers; that is
`longbench_f1`, and it is reported under that name beside the accuracy.
"""

import re
import string
import unicodedata
from collections import Counter
from typing import Any

from evals.questions.graders.statements import FILLER, boxes, clean, correction, stated, stated_before

_TEX = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|boldsymbol)\b\s*|\\[()\[\] ,;]|[\"${}]")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DASHES = str.maketrans(dict.fromkeys("–—‐‑", "-"))
# letters that Unicode does not take apart
_WHOLE = str.maketrans(
    {"ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ı": "i", "ß": "ss", "æ": "ae", "œ": "oe"}
)

# Where a stated answer may end. Names hold such words too, so the text up to each of them is compared.
_END = re.compile(
    r"\s*(?:\||,\s+(?!(?:and|or|nor)\b|\w+(?:,|\s+(?:and|or)\b|\W*\Z))(?=(?-i:(?!the\b|an?\b)[a-z]|(?:the"
    r"|an?)\s+[a-z]))|\s(?:with|by|over|in|from|per|see|at)\b(?=[^.]*\b(?:passages?|context|text)\b)"
    r"|[.!?](?=\s+(?!\s|or\b|and\b|nor\b)|\Z)|\n|[(\[;]|:\s|\s[-–—]+\s|[–—]"
    r"|\"\s*[,}]|,?\s+(?:(?:found|mentioned|named|stated|given|listed|described) in)\b"
    r"|,?\s+(?:because|since|for the|according to|based on|which|who|whose|where|when|so|from (?:the|passage)"
    r"|(?:in|per|see) (?:the )?passage"
    r"|as (?:stated|found|mentioned|described|noted|shown|given|per|seen|the|passage|in|both|it|is|we|indicated"
    r"|said|told|you|can)"
    r"|while|whereas|although|though|even though|unlike|as opposed to|given|(?:and|but)(?:\s+\w+ly)?\s+not|not"
    r"|rather than|instead of|and (?:this|that|it)|is (?:the|my|what)|was (?:the|what)|would be)\b)",
    re.IGNORECASE,
)
_NOT = re.compile(
    r"\A\W*(?:n't|(?:(?:it|that|this)\s+)?(?:not|never|neither|either|(?:is|are|was|were)(?:n't| not)))\b",
    re.IGNORECASE,
)
_INSTEAD = re.compile(
    r"\b(?:but(?:\s+rather)?|rather|instead,?)\s+(?:it(?:'s| is| was)\s+)?|\bit(?:'s| is| was)\s+", re.IGNORECASE
)
_LEAD_IN = re.compile(
    r"\A\W*(?:(?:according to|based on|as (?:stated|found|mentioned|described) in|looking at|from|given|in"
    r"|per)\s+(?:all\s+|both\s+|the\s+|these\s+)*"
    r"(?:given\s+|provided\s+)?(?:passages?|context|text|information|documents?|facts?)\b[^,:.]*[,:]\s*"
    r"|(?:so|therefore|thus|hence|in conclusion|in other words|in fact|to sum up|to conclude|as a result"
    r"|in short|in summary|overall|finally|ultimately|well|okay"
    r"|clearly|indeed|actually|of course|namely|that is,|sure)\b[,:!]?\s+"
    r"|(?:the\s+)?(?:passages?|context|text)(?:\s+\d+)?\s*(?::|\b(?:says?|states?|mentions?|tells?(?:\s+us)?"
    r"|shows?|confirms?|indicates?)(?:\s+that)?)\s*:?\s*"
    r"|it is (?:stated|said|known|clear|mentioned) that\s+|(?:it|this|that)\s+(?:seems|appears|turns out)\s+to\s+be\s+"
    r"|(?:(?:I|we)\s+(?:get|find|have|obtain|arrive at)|to answer (?:the|this|your) question[,:]|I(?:'d|'ll"
    r"| would| will) (?:say|answer|choose|go with):?|none other than|(?:after|having|considering"
    r"|reading)\b[^,.\n]{3,80}|I'd say"
    r"|I would say),?\s+|(?:(?:I|we)\s+(?:think|believe|know|conclude|find|can say|would say|see|can conclude)"
    r"|it\s+(?:follows|seems|appears)|this means)\s+(?:that\s+)?"
    r"|that\s+(?!is\b|was\b|would\b|must\b|'s)"
    r"|(?:it|this|that|they|these|he|she)(?:'s|\s+(?:is|was|are|were|(?:would|must|has to|should|can only"
    r"|will)\s+be))\s+)+",
    re.IGNORECASE,
)
_PREPOSITION = re.compile(r"\A\W*(?:in|on|at|by|from|to|of|for|with|as|called|named)\s+(?=\S)", re.IGNORECASE)
_UNSURE = re.compile(
    r"\b(?:could|might|may)\s+(?:also\s+)?be\b|\bwhether\b|\b(?:cannot|can't)\s+(?:tell|say|be)\b|\b(?:not sure"
    r"|unsure)\b"
    r"|\bdo(?:es)?(?: not|n't) (?:know|mention|say|state)\b",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"(?<=[\s\"')])(?:(?:this|that|it|the answer|the information)\s+(?:is|was|can be|information|fact|comes"
    r"|follows|appears)|see\b|source|explanation|reason"
    r"|because|as\b|passage \d+ (?:says|states|mentions))[^\n]*\b(?:passages?|context|text|sources?|reason"
    r"|explanation)\b[^\n]*\Z",
    re.IGNORECASE,
)
_EXPLAINS = re.compile(
    r"\n\s*(?:explanation|reason(?:ing)?|because|source|evidence|passages?|note|facts?|this|here)\b.*",
    re.IGNORECASE | re.DOTALL,
)
_REFERENCE = re.compile(r"\s*[(\[][^()\[\]]*(?:passage|context|source|\b\d\b)[^()\[\]]*[)\]]", re.IGNORECASE)
# "The answer is derived from Passage 3" states nothing.
_ASIDE = re.compile(
    r"\W*(?:derived|based|found|stated|given|mentioned|taken|obtained|located|supported|confirmed|clear|helpful"
    r"|not (?:given|stated)|in passage|from)\b",
    re.IGNORECASE,
)
_DANGLING = re.compile(r"(?<=[\s.])[^.!?\n]*\banswer(?:\s+is|:)\W*(?:clear|as above|given above)?\W*\Z", re.IGNORECASE)
_YES_NO = re.compile(
    r"\A\W*(yes|no)\b(?!\s+(?:one|more|other|longer)\b)(?!\s*(?:,|or|and|/)\s*(?:or\s+)?(?:possibly\s+"
    r"|maybe\s+)?(?:yes|no)\b)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[a-z0-9)\"'][.!?])\s+(?=[A-Z\"'])|(?<=[A-Z]{2}[.!?])\s+(?=[A-Z])|\n+")
_IS_YES_NO = re.compile(r"\bis (yes|no)\W*\Z", re.IGNORECASE)
_FUNCTION = frozenset(
    "is are was were be been being by in on at of to for from with as and that this these those it its he she they "
    "them his her their who whom whose which what when where how many much do does did has have had one both same "
    "also so therefore there here said called named known would will can the a an passage passages answer "
    "according based i".split()
)
_COPULA = frozenset(("is", "was", "are", "were"))
_STEM = re.compile(r"(?<=\w{3})(?:ings?|ed|ers?|es|s|d|e|ly)$")


def grade_span(row: dict[str, Any], text: str) -> tuple[bool, float]:
    """Whether the stated answer is one of the row's, and the token F1 of what is stated."""
    answers = row["answers"]
    golds = {normal(answer) for answer in answers}
    segment, is_stated = _stated(clean(text, answers), golds)
    correct = _is_answer(segment, is_stated, answers, golds, row.get("question", ""))
    guess = segment.strip().partition("\n")[0]
    return correct, 1.0 if correct else max(f1(guess, answer) for answer in answers)


def longbench_f1(text: str, answers: list[str]) -> float:
    """Token F1 of the whole output, the best over the answers, from 0 to 1."""
    return max(f1(text, answer) for answer in answers)


def f1(prediction: str, answer: str) -> float:
    """The harmonic mean of the shares of tokens that prediction and answer have in common; 0 where one has none."""
    left, right = squad_normal(prediction).split(), squad_normal(answer).split()
    common = sum((Counter(left) & Counter(right)).values())
    return 2 * common / (len(left) + len(right)) if common else 0.0


def squad_normal(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces: what SQuAD compares (arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def normal(text: str) -> str:
    """What is compared here: SQuAD's form, without accents and TeX. An answer of articles alone stays what it is."""
    text = _TEX.sub("", text)
    if not text.isascii():
        apart = unicodedata.normalize("NFKD", text.translate(_DASHES).translate(_WHOLE))
        text = "".join(c for c in apart if unicodedata.category(c) not in ("Mn", "So", "Cf"))
    return squad_normal(text) or " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def _suffixes(text: str) -> list[str]:
    """The text, and the rest behind each of its marks and of its words in lower case."""
    return [text, *(text[m.end() :] for m in re.finditer(r"[.!?,:]\s+|\b(?!(?:and|or|not|nor)\b)[a-z]+\s+", text))]


def _stated(text: str, golds: set[str]) -> tuple[str, bool]:
    """What the text states last, in a box, behind "answer is" or before "is the answer"; else all of it and False."""
    later = correction(text)
    if later and (stated(later) or boxes(later)):
        text = later
    found = boxes(text)
    for position, segment in stated(text):
        if found and position < found[-1][1]:
            break
        if normal(segment) and not _ASIDE.match(segment):
            return segment, True
    if found:
        return found[-1][2], True
    if before := stated_before(text):
        return next((part for part in _suffixes(before) if normal(part) in golds), before), True
    return (later if later and 0 < len(normal(later).split()) < 12 else text), False


def _is_answer(segment: str, is_stated: bool, answers: list[str], golds: set[str], question: str) -> bool:
    segment = _TEX.sub("", segment).strip()
    if _names(segment, golds) or _names(segment[FILLER.match(segment).end() :], golds):
        return True
    body = _EXPLAINS.sub("", _REMARK.sub("", _REFERENCE.sub("", _DANGLING.sub("", segment)))).strip()
    sentences = [part for part in _SENTENCE.split(body) if part and normal(part)]
    if not sentences:
        return False
    # a statement ends with its sentence; a text that states nothing has its answer at the end
    sentence = _LEAD_IN.sub("", sentences[0 if is_stated else -1])
    if golds <= {"yes", "no"}:
        match = _YES_NO.match(sentence) or _YES_NO.match(_LEAD_IN.sub("", sentences[0])) or _IS_YES_NO.search(sentence)
        return bool(match) and normal(match[1]) in golds and not _UNSURE.search(sentence)
    return (len(sentences) > 1 and _names(sentence, golds)) or any(_tells(sentence, a, question) for a in answers)


def _names(text: str, golds: set[str]) -> bool:
    """Whether the text, or the text up to a place where an answer may end, is one of the answers."""
    text = _LEAD_IN.sub("", text)
    if normal(text) in golds:
        return True
    if _NOT.match(text):
        after = _INSTEAD.search(text)
        return bool(after) and _names(text[after.end() :], golds)
    for end in [match.start() for match in _END.finditer(text)][:8] + [len(text)]:
        part = text[:end]
        if normal(part) in golds or normal(_PREPOSITION.sub("", part)) in golds:
            return True
    return False


def _tells(sentence: str, answer: str, question: str) -> bool:
    """Whether the sentence answers the question: what it adds to the question's words is the answer and nothing else.

    Where the question itself names the answer, as in "Which is older, X or Y?", the sentence has to begin with it.
    """
    if _UNSURE.search(sentence):
        return False
    plain, gold = f" {normal(sentence)} ", f" {normal(answer)} "
    at = plain.find(gold)
    if at < 0:
        return False
    before, after = plain[:at].split(), plain[at + len(gold) :].split()
    if {"not", "neither", "nor"} & {*before, *after[:1]} or "or" in (*before[-3:], *after[:1]):
        return False
    # an answer that ends the sentence behind "is" may be called anything, where nothing else is named
    named = {word.lower() for word in re.findall(r"(?<!^)\b[A-Z][\w'.-]*|\d+", sentence[: -len(answer) - 1])}
    ends = not after and bool(before) and before[-1] in _COPULA
    asked = {_STEM.sub("", word) for word in normal(question).split()}
    known = [word in _FUNCTION or _STEM.sub("", word) in asked for word in before + after]
    if {_STEM.sub("", word) for word in gold.split()} <= asked | _FUNCTION:
        begins = (
            not before and bool(after) and after[0] in _FUNCTION - {"and"} and "," not in sentence[: len(answer) + 1]
        )
        return begins or (ends and not named)
    return all(is_known or (ends and word not in named) for is_known, word in zip(known, before + after, strict=True))
