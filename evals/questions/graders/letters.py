"""mmlu: the letter that a text settles on, by its name or by the words of its choice.

lm-eval's generative variants of mmlu take what follows "The answer is" (strict-match) or the last "(B)" of the text
(flexible-extract).
"""

import re
from functools import lru_cache
from typing import Any

from evals.questions.graders.choices import DRESS, GOOD, Words
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

_NOUN = r"(?i:(?:answer choice|option|choice|letter|answer|statement|alternative|response)s?)"
# A verb or a link behind it tells the letter A from the article.
_LINK = (
    r"(?:is|are|was|were|because|since|as|or|nor|and|but|fits?|seems?|looks?|match(?:es)?|makes?|best|would"
    r"|should|must|can|could|may|might|works?|holds|applies|wins|suits|appears|remains|captures|explains|stands|takes|"
    r"expresses|represents|reflects|agrees|covers|answers|addresses|includes|refers|summarizes|defines"
    r"|identifies|suggests|supports|follows|"
    r"gives|provides|offers|shows|contains|means|sounds|meets|satisfies|corresponds|does|do|has|which|rather|not|correct(?:ly)?|right|states|describes|says|for|here|instead|in|so|it|wrong"
    r"|incorrect|with|over|the|alone|on|that)\b"
)
_LETTER = rf"(?<![\w'.\\^-])(?:[BCD]|(?<=ption )A|(?<=hoice )A|A(?!\s+(?!{_LINK})[a-z]))(?![\w'°²]|\.\w|-\w)"
_IN_BRACKETS = rf"(?>[(\[<]?{_LETTER}[)\]>]?)"
_AND = r"\s*(?:,\s*(?:and\b|or\b)?|/|&|\band\b|\bor\b)\s*"
_LIST = rf"(?>{_IN_BRACKETS}(?:{_AND}{_IN_BRACKETS}){{1,3}})"
_MENTION = re.compile(_LETTER)
_LABEL = re.compile(
    rf"[(\[<]\s*(?P<bracketed>[A-Da-d])\s*[)\]>]|(?P<bare>{_LETTER})|(?P<lower>[a-d])(?=\s*(?:[.):,;!]|\n|\Z)(?!\w))"
)
_MORE = re.compile(
    rf"[\s)\].>]*(?:,?\s*(?i:\b(?:or|and)\b)|,|/|&)\s*(?:(?:maybe|perhaps|also|possibly"
    rf"|even)\s+)?(?:{_NOUN}\s+)?[(\[<]?(?P<other>{_LETTER})[)\]>]?"
    r"(?![\w'])(?!\s+(?:is|does|do|can|seems|would|has|fits|comes|looks|describes|says)\b)"
)
_BAD = (
    r"(?:wrong|incorrect|not\b|false|ruled out|eliminated|excluded|too\b|out\b|unlikely|invalid|irrelevant"
    r"|implausible|never|off\b|weak|no\b|❌)"
)
_REJECTED = re.compile(
    rf"(?:,?\s*\b(?:and|but)\s+)?(?i:\b(?:not|nor|neither|rather than|instead of|cannot be|unlike|thought of"
    rf"|none of|anything but|rul(?:ed?|es|ing) out|eliminate[sd]?|eliminating|excludes?|rejects?"
    rf"|(?:(?<=prefer [A-D] )|(?<=preferring [A-D] ))(?:to|over))|n't)\s+"
    rf"(?:be\s+|an?\s+|the\s+)?(?:{_NOUN}\s+)?(?:{_LIST}|{_IN_BRACKETS})(?:\s*(?:,|\bnor\b)\s*{_IN_BRACKETS}){{0,3}}"
    rf"|(?i:between|of|comparing)\s+{_IN_BRACKETS}\s*(?:and|or|with|to|,|/)\s*{_IN_BRACKETS}(?=,)"
    rf"|(?:{_NOUN}\s+)?{_IN_BRACKETS}[.:?]?\s*(?:(?:is|was|can|could|looks?|seems?|may|might)\s+(?:clearly\s+"
    rf"|also\s+|only\s+|partly\s+)*"
    rf"(?:be\s+)?)?{_BAD}"
    rf"|(?:{_NOUN}\s+)?{_IN_BRACKETS}\s+(?:(?:is|does|do|can|was|did)n't\b|(?:does|do|did|can)(?:\s+not|not)\b"
    r"|(?:(?:looks?|seems?)\s+right|(?:looks?|seems?|is)\s+(?:tempting|plausible|close|possible|partly"
    r"|attractive))\b(?=[^.\n]*,)|before,)"
    rf"|(?:{_NOUN}\s+)?{_LIST}\s*[:–-]\s*{_BAD}|(?:{_NOUN}\s+)?{_LIST}\s+(?:(?:are|were|can(?:not)?|could|do|all)\s+(?:all\s+|both\s+|clearly\s+"
    rf"|also\s+|be\s+)*{_BAD}|(?:are|do|can)n't\b)"
)
_POSITIVE = re.compile(
    rf"(?P<before>{_LETTER}[)\]>]?\s*(?:,?\s*\b(?:and|or)\b|/"
    rf"|&)\s*(?:{_NOUN}\s+)?)?[(\[<]?(?P<letter>{_LETTER})[)\]>]?(?:,[^,.\n]{{1,80}},|\s\([^()\n]{{1,80}}\))?"
    rf"(?:[:?.]?\s*(?:(?:is|are|must|would|should|can|could|seems|appears|has"
    rf"|as)\s+(?:to\s+)?(?:be\s+)?(?:clearly\s+|indeed\s+|definitely\s+|therefore\s+|both\s+)*)?"
    rf"(?:the\s+|a\s+)?(?:only\s+|one\s+|single\s+|most\s+|safest\s+|correct\s+)*{GOOD}|\s+(?:fits|matches"
    rf"|works|holds|applies|(?:\w+\s+){{1,3}}best|it is|does)\b|\s+(?:is|does)\W*\Z)",
)
_CHOOSE = re.compile(
    rf"\b(?:{_NOUN}|(?i:selection|pick|guess|one|verdict))\s*(?:(?:is|was|must be|should be|would be"
    rf"|has to be)\b|[:=-])[\s:]*"
    r"|\b(?i:choose|pick|select|say|go with|opt for|going with|settle on|answer with|choosing|selecting"
    r"|vote for|go for|makes?)\s+"
    r"|\b(?i:leaves|leaving|points to|corresponds to|match(?:es)?|means|only|by|in|as|labell?ed|to"
    r"|with)\s+(?:us\s+with\s+|with\s+|only\s+|that\s+)?"
    r"|\b(?i:it|that|this|which|fits|left|described)(?:\s+(?:is|must be|has to be|should be|would be"
    r"|can only be)|'s)\s+",
    re.MULTILINE,
)
_SKIP = re.compile(
    rf"(?:but\s+(?:rather\s+)?|it(?:'s| is)\s+)?(?:(?:the\s+)?(?:(?:correct|right|best|most appropriate|final"
    rf"|one)\s+)?(?:{_NOUN}|labell?ed|one)\s*:?\s+)*",
    re.IGNORECASE,
)
_UNSURE = re.compile(
    r"\b(?:not sure|unsure|whether|(?:could|might|may)\s+(?:also\s+)?be|cannot tell|can't tell|do not know"
    r"|don't know|between|both(?=\s+(?-i:[(\[]?[A-D]\b)))\b",
    re.I,
)
_LEAD_IN = re.compile(
    r"\A\W*(?:(?:so|therefore|thus|hence|definitely|clearly|probably|likely|obviously|surely|correct|right"
    r"|finally|overall|by (?:process of )?elimination"
    r"|it is|it's|answer|then|but|and|also|yes)\b[\s,:]*)*(?=[(\[<A-D]|[a-d]\W*\Z)",
    re.IGNORECASE,
)
_OTHER_NAMES = re.compile(
    r"\b(?:vitamin|hepatitis|type|group|class|plan|grade|point|set|figure|section|case|part|step|set|factor)\s+\Z", re.I
)


