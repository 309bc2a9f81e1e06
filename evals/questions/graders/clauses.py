"""Whether the clause that contains the answer names it as the answer, judged by the words before and after it.

In a clause the answer is one character, GOLD. All other words are of four kinds: those that introduce answers, those of
the question, names and numbers, which may be another answer, and other words in lower case.
"""

import re

from evals.questions.graders.statements import sentences

GOLD = "ꙮ"

_FUNCTION = frozenset(
    "is are was were be been being by in on at of to for from with as and that this these those it its he she they "
    "them his her their who whom whose which what when where why how many much do does did has have had having "
    "one ones "
    "both all each same also so therefore thus hence then there here the a an i i'm i'd i'll i've we we're us you "
    "you're your my me our would will can could should must shall may might only just not but or than too indeed "
    "okay ok sure yes well now first second third last two three into out up about very really quite most likely "
    "case that's it's he's she's they're that'd it'd who's what's let's there's everything everyone "
    "nothing none something anything someone anyone another others never rather instead even per without due no put "
    "against doubt let despite other because since if after before while although though however".split()
)
_META = frozenset(
    "passage passages context text texts document documents source sources paragraph paragraphs article articles "
    "information evidence fact facts question questions answer answers response reply result solution output "
    "conclusion verdict final short brief correct right true best exact following above given provided based according "
    "state states stated say says said saying mention mentions mentioned name names named give gives identify "
    "identifies identified confirm confirms confirmed show shows shown tell tells told know known find finds found "
    "see seen seems appears called clear clearly certain confident think believe guess conclude conclude concluded "
    "means meaning points point leads lead looking looked asked asking asks need needed description fits fit matches "
    "match refers reference details detail support supports supported provide provides read reading derived described "
    "describes indicated indicates infer inferred explains explain explained explanation reason reasoning note step "
    "steps p page line sentence summary sum short word words phrase bottom tldr tl dr figure entry thing person place "
    "comes came come taken contained great easy hmm ah oh yeah yep alright good hello hi thanks wow confidence "
    "high check gets yields assistant "
    "namely i.e e.g called titled entitled else available listed lists using taken together combining combined turns "
    "justification long story mistaken determine determined answering answered answers get got directly "
    "explicitly go going plain simple simply".split()
)
_COPULA = frozenset("is was are were be been being it's that's he's she's they're".split())
_STEM = re.compile(r"(?<=\w{3})(?:ings?|ed|ers?|es|s|d|e|ly)$")
_WORD = re.compile(r"[\w&#][\w'.&-]*(?<![.'-])|ꙮ")
_NEGATION = (
    r"\b(?:(?<!why )not|never|neither|nor|cannot|isn't|wasn't|aren't|weren't|doesn't|didn't|can't|couldn't|no longer)\b"
)
_ASIDE = (
    r"\b(?:while|although|though|even though|unlike|rather than|instead of|despite|between|of|contrary to|whereas"
    r"|as opposed to|other than|apart from|besides|except(?: for)?|out of|over|versus|vs\.?|anything but)\b"
)
_TURN = re.compile(
    r"(?:(?<!thing )\bbut(?: rather| instead)?|\b(?:it|this|that)(?:'s| is| was)|\bhowever,?|\binstead,?"
    r"|\brather,?(?!\s+than)"
    r"|\bactually,?|\bwe have|\bshould be|[.!?;—–:]|--)(?=\s)",
    re.IGNORECASE,
)
_LEAD = re.compile(rf"\A\W*{_ASIDE}", re.IGNORECASE)
_DENIED = re.compile(
    rf"(?:{_NEGATION}|\b(?:rather than|instead of|unlike|(?<!none )(?<!no )other than|anything but"
    rf"|except(?: for)?|contrary to"
    r"|n't|rul(?:e|ed|ing) out|exclud\w+|eliminat\w+|dismiss\w*|forget|confused? with|ignor\w+|as opposed to"
    r"|over|(?<!other )than|versus|or|nor|whether)\b)\W*(?:\w+ly\s+|perhaps\s+|maybe\s+"
    r"|even\s+|an?\s+|the\s+|be\s+|by\s+|in\s+|of\s+|at\s+)*\Z",
    re.IGNORECASE,
)
# "is wrong", "is not it"
_DENIES = re.compile(
    r"\W*(?:is|was|are|were|does|do|did|has|would|can|could|looks?|seems?|might|may)(?:\b\s*)(?:\w+ly\s+|also\s+|be\s+)*"
    r"(?:n't\b|not\b|never\b|wrong\b|incorrect\b|ruled out|irrelevant\b|false\b|something else|close\b|tempting\b)"
    r"|\s*\?"
    r"|\s*,?\s*(?:doesn't|isn't|wasn't|can't|cannot|didn't)\b",
    re.IGNORECASE,
)
_REVERSED = re.compile(
    r"\b(?:but|however|though|actually)\b,?\s+(?:\w+ly\s+|in fact\s+|rather\s+)*(?:(?:it|that|this)(?:'s| is| was)"
    r"|the (?:\w+ )?(?:answer|one))\b(?!n't|\s+not)|\bseem right\b|\bat first\b",
    re.IGNORECASE,
)
_ENDS = re.compile(
    r"\W*\Z|\.(?=\W*\s+[^a-z]|\W*\n|,\s+[a-z])|[!?…]+|\s*[;:(\[{}|\n—–<>→🎉✅]|\s+(?:-+>?|//|=+>)\s|\"\s*[,}]|\s*\.\.\."
)
_NEXT = re.compile(r"(?P<mark>,?)\s+(?P<word>[\w'.-]+)(?P<rest>.*)", re.DOTALL)
_NEW_CLAUSE = re.compile(
    r"[^.;\n]{1,60}?\s(?:is|was|are|were|has|does|did|says?|supports?|states?|mentions?)\b|\W*(?:\w+ly\s+)?(?:this|that|it|not|nothing"
    r"|so|therefore|thus|hence|we|you|i)\b",
    re.IGNORECASE,
)
_DISMISSED = re.compile(
    r"\s*,?\s+(?:is|was|are|were)\s+(?:\w+ly\s+|also\s+|just\s+)*(?:mentioned|named|listed|something|another"
    r"|a different|about|not"
    r"|irrelevant|unrelated)\b"
)
_NOT_THOUGHT = re.compile(r"(?:n't|\bnot)\s+(?:think|believe|say|sure|certain|mean)\b[^.,;]*\Z", re.IGNORECASE)
_DESPITE = re.compile(r"\b(?:but|though|although|while|whereas|however)\b", re.IGNORECASE)
_POINTS = re.compile(
    r"(?<!doubt )(?<!whether )(?<!if )(?<!unless )(?<!thought )(?<!say )(?<!says )(?:\b(?:it|that|the answer)(?:'s"
    r"|\s+(?:is|was|must be|has to be|can only be))|\b(?:which|that|this|and) leaves(?: only| us with)?"
    r"|\bleaving(?: only| us with)?)"
    r"\s+(?:[a-z]+ly\s+|then\s+)*\Z",
    re.IGNORECASE,
)
_NUMBERED = frozenset(
    "passage passages step steps p page line source sources document documents paragraph paragraphs".split()
)
_PREPOSITION = frozenset("in on at of from to for with by about near under de von".split())
_CONTRAST = frozenset(
    "rather instead not unlike over despite while whereas although though because since as even".split()
)
_TIES = frozenset("of or nor s".split())
# "no evidence", "no one": no answer to a question of yes or no
_OF_NO = re.compile(
    r"\s+(?:one|other|doubt|evidence|information|mention|passages?|context|text|documents?|sources?|articles?|facts?"
    r"|questions?|answer|response|result|solution|conclusion|references?|details?|support|reason|explanation)\b",
    re.IGNORECASE,
)
# "The Wall was directed by", where the question asks who directed it
_ASKED = re.compile(r"\b(?:is|was|are|were)\s+(?:[a-z]+ly\s+)?(?P<verb>[a-z]+)\s+(?:in \d{4}\s+)?(?:by|in|on|at)\s+\Z")
_HEDGE = re.compile(rf"{_NEGATION}|n't\b|\b(?:but|however|while|whereas|although|though|unlike|might|may)\b", re.I)
_SO = re.compile(r"\b(?:so|therefore|thus|hence),?\s+\Z", re.IGNORECASE)
_YES_NO_FIRST = re.compile(rf"\W*{GOLD}(?:[\s*]*(?:[.,;:!—–-]|\Z)|\s+(?:they|it|he|she|both)\b)")
_OTHER_YES_NO = re.compile(r"(?:\A|,|\bso|\bis)\s*(?:yes|no)\b(?=\W*\Z|[,.;])", re.IGNORECASE)
_BRACKETED = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
_GOES_ON = re.compile(
    r"\W*(?:he|she|they|his|her|its|their|the (?:passage|text|other|first|second)|note"
    r"|to check"
    r"|passage|for (?:reference|context)|in addition|additionally|also|moreover)\b",
    re.IGNORECASE,
)


