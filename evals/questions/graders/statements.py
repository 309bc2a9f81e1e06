"""Shared by all sources: the text without what surrounds an answer, and where in it an answer is stated."""

import re
from collections.abc import Iterable

from evals.questions.prompts import INSTRUCTIONS

# Final answers are at the end; only this many characters from there are read.
TAIL = 4000

_THOUGHTS_END = ("</think>", "</thinking>")
_SPECIAL_TOKEN = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?s>|<(?:eos|end_of_turn)>|</?(?:b|i|em|strong|p|u|code|span|div|center)>"
)
_FIELD = r"(?:(?:final|short|predicted)[ _]?)?(?:answer|response|result|output|ans|final|choice|option)"
_TAGGED = re.compile(rf"<({_FIELD})>(.*?)(?:</\1>|\Z)|\bfinish\[([^\[\]\n]*)\]", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(rf"</?{_FIELD}>", re.IGNORECASE)
_JSON = re.compile(
    rf"""["']{_FIELD}["']\s*:\s*\[?\s*(?:"([^"\n]*)"|'([^'\n]*)'(?=\s*[,}}\]])|(-?[\d.]+)(?=\s*[,}}\]]))""",
    re.IGNORECASE,
)
_EMPTY_BOX = re.compile(r"(?:\$|\\\(|\\\[)?\s*\\boxed\s*\{\s*(?:\.\.\.|\\ldots|\\dots)?\s*\}\s*(?:\$|\\\)|\\\])?")
_BARE_BOX = re.compile(r"\\boxed\s*(-?\d[\d.,/]*(?<![.,])|[A-Z]\b)")
_PLACEHOLDER = re.compile(r"(?i:answer is)\s+[NX]\b\.?(?=\s|\Z)")
_MARKED = re.compile(r"^#{4,6}[ \t]*(?=[^\sA-Za-z#]|[^\n#]*\Z)", re.MULTILINE)
_HEADING = re.compile(r"^[ \t]*(?:#{1,6}|>|[*•✅-](?=\s))[ \t]*", re.MULTILINE)
# the next turn or question, which a model that does not stop goes on with
_NEXT_TURN = re.compile(r"\n\s*(?:Human|User|Question|Problem|Q)(?: \d+)?:.*", re.DOTALL)
# a last "The answer is" that says nothing more
_DANGLING = re.compile(
    r"(?:^|(?<=[\s.]))[^.!?\n$\\]*\banswer(?:\s+is|:)[^\w$\\]*(?:clear|as above|given above)?[^\w$\\]*\Z",
    re.IGNORECASE | re.MULTILINE,
)
_ROLE = re.compile(r"\A\W*(?:assistant|bot|ai|model)\s*:\s*", re.IGNORECASE)
_CITATION = re.compile(r"(?<=[a-z]{3})\[\^?\d{1,2}\]")
_TEX_LABEL = re.compile(
    r"\\(?:textbf|emph|textit|underline|textsc)\s*\{\s*((?:[a-z]+ )?(?:answer|result|solution|conclusion)[:.]?)\s*\}",
    re.IGNORECASE,
)
_STRUCK = re.compile(r"~~[^~\n]+~~")
_EMPHASIS = re.compile(r"\*\*|__|`|(?<![\w*])\*(?=[^\s*])|(?<=[^\s*])\*(?![\w*])")
_SENTENCE = re.compile(r"(?:[^.!?\n]|\.(?=\w))+[.!?]*")
_CLOSING = re.compile(
    r"\b(?:I hope|let me know|feel free|if you (?:have|need|want|would)|happy to help|hope (?:this|that|it))\b",
    re.IGNORECASE,
)
_CHARACTERS = str.maketrans(
    {
        "−": "-",
        "’": "'",
        "‘": "'",
        "“": '"',
        "”": '"',
        "«": '"',
        "»": '"',
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "✅": " ",
        "～": "~",
        "：": ": ",
        "，": ", ",
        "。": ". ",
    }
)
_CUE = re.compile(
    r"^[ \t]*(?:(?:(?:final|correct|my)[ \t]+)?answer[ \t]*\n+|ans\.[ \t]+)\s*|"
    r"(?:\b(?:answer|ans\.?|solution|result|conclusion)\b[\"']?|(?:^[ \t]*|(?<=[.?!] ))A(?=[ \t]*:)|\b(?:final"
    r"|output|response"
    r"|verdict|bottom line|tl;?dr)(?=[ \t]*:))"
    r"(?:[ \t]+(?:to|of|for|in)[ \t]+(?:the|this|that|these|your|our)[ \t][^.:=\n]{0,60}?|,[ \t]*(?:according"
    r"|as|based|then|therefore|thus|hence|of course|however|given|from|in|I think|I believe"
    r"|it seems)\b[^,.$\\\n]{0,60},"
    r"|[ \t]+\([^()\n]{1,40}\)"
    r"|[ \t]+(?:here|then|now|therefore|thus|hence|in \w+))?"
    r"\s*(?:(?:must|should|would|will|could|has to|can only|turns out to|appears to|seems to)[ \t]+be\b|(?:is"
    r"|was|are)(?:\b|(?=n't))"
    r"|(?:comes?(?:[ \t]out)?|simplifies|evaluates|reduces|works out|amounts|boils down)[ \t]to\b|[=:→➜➔⇒]|=>"
    r"|-(?!\d)>?)"
    r"[\s:=>]*",
    re.IGNORECASE | re.MULTILINE,
)
_BACKWARD = re.compile(
    r"(?:is|are|was|would be|must be|should be|(?:seems|appears|has) to be|as)\s+(?:indeed\s+)?(?:the|my|our)\s+"
    r"(?:(?:final|correct|right|best)\s+)*(?:answer|solution|result)\b",
    re.IGNORECASE,
)
_PRONOUN = re.compile(r"\W*(?:(?:and|so)\s+)?(?:this|that|which|it)?\W*", re.IGNORECASE)
_CORRECTION = re.compile(
    r"(?:(?:^|[.!?\n;,—–-])[\s*(]*\b(?:(?:oh,? )?wait|actually|correction|sorry|oops|scratch that"
    r"|on second thoughts?|I mean"
    r"|let me correct|I made an? (?:mistake|error))|[.!?\n;—–-][\s*(]*(?:hmm|oh"
    r"|well)?,?\s*\bno(?=[,:.!;—–-]))\b[\s,:.!—–-]*",
    re.IGNORECASE,
)
FILLER = re.compile(
    r"(?:[\s:=~≈,\"'(\[]|(?-i:[a-z]{3,}ly)\b|it's\b|it is\b|(?:therefore|thus|hence|indeed|clearly|exactly"
    r"|precisely|approximately|approx\.|about|around|roughly"
    r"|simply|just|probably|likely|most likely|definitely|certainly|obviously|surely|equal to|also|then|now|so"
    r"|a total of"
    r"|in fact|found to be|given by|as follows|the following|only|but|rather|actually|of course|namely|really"
    r"|i\.e\.)\b,?)*",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"\.(?=\s|\Z)|(?<!\\)[!?](?=\s|\Z)|\n")
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)[\"')\]]*\s+|\n+")
_DOUBT = re.compile(
    r"\b(?:not (?:sure|certain|clear)|unsure|uncertain|unclear)\b(?! why| how)"
    r"|\b(?:can't|cannot|can not|couldn't|could not|unable to|not able to|hard to|impossible to|difficult to)\s+"
    r"(?:tell|say|decide|determine|know|see which|choose|answer|settle|be (?:sure|certain|determined))\b"
    r"|\b(?:do not|don't) (?:think|believe)\b"
    r"|\b(?:do|does|did)(?:n't| not)\s+(?:\w+\s+){0,2}?(?:know|say|answer|specify|state|make (?:it )?clear|tell"
    r"|mention)\b"
    r"|\bnor do(?:es)? \w+ say\b|\bwhether\b|\b(?:maybe|possibly|perhaps)\b.*\b(?:maybe|possibly|perhaps)\b"
    r"|\b(?:could|might|may)\s+(?:also\s+|only\s+)?be\b"
    r"|\b(?:it )?depends\b|\bdepending on\b|\btorn between\b|\bambiguous\b|\bcontradict\b|\bnot enough\b"
    r"|\b(?:is|are)n't enough\b|\bdifferent (?:results|answers)\b|\b(?:which|one) of (?:these|those|them"
    r"|the two)\b.*\b(?:is"
    r"|must be) (?:right|wrong|correct)\b|\beither (?:could|might|of (?:them|these))\b|\bboth (?:could|might|may)\b"
    r"|\bnone of (?:these|the|them)\b.*\b(?:is|are|seems?|fits?)\b|\bsome\b[^.]*,\s*(?:and )?others\b"
    r"|\band so (?:is|are|does|was)\b|\bare both possible\b|\bare possible\b"
    r"|\bpassage \d+ (?:says|mentions|states|suggests)\b(?! so)[^.]*\b(?:while|whereas|but|and) passage \d+\b",
    re.IGNORECASE,
)
_TAKES_BACK = re.compile(r"\b(?:which|ambiguous|contradict|one of|enough)\b", re.IGNORECASE)
_HAS_CASES = re.compile(r"\b(?:if|in some|according)\b", re.IGNORECASE)
_CASES = re.compile(
    r"\b(?:if|in some)\b(?:[^.;\n]|\.(?=\d))*[.;,]\s*(?:(?:but|and|while)\s+)?"
    r"(?:if|otherwise|in (?:the )?others?|with the (?:second|other)|when)\b"
    r"|\bif\b(?:[^.;\n]|\.(?=\d))*,(?:[^.;\n]|\.(?=\d))*\b(?:if|otherwise)\b"
    r"|\baccording to (?:the )?\w+(?: \w+)?,(?:[^.;\n]|\.(?=\d))*\baccording to\b",
    re.IGNORECASE,
)
_LATER = re.compile(
    r"[,;.]\s+(?:but|(?=it's|it is)|so|still|nevertheless|yet)\b(?=.*\b(?:I'd|I would|I'll|I|it's|it is|must"
    r"|answer|choose|say)\b)",
    re.IGNORECASE,
)
# No sentence ends like this: the text was cut.
_CUT = re.compile(
    r"(?:\b(?:the|an?|of|to|in|on|at|by|for|with|and|or|but|nor|so|if|because|since|that|which|when|where|while|is|are"
    r"|was|were|be|been|would be|will|would|could|should|must|can|has|have|had|we|I|they|he|she|you|their|his"
    r"|her|its|our"
    r"|these|those|from|as|than|not|doesn't|don't|isn't|says that|let me|try|need|only if|next one)|,)\s*\Z"
)