# "B would be right if ..., but it is C"
_HEDGED = re.compile(
    r"(?:\A.*\b(?:would|might|may|could|first|seems?|sounds?|looks?|tempt\w*|almost|initially)\b.*?,?\s+but\b"
    r"|\A.*,\s+(?:so|hence|therefore|thus)\b)"
    rf"(?=.*{_LETTER})",
)


class Undecided(Exception):
    """The text names several letters, or says that it has none."""


def grade_letter(row: dict[str, Any], text: str) -> tuple[bool, str | None]:
    """Whether the text settles on the row's letter, and on which it does."""
    try:
        letter = final_letter(text, row["choices"])
    except Undecided:
        return False, None
    return letter == row["answer"], letter


_words = lru_cache(256)(Words)


def final_letter(text: str, choices: list[str]) -> str | None:
    """The letter that the text settles on, or None. Raises Undecided for several."""
    text = clean(text)
    words = _words(tuple(choices))
    found = boxes(text)
    if found:
        if len(found) > 1 and re.fullmatch(r"\W*(?:or|and|,)\W*", text[found[-2][1] : found[-1][0]]):
            raise Undecided
        if letter := _statement(_REJECTED.sub(" ", words.without_own(DRESS.sub("", found[-1][2]), _BAD)), words):
            return letter
    plain = words.without_own(DRESS.sub("", text), _BAD)
    whole = text
    plain = "\n".join(_REJECTED.sub(" ", line) if _MENTION.search(line) else line for line in plain.split("\n"))
    later = correction(plain)
    if later and (letter := _settled(later, words, whole)):
        return letter
    return _settled(plain, words, whole)


