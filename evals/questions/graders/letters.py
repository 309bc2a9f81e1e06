"""choice: the letter that a text settles on, by its name or by the words of its choice.

lm-eval's generative variants of mmlu take what follows "The answer is" (strict-match) or the last "(B)" of the text
(flexible-extract).
"""

import re
from functools import lru_cache
from typing import Any

from evals.questions.graders.choices import DRESS, Words
from evals.questions.graders.patterns import BAD, NOUN, OTHER_NAMES, SKIP
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

# a verdict after a choice: "B. Paris - correct", "B. Paris: This is the correct answer"
_CALLED_CORRECT = re.compile(
    r"(?:[-–—:(.,]\s*(?:(?:so|thus|therefore)\s+)?(?:(?:this|that|it|which)\s+)?(?:is\s+)?|\bis\s+)(?:the\s+)?"
    r"(?:correct|right|true)\b(?!\?)|[✓✔]",
    re.IGNORECASE,
)
_LAST_I = re.compile(r"(?<=[\n.:→])\s*I\W*\Z")


class Undecided(Exception):
    """The text names several letters, or says that there is none."""


def grade_letter(row: dict[str, Any], text: str) -> tuple[bool, str | None]:
    """Whether the text settles on the row's letter, and the letter it settles on."""
    try:
        letter = final_letter(text, row["choices"])
    except Undecided:
        return False, None
    return letter == row["answer"], letter


_words = lru_cache(256)(Words)


def final_letter(text: str, choices: list[str]) -> str | None:
    """The letter that the text settles on, or None. Raises Undecided for several."""
    words = _words(tuple(choices))
    # of many choices X may be one, and no placeholder
    text = clean(text, words.letters.all)
    found = boxes(text)
    if found:
        if len(found) > 1 and re.fullmatch(r"\W*(?:or|and|,)\W*", text[found[-2][1] : found[-1][0]]):
            raise Undecided
        if letter := _statement(
            words.letters.rejected.sub(" ", words.without_own(DRESS.sub("", found[-1][2]), BAD)), words
        ):
            return letter
    plain = _without_listed(words.without_own(DRESS.sub("", text), BAD), words)
    # a text that ends with a pronoun was cut, one that ends with the letter was not
    whole = _LAST_I.sub(" (I)", text) if "I" in words.letters.all else text
    plain = "\n".join(
        words.letters.rejected.sub(" ", line) if words.letters.mention.search(line) else line
        for line in plain.split("\n")
    )
    later = correction(plain)
    if later and (letter := _settled(later, words, whole)):
        return letter
    return _settled(plain, words, whole)


def _without_listed(plain: str, words: Words) -> str:
    """A text that goes through the choices before it names one, without them; if it calls one correct, with that."""
    found = list(words.letters.listed.finditer(plain))
    letters = [match["letter"] for match in found]
    if len(letters) < max(2, len(words.choices) - 1) or letters != sorted({*letters}):
        return plain
    before = plain[: found[0].start()]
    if words.letters.mention.search(before) or words.without(before) != before:
        return plain
    # a conclusion may stand in the last one's line
    end = plain[found[-1].start("behind") :]
    if plain[found[0].end() : found[1].start()].strip() or stated(end):
        return plain
    right = [match["letter"] for match in found if _CALLED_CORRECT.search(words.without(match[0]))]
    rest = "".join(SENTENCE_END.split(end, maxsplit=1)[1:]).strip()
    return f"{right[0]} is correct.\n{rest}" if len(right) == 1 else rest


def _settled(plain: str, words: Words, whole: str) -> str | None:
    for position, segment in stated(plain):
        if letter := _statement(segment, words):
            if undecided(plain, position):
                raise Undecided
            return letter
    if undecided(words.without(DRESS.sub("", whole))):
        raise Undecided
    if (before := stated_before(plain)) and (
        letter := words.whole(before) or _named_last(SENTENCE_END.split(before)[-1], words)
    ):
        return letter
    if letter := _leading(plain, words) or words.called_right(plain.strip("' ")):
        return letter
    sentences = [words.letters.hedged.sub("", s) for s in SENTENCE_END.split(plain) if s.strip()]
    for find in (_positive, _chosen, _label, _in_sentence, _alone):
        for sentence in reversed(sentences):
            if letter := find(sentence, words):
                if words.letters.unsure.search(sentence):
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
    skipped = skipped[SKIP.match(skipped).end() :].lstrip("*:- ")
    named = words.at_start(skipped)
    label = words.letters.label.match(skipped)
    if label and not (named and named[1] > label.end() + 2):
        return _only(label, skipped, words)
    if named:
        other = re.match(r"\W*(?:or|and)\s+(?:possibly\s+|maybe\s+)?(?:the\s+|an?\s+)?", skipped[named[1] :])
        if other and words.at_start(skipped[named[1] + other.end() :]):
            raise Undecided
        if re.match(r"[^\w]*(?:\Z|\n|[.(,;—–-]|because|since|as|which|option|i\.e)", skipped[named[1] :]):
            return named[0]
    sentence = SENTENCE_END.split(skipped, maxsplit=1)[0]
    if re.match(r"(?:either|neither|both|not|between)\b", skipped, re.I) or (
        words.letters.mention.search(sentence) and words.letters.unsure.search(sentence)
    ):
        raise Undecided
    return words.at_end(": " + sentence) or _in_sentence(sentence, words)