def clean(text: str, gold: Iterable[str] = ()) -> str:
    """The end of `text`, or the inside of its last <answer>, without thoughts, tokens, emphasis, closing remarks, and
    the instruction of the prompt, which some models repeat.
    """
    text = text[-TAIL:].translate(_CHARACTERS)
    for mark in _THOUGHTS_END:
        text = text.rpartition(mark)[2]
    text = _SPECIAL_TOKEN.sub(" ", text)
    for instruction in INSTRUCTIONS.values():
        text = text.replace(instruction, " ")
    if not {"n", "x"} & {one.strip().casefold() for one in gold}:
        text = _PLACEHOLDER.sub(" ", text)
    tagged = [m for m in (*_TAGGED.finditer(text), *_JSON.finditer(text)) if m[m.lastindex or 0].strip()]
    text = (tagged[-1][tagged[-1].lastindex] if tagged else text).strip()
    if "\\boxed" in text:
        text = _EMPTY_BOX.sub(" ", _BARE_BOX.sub(r"\\boxed{\1}", text)).strip()
    text = _STRUCK.sub(" ", _ROLE.sub("", text)).replace("(?)", "")
    if "[" in text:
        text = _CITATION.sub("", text)
    if "\\" in text:
        text = _TEX_LABEL.sub(r"\1", text)
    text = _HEADING.sub("", _MARKED.sub("Answer: ", text))
    text = _EMPHASIS.sub("", _TAG.sub(" ", text))
    first = _NEXT_TURN.sub("", text)
    text = first if stated(first) or boxes(first) else text
    if _CLOSING.search(text):
        text = _SENTENCE.sub(lambda match: " " if _CLOSING.search(match[0]) else match[0], text)
    text = text.strip()
    return (_DANGLING.sub("", text).strip() if "nswer" in text[-60:] or "NSWER" in text[-60:] else "") or text