def _settled(plain: str, words: Words, whole: str) -> str | None:
    for position, segment in stated(plain):
        if letter := _statement(segment, words):
            if undecided(plain, position):
                raise Undecided
            return letter
    if undecided(words.without(DRESS.sub("", whole))):
        raise Undecided
    if (before := stated_before(plain)) and (
        letter := words.whole(before) or _named_last(SENTENCE_END.split(before)[-1])
    ):
        return letter
    if letter := _leading(plain, words) or words.called_right(plain.strip("' ")):
        return letter
    sentences = [_HEDGED.sub("", s) for s in SENTENCE_END.split(plain) if s.strip()]
    for find in (_positive, _chosen, _label, _in_sentence, _alone):
        for sentence in reversed(sentences):
            if letter := find(sentence, words):
                if _UNSURE.search(sentence):
                    raise Undecided
                return letter
    return words.at_end(sentences[-1]) if sentences else None


def _statement(segment: str, words: Words) -> str | None:
    """The letter or the words that a statement begins with. Raises Undecided for "B or C"."""
    rest = segment.strip("'\" \n")
    opening = FILLER.match(rest)
    skipped = rest[opening.end() :]
    if opening.group().rstrip()[-1:] in ("(", "["):
        skipped = opening.group().rstrip()[-1] + skipped
    skipped = skipped[_SKIP.match(skipped).end() :].lstrip("*:- ")
    named = words.at_start(skipped)
    label = _LABEL.match(skipped)
    if label and not (named and named[1] > label.end() + 2):
        letter = (label["bracketed"] or label["bare"] or label["lower"]).upper()
        other = _MORE.match(skipped[label.end() :])
        if other and other["other"] != letter:
            raise Undecided
        return letter
    if named:
        other = re.match(r"\W*(?:or|and)\s+(?:possibly\s+|maybe\s+)?(?:the\s+|an?\s+)?", skipped[named[1] :])
        if other and words.at_start(skipped[named[1] + other.end() :]):
            raise Undecided
        if re.match(r"[^\w]*(?:\Z|\n|[.(,;—–-]|because|since|as|which|option|i\.e)", skipped[named[1] :]):
            return named[0]
    sentence = SENTENCE_END.split(skipped, maxsplit=1)[0]
    if re.match(r"(?:either|neither|both|not|between)\b", skipped, re.I) or (
        _MENTION.search(sentence) and _UNSURE.search(sentence)
    ):
        raise Undecided
    return words.at_end(": " + sentence) or _in_sentence(sentence, words)