class Clauses:
    """The clauses of a text that answers `question`, read with its answers masked."""

    def __init__(self, question: str, answers: tuple[str, ...]) -> None:
        self.asked = {_stem(m[0]) for m in _WORD.finditer(question)}
        self.in_question = all(
            all(_stem(m[0]) in self.asked | _FUNCTION for m in _WORD.finditer(answer)) for answer in answers
        )
        self.is_yes_no = {answer.strip().lower() for answer in answers} <= {"yes", "no"}
        self.is_name = any(re.search(r"[A-Z\d]", answer) for answer in answers)

    def follows(self, segment: str) -> bool | None:
        """Whether what follows "the answer is" is the answer; None if it says nothing."""
        for sentence in sentences(segment):
            if self._is_silent(sentence):
                if re.match(rf"\W*(?:{_NEGATION}|n't)", sentence, re.IGNORECASE):
                    return False
                continue
            if re.match(rf"\W*(?:{_NEGATION}|n't)", sentence, re.IGNORECASE) and not self._declares(sentence, True):
                if GOLD in sentence or not _DENIED.sub("", sentence):
                    return False
                continue
            return self._declares(sentence, True)
        return None

    def tells(self, sentence: str) -> bool:
        """Whether a sentence on its own names the answer."""
        return self._declares(sentence, False)

    def silent(self, sentence: str) -> bool:
        """Whether a sentence holds neither the answer nor a possible other one."""
        return GOLD not in sentence and (sentence.endswith("?") or self._is_silent(sentence))

    def _is_silent(self, sentence: str) -> bool:
        return GOLD not in sentence and (
            _ABOUT.match(sentence) is not None or all(kind in ("said", "asked") for _, kind in self._kinds(sentence))
        )

    def is_bare(self, sentence: str) -> bool:
        """Whether a sentence is an answer and nothing else."""
        kinds = self._kinds(_BRACKETED.sub("", sentence))
        words = [m[0].lower() for m, _ in kinds]
        if sum(kind == "said" and match[0] != GOLD for match, kind in kinds) > len(kinds) / 2:
            return False
        return len(words) <= 7 and not {*words} & {*_COPULA, "has", "have", "had", "did", "does", "says", "states"} \
            and not sentence.endswith("?") and not re.search(_NEGATION, sentence, re.IGNORECASE)  # fmt: skip

    def says_first(self, parts: list[str]) -> bool:
        """Whether the first sentence is "yes" or "no", with or without its reason, and no later one says the other."""
        is_first = self.is_yes_no and _YES_NO_FIRST.match(parts[0]) and self.tells(parts[0])
        return bool(is_first) and not any(_OTHER_YES_NO.search(part) for part in parts[1:])

    def goes_on(self, sentence: str) -> bool:
        """Whether a sentence only adds to what was named before it."""
        return _GOES_ON.match(sentence) is not None or _DISMISSED.search(sentence) is not None

    def _declares(self, sentence: str, strict: bool) -> bool:
        for match in re.finditer(GOLD, sentence):
            before, behind = sentence[: match.start()], sentence[match.end() :]
            if self._opens(before, strict) and self._closes(behind, strict, before):
                return True
            # a whole sentence stands where the answer should
            if strict and self._opens(before, strict) and self._closes(behind, False, before):
                if all(kind in ("said", "asked") for _, kind in self._kinds(behind)):
                    return True
        return False

    def _kinds(self, text: str) -> list[tuple[re.Match, str]]:
        """Each word with its kind: said (introduces answers), asked, name or word."""
        found, numbered = [], False
        for match in _WORD.finditer(text):
            word = match[0].lower()
            is_first = not text[: match.start()].strip(" \"'([")
            if self.is_yes_no and word in ("yes", "no"):
                kind = "name"
            elif word in _FUNCTION or word in _META or (word.endswith("ly") and (match[0].islower() or is_first)):
                kind = "said"
            elif _stem(word) in self.asked and not (self.in_question and not match[0].islower()):
                kind = "asked"
            elif re.search(r"\d", word):
                is_mark = is_first and re.match(r"[.)]\s+\S", text[match.end() :])
                kind = "said" if re.fullmatch(r"\d{1,2}", word) and (numbered or is_mark) else "name"
            elif match[0][0].isupper() and not (match[0].endswith("ing") and is_first):
                kind = "name"
            else:
                kind = "word"
            found.append((match, kind))
            numbered = word in _NUMBERED or (numbered and (word == "and" or kind == "said" and word.isdigit()))
        return found

    def _opens(self, before: str, strict: bool) -> bool:
        """Whether these words lead to the answer after them."""
        if _NOT_THOUGHT.search(before):
            return False
        if self.is_yes_no and _SO.search(before):
            return True
        if (asked := _ASKED.search(before)) and _stem(asked["verb"]) in self.asked and not _HEDGE.search(before):
            return True
        if points := _POINTS.search(before):
            return points.start() == 0 or not re.search(
                r"\bnot\W*\Z|n't\W*\Z|\b(?:or|nor)\W*\Z", before[: points.start()]
            )
        if re.search(
            rf"{_NEGATION}|n't\b|\bbut\b|\bhowever\b|\bmight\b|\blooks?\b|\bseems?\b|\?", before, re.IGNORECASE
        ):
            turns = list(_TURN.finditer(before))
            denial = [m.start() for m in re.finditer(rf"{_NEGATION}|n't\b|\bmight\b|\bmay\b", before, re.IGNORECASE)]
            if turns and (not denial or turns[-1].start() > denial[-1]):
                before = before[turns[-1].end() :]
        if _LEAD.match(before):
            if "," not in before:
                return False
            before = before.rpartition(",")[2]
        if _DENIED.search(before):
            return False
        kinds = self._kinds(before)
        if any(kind == "name" for _, kind in kinds):
            return False
        if self.in_question and any(kind == "asked" and not m[0].islower() for m, kind in kinds):
            return False
        unknown = [match for match, kind in kinds if kind == "word"]
        if not unknown:
            return True
        if re.search(r"\b(?:and|or|nor)(?:\s+(?:the|an?))?\s*\Z|[/(\[]\s*\Z", before):
            return False
        if strict:
            return self.is_name and not re.search(r"[,(;:/&]|\band\b|\bor\b", before[unknown[0].end() :])
        if self.is_name:
            return not re.search(r"\A\W*[,/]\s*\Z", before[unknown[-1].end() :]) or any(k == "said" for _, k in kinds)
        return (
            (kinds[-1][1] != "word" or kinds[-1][0][0].endswith("s"))
            and not (before.rstrip().endswith(",") and kinds[-1][1] == "word")
            or before.rstrip().endswith(":")
        )

    def _closes(self, behind: str, strict: bool, before: str) -> bool:
        """Whether an answer before these words ends there, and is not taken back."""
        if (
            _DENIES.match(behind)
            or (_DISMISSED.match(behind) and _DESPITE.search(before))
            or _REVERSED.search(behind.partition("\n")[0])
        ):
            return False
        if self.is_yes_no and (
            _OF_NO.match(behind) or re.search(r"\b(?:is|'s|was|be) (?:yes|no)\b", behind, re.IGNORECASE)
        ):
            return False
        if _ENDS.match(behind):
            return True
        match = _NEXT.match(behind)
        if not match:
            return False
        word, rest = match["word"], match["rest"]
        plain = word.lower().strip(".'")
        if self.is_yes_no and match["mark"] and not re.search(rf"\b(?:yes|no)\b|{GOLD}", behind, re.IGNORECASE):
            return True
        kinds = self._kinds(word)
        if plain in ("and", "&"):
            names = [kind for _, kind in self._kinds(sentences(rest)[0]) if kind == "name"] if rest.strip() else []
            return _NEW_CLAUSE.match(rest) is not None and (
                strict or not names or re.match(rf"\W*(?:\w+ly\s+)?{_NEGATION}", rest)
            )
        if plain in _TIES:
            return False
        if plain in _CONTRAST:
            return True
        if match["mark"]:
            if plain in _PREPOSITION or word == "I" or kinds and kinds[0][1] in ("said", "asked"):
                after = self._kinds(rest)[:1]
                is_other = plain in ("a", "an", "the") and after and after[0][1] == "name"
                return not is_other and not re.match(r",?\s+or\b", rest)
            return word[0].islower() and not re.match(r"\W*\Z|,|\s+(?:and|or)\b", rest)
        if plain in _PREPOSITION:
            after = [kind for m, kind in self._kinds(rest.partition(".")[0])[:3]]
            return "name" not in after
        is_verb = kinds and (kinds[0][1] == "said" or (not strict and word.islower() and (
            kinds[0][1] == "asked" or re.search(r"(?:s|ed)\Z", plain))))  # fmt: skip
        if not is_verb or not word[0].islower():
            return word == "I"
        if plain in _COPULA or not strict:
            rest = _BRACKETED.sub("", re.split(r"[.;,\n]|\b(?:while|whereas|not|because|but)\b", rest)[0])
            is_other = any(kind == "name" for _, kind in self._kinds(rest)) and not (strict and before.strip())
            return not is_other or self.in_question
        return True


_ABOUT = re.compile(r"\W*(?:sources?:|see|explanation|reason\w*|evidence|note|justification|why|how)\b", re.IGNORECASE)


def _stem(word: str) -> str:
    return _STEM.sub("", word.lower().strip("'.").removesuffix("'s"))