def stated(text: str) -> list[tuple[int, str]]:
    """What follows each "answer is" or the like, the last one first, with the position where it begins."""
    return [(match.end(), text[match.end() :]) for match in reversed(list(_CUE.finditer(text)))]


def stated_before(text: str) -> str | None:
    """What precedes the last "is the answer" in its line; None if that is no more than "this"."""
    found = list(_BACKWARD.finditer(text))
    before = text[: found[-1].start()].rpartition("\n")[2].strip() if found else ""
    return None if _PRONOUN.fullmatch(before) else before


def sentences(text: str) -> list[str]:
    return [part.strip() for part in _BETWEEN_SENTENCES.split(text) if part.strip()]


def undecided(text: str, position: int | None = None) -> bool:
    """Whether a text says that it does not know, names an answer for each of several cases, or was cut before it
    reached one. After a statement, which begins at `position`, only what takes it back counts."""
    if position is not None:
        if not (_TAKES_BACK.search(text, position) or _HAS_CASES.search(text)):
            return False
        begin = max(text.rfind(mark, 0, position) for mark in (". ", "? ", "! ", "\n")) + 1
        first = sentences(text[begin:])[:1]
        return any(_CASES.search(part) for part in first) or any(
            _DOUBT.search(part) and _TAKES_BACK.search(part) for part in sentences(text[position:])[1:]
        )
    parts = sentences(text)
    if not parts or "<think" in text:
        return bool(parts)
    if _CUT.search(text) and len(text.split()) > 3:
        return True
    last = [part for part in parts if not part.endswith("?")][-2:]
    return any(_DOUBT.search(_LATER.split(part)[-1]) for part in last) or _CASES.search(" ".join(last)) is not None


def correction(text: str) -> str | None:
    """What follows the last "wait", "actually", "no" or the like."""
    found = list(_CORRECTION.finditer(text))
    return text[found[-1].end() :] if found else None


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Start, end and content of each \boxed{...} whose braces balance."""
    found = []
    for match in re.finditer(r"\\(?:frame|f)?box(?:ed)?\s*\{", text):
        inside = balanced(text, match.end())
        if inside is not None and not (found and match.start() < found[-1][1]):
            found.append((match.start(), match.end() + len(inside) + 1, inside))
    return found


def balanced(text: str, start: int) -> str | None:
    """From `start`, after an opening brace, up to the brace that closes it; None if none does."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i]
    return None