def _letter(label: re.Match) -> str:
    """The letter that `Letters.label` has matched."""
    return (label["bracketed"] or label["bare"] or label["lower"]).upper()


def _only(label: re.Match, text: str, words: Words) -> str:
    """The letter of a label in `text`. Raises Undecided for "B or C"."""
    other = words.letters.more.match(text[label.end() :])
    if other and other["other"] != _letter(label):
        raise Undecided
    return _letter(label)


def _leading(plain: str, words: Words) -> str | None:
    """A label that the text begins with, or a first line that is a choice's words."""
    text = plain.strip("'\" \n")
    both = re.match(rf"(?i:either\s+|both\s+|maybe\s+)?[(\[<]?({words.letters.one})", text)
    if both and (other := words.letters.more.match(text[both.end() :])) and other["other"] != both[1]:
        raise Undecided
    label = re.match(
        rf"[(\[<]?(?P<letter>{words.letters.one}|{words.letters.lower}(?=[).\]:>]|\s*\Z))(?P<then>[)\]>]|\s*(?:\Z|\n|[.:,;!—–-](?![\w.])"
        rf"|(?:because|since)\b)|\s+[(-])",
        text,
    )
    if label:
        return label["letter"].upper()
    first = text.partition("\n")[0]
    if letter := words.whole(first) or words.whole(first[FILLER.match(first).end() :]):
        return letter
    named = re.fullmatch(rf"(.*?)\s*[(\[](?:option\s+)?({words.letters.upper})[)\]]\.?", first)
    return named[2] if named and words.whole(named[1]) == named[2] else None


def _positive(sentence: str, words: Words) -> str | None:
    """The letter that is called correct, right or best."""
    found = list(words.letters.positive.finditer(sentence))
    if found and found[-1]["before"]:
        raise Undecided
    return found[-1]["letter"] if found else words.called_right(sentence)


def _chosen(sentence: str, words: Words) -> str | None:
    """The letter after "I choose", "it must be", "which leaves"."""
    for match in reversed(list(words.letters.choose.finditer(sentence))):
        rest = sentence[match.end() :]
        rest = rest[SKIP.match(rest).end() :]
        label = words.letters.label.match(rest)
        if label:
            return _only(label, rest, words)
        if (named := words.at_start(rest)) and not rest[named[1] :].strip(" .!)"):
            return named[0]
    return None


def _label(sentence: str, words: Words) -> str | None:
    """The letter that, alone or with its choice's words, is the whole sentence or follows its colon."""
    for text in (sentence, sentence.rpartition(":")[2]):
        rest = text[(lead.end() if (lead := words.letters.lead_in.match(text)) else 0) :].strip()
        label = words.letters.label.match(rest)
        if label:
            letter = _letter(label)
            behind = rest[label.end() :].strip(" .:)]>,!-–—\U0001f389✅")
            if not behind or words.whole(behind) == letter:
                return letter
    return None


def _in_sentence(sentence: str, words: Words) -> str | None:
    """A letter that ends the sentence, in brackets or not, or that follows "option"."""
    last = re.search(rf"(?P<letter>{words.letters.one})[)\]>]?\W*\Z", sentence)
    found = set(words.letters.mention.findall(sentence))
    if last and len(found) == 1 and not OTHER_NAMES.search(sentence[: last.start()]):
        return last["letter"]
    named = re.findall(rf"\b{NOUN}\s*:?\s*[(\[<]?({words.letters.named})\b", sentence) + re.findall(
        rf"\b{NOUN}\s+[(\[]?({words.letters.lower})[)\]]?\W*\Z", sentence
    )
    if len(set(named)) > 1:
        raise Undecided
    return named[0].upper() if named else None


def _alone(sentence: str, words: Words) -> str | None:
    """The one letter of the sentence, whatever is said of it."""
    found = list(words.letters.mention.finditer(sentence))
    if len({match.group() for match in found}) > 1:
        raise Undecided
    return found[0].group() if found and not OTHER_NAMES.search(sentence[: found[0].start()]) else None


def _named_last(text: str, words: Words) -> str | None:
    """The letter that the text ends with. Raises Undecided if it ends with a list of letters."""
    if re.search(rf"{words.letters.list}\W*\Z", text):
        raise Undecided
    last = re.search(rf"(?P<letter>{words.letters.one})[)\]>]?(?:\s*[,(:][^,]*)?\W*\Z", text)
    return last["letter"] if last and not words.letters.unsure.search(text) else None