def _leading(plain: str, words: Words) -> str | None:
    """A label that the text begins with, or a first line that is a choice's words."""
    text = plain.strip("'\" \n")
    both = re.match(rf"(?i:either\s+|both\s+|maybe\s+)?[(\[<]?({_LETTER})", text)
    if both and (other := _MORE.match(text[both.end() :])) and other["other"] != both[1]:
        raise Undecided
    label = re.match(
        rf"[(\[<]?(?P<letter>{_LETTER}|[a-d](?=[).\]:>]|\s*\Z))(?P<then>[)\]>]|\s*(?:\Z|\n|[.:,;!—–-](?![\w.])"
        rf"|(?:because|since)\b)|\s+[(-])",
        text,
    )
    if label:
        return label["letter"].upper()
    first = text.partition("\n")[0]
    if letter := words.whole(first) or words.whole(first[FILLER.match(first).end() :]):
        return letter
    named = re.fullmatch(r"(.*?)\s*[(\[](?:option\s+)?([A-D])[)\]]\.?", first)
    return named[2] if named and words.whole(named[1]) == named[2] else None


def _positive(sentence: str, words: Words) -> str | None:
    """The letter that is called correct, right or best."""
    found = list(_POSITIVE.finditer(sentence))
    if found and found[-1]["before"]:
        raise Undecided
    return found[-1]["letter"] if found else words.called_right(sentence)


def _chosen(sentence: str, words: Words) -> str | None:
    """The letter behind "I choose", "it must be", "which leaves"."""
    for match in reversed(list(_CHOOSE.finditer(sentence))):
        rest = sentence[match.end() :]
        rest = rest[_SKIP.match(rest).end() :]
        label = _LABEL.match(rest)
        if label:
            letter = (label["bracketed"] or label["bare"] or label["lower"]).upper()
            other = _MORE.match(rest[label.end() :])
            if other and other["other"] != letter:
                raise Undecided
            return letter
        if (named := words.at_start(rest)) and not rest[named[1] :].strip(" .!)"):
            return named[0]
    return None


def _label(sentence: str, words: Words) -> str | None:
    """The letter that, alone or with its choice's words, is the whole sentence or what follows its colon."""
    for text in (sentence, sentence.rpartition(":")[2]):
        rest = text[(lead.end() if (lead := _LEAD_IN.match(text)) else 0) :].strip()
        label = _LABEL.match(rest)
        if label:
            letter = (label["bracketed"] or label["bare"] or label["lower"]).upper()
            behind = rest[label.end() :].strip(" .:)]>,!-–—\U0001f389✅")
            if not behind or words.whole(behind) == letter:
                return letter
    return None


def _in_sentence(sentence: str, words: Words) -> str | None:
    """A letter that ends the sentence, in brackets or not, or that stands behind "option"."""
    last = re.search(rf"(?P<letter>{_LETTER})[)\]>]?\W*\Z", sentence)
    found = set(_MENTION.findall(sentence))
    if last and len(found) == 1 and not _OTHER_NAMES.search(sentence[: last.start()]):
        return last["letter"]
    named = re.findall(rf"\b{_NOUN}\s*:?\s*[(\[<]?([A-D])\b", sentence) + re.findall(
        rf"\b{_NOUN}\s+[(\[]?([a-d])[)\]]?\W*\Z", sentence
    )
    if len(set(named)) > 1:
        raise Undecided
    return named[0].upper() if named else None


def _alone(sentence: str, words: Words) -> str | None:
    """The one letter of the sentence, whatever is said of it."""
    found = list(_MENTION.finditer(sentence))
    if len({match.group() for match in found}) > 1:
        raise Undecided
    return found[0].group() if found and not _OTHER_NAMES.search(sentence[: found[0].start()]) else None


def _named_last(text: str) -> str | None:
    """The letter that the text ends with. Raises Undecided where it ends with a list of them."""
    if re.search(rf"{_LIST}\W*\Z", text):
        raise Undecided
    last = re.search(rf"(?P<letter>{_LETTER})[)\]>]?(?:\s*[,(:][^,]*)?\W*\Z", text)
    return last["letter"] if last and not _UNSURE.search(text) else None
