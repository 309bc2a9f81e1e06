"""How a text names the letters of a choice: regular expressions, built for the number of choices."""

import re
from functools import lru_cache

from evals.questions.sources import LETTERS

# Names for the right choice.
GOOD = (
    r"(?:correct|right|best|better|true|accurate|appropriate|fitting|what|yes|✅|✓"
    r"|(?:the|my|our)\s+(?:\w+\s+){0,3}?(?:answer|choice|option|pick|one|statement|closest|safest)\b)"
)
NOUN = r"(?i:(?:answer choice|option|choice|letter|answer|statement|alternative|response)s?)"
# A verb or a link after it tells the letter A from the article.
LINK = (
    r"(?:is|are|was|were|because|since|as|or|nor|and|but|fits?|seems?|looks?|match(?:es)?|makes?|best|would"
    r"|should|must|can|could|may|might|works?|holds|applies|wins|suits|appears|remains|captures|explains|stands|takes|"
    r"expresses|represents|reflects|agrees|covers|answers|addresses|includes|refers|summarizes|defines"
    r"|identifies|suggests|supports|follows|"
    r"gives|provides|offers|shows|contains|means|sounds|meets|satisfies|corresponds|does|do|has|which|rather|not|correct(?:ly)?|right|states|describes|says|for|here|instead|in|so|it|wrong"
    r"|incorrect|with|over|the|alone|on|that)\b"
)
# The same after I, which is also a pronoun.
LINK_OF_I = (
    r"(?:is|are|the|it|that|over|best|correct|because|since|or|nor|and|but|fits|seems|looks|matches|makes|works|holds|applies|wins|suits|appears|remains"
    r"|captures|explains|stands|takes|expresses|represents|reflects|agrees|covers|answers|addresses|includes|refers"
    r"|summarizes|defines|identifies|suggests|supports|follows|gives|provides|offers|shows|contains|means|sounds|meets"
    r"|satisfies|corresponds|does|has|which|states|describes|says|here|instead|wrong|incorrect|alone)\b"
)
AND = r"\s*(?:,\s*(?:and\b|or\b)?|/|&|\band\b|\bor\b)\s*"
BAD = (
    r"(?:wrong|incorrect|not\b|false|ruled out|eliminated|excluded|too\b|out\b|unlikely|invalid|irrelevant"
    r"|implausible|never|off\b|weak|no\b|❌)"
)
SKIP = re.compile(
    rf"(?:but\s+(?:rather\s+)?|it(?:'s| is)\s+)?(?:(?:the\s+)?(?:(?:correct|right|best|most appropriate|final"
    rf"|one)\s+)?(?:{NOUN}|labell?ed|one)\s*:?\s+)*",
    re.IGNORECASE,
)
OTHER_NAMES = re.compile(
    r"\b(?:vitamin|hepatitis|type|group|class|plan|grade|point|set|figure|section|case|part|step|factor)\s+\Z", re.I
)


class Letters:
    """For the letters `all`: one, named, upper, lower and list are expressions as text, the others are compiled.

    one matches a letter that is no word of its sentence, named one after "option" or the like, upper and lower any.
    """

    def __init__(self, letters: str) -> None:
        self.all = letters
        lower = self.lower = f"[{letters.lower()}]"
        upper, others = f"[{letters}]", f"[{letters.replace('A', '').replace('I', '')}]"
        pronoun = rf"I(?!'|,\s+(?:however|too|personally|myself|also|therefore)\b|\s+(?!{LINK_OF_I})[a-z])"
        named = self.named = rf"(?:[{letters.replace('I', '')}]|{pronoun})" if "I" in letters else upper
        self.upper = upper
        more = max(3, len(letters) - 1)
        one = self.one = (
            rf"(?<![\w'.\\^-])(?:{others}|(?<=ption )A|(?<=hoice )A|A(?!\s+(?!{LINK})[a-z])"
            + rf"|{pronoun}" * ("I" in letters)
            + r")(?![\w'°²]|\.\w|-\w)"
        )
        in_brackets = rf"(?>[(\[<]?{one}[)\]>]?)"
        list_ = self.list = rf"(?>{in_brackets}(?:{AND}{in_brackets}){{1,{more}}})"
        self.mention = re.compile(one)
        self.label = re.compile(
            rf"[(\[<]\s*(?P<bracketed>[{letters}{letters.lower()}])\s*[)\]>]|(?P<bare>{one})|(?P<lower>{lower})"
            r"(?=\s*(?:[.):,;!]|\n|\Z)(?!\w))"
        )
        self.more = re.compile(
            rf"[\s)\].>]*(?:,?\s*(?i:\b(?:or|and)\b)|,|/|&)\s*(?:(?:maybe|perhaps|also|possibly"
            rf"|even)\s+)?(?:{NOUN}\s+)?[(\[<]?(?P<other>{one})[)\]>]?"
            r"(?![\w'])(?!\s+(?:is|does|do|can|seems|would|has|fits|comes|looks|describes|says)\b)"
        )
        self.rejected = re.compile(
            rf"(?:,?\s*\b(?:and|but)\s+)?(?i:\b(?:not|nor|neither|rather than|instead of|cannot be|unlike|thought of"
            rf"|none of|anything but|rul(?:ed?|es|ing) out|eliminate[sd]?|eliminating|excludes?|rejects?"
            rf"|(?:(?<=prefer {upper} )|(?<=preferring {upper} ))(?:to|over))|n't)\s+"
            rf"(?:be\s+|an?\s+|the\s+)?(?:{NOUN}\s+)?(?:{list_}|{in_brackets})(?:\s*(?:,|\bnor\b)\s*{in_brackets}){{0,3}}"
            rf"|(?i:between|of|comparing)\s+{in_brackets}\s*(?:and|or|with|to|,|/)\s*{in_brackets}(?=,)"
            rf"|(?:{NOUN}\s+)?{in_brackets}[.:?]?\s*(?:(?:is|was|can|could|looks?|seems?|may|might)\s+(?:clearly\s+"
            rf"|also\s+|only\s+|partly\s+)*"
            rf"(?:be\s+)?)?{BAD}"
            rf"|(?:{NOUN}\s+)?{in_brackets}\s+(?:(?:is|does|do|can|was|did)n't\b|(?:does|do|did|can)(?:\s+not|not)\b"
            r"|(?:(?:looks?|seems?)\s+right|(?:looks?|seems?|is)\s+(?:tempting|plausible|close|possible|partly"
            r"|attractive))\b(?=[^.\n]*,)|before,)"
            rf"|(?:{NOUN}\s+)?{list_}\s*[:–-]\s*{BAD}|(?:{NOUN}\s+)?{list_}\s+(?:(?:are|were|can(?:not)?|could|do|all)\s+(?:all\s+|both\s+|clearly\s+"
            rf"|also\s+|be\s+)*{BAD}|(?:are|do|can)n't\b)"
        )
        self.positive = re.compile(
            rf"(?P<before>{one}[)\]>]?\s*(?:,?\s*\b(?:and|or)\b|/"
            rf"|&)\s*(?:{NOUN}\s+)?)?[(\[<]?(?P<letter>{one})[)\]>]?(?:,[^,.\n]{{1,80}},|\s\([^()\n]{{1,80}}\))?"
            rf"(?:[:?.]?\s*(?:(?:is|are|must|would|should|can|could|seems|appears|has"
            rf"|as)\s+(?:to\s+)?(?:be\s+)?(?:clearly\s+|indeed\s+|definitely\s+|therefore\s+|both\s+)*)?"
            rf"(?:the\s+|a\s+)?(?:only\s+|one\s+|single\s+|most\s+|safest\s+|correct\s+)*{GOOD}|\s+(?:fits|matches"
            rf"|works|holds|applies|(?:\w+\s+){{1,3}}best|it is|does)\b|\s+(?:is|does)\W*\Z)",
        )
        self.choose = re.compile(
            rf"\b(?:{NOUN}|(?i:selection|pick|guess|one|verdict))\s*(?:(?:is|was|must be|should be|would be"
            rf"|has to be)\b|[:=-])[\s:]*"
            r"|\b(?i:choose|pick|select|say|go with|opt for|going with|settle on|answer with|choosing|selecting"
            r"|vote for|go for|makes?)\s+"
            r"|\b(?i:leaves|leaving|points to|corresponds to|match(?:es)?|means|only|by|in|as|labell?ed|to"
            r"|with)\s+(?:us\s+with\s+|with\s+|only\s+|that\s+)?"
            r"|\b(?i:it|that|this|which|fits|left|described)(?:\s+(?:is|must be|has to be|should be|would be"
            r"|can only be)|'s)\s+",
            re.MULTILINE,
        )
        self.listed = re.compile(
            rf"^\W*(?:{NOUN}\s+)?(?P<letter>{upper})[)\].:]+(?P<behind>(?:[ \t].*)?)$", re.MULTILINE
        )
        self.unsure = re.compile(
            r"\b(?:not sure|unsure|whether|(?:could|might|may)\s+(?:also\s+)?be|cannot tell|can't tell|do not know"
            rf"|don't know|between|both(?=\s+(?-i:[(\[]?{named}\b)))\b",
            re.I,
        )
        self.lead_in = re.compile(
            r"\A\W*(?:(?:so|therefore|thus|hence|definitely|clearly|probably|likely|obviously|surely|correct|right"
            r"|finally|overall|by (?:process of )?elimination"
            rf"|it is|it's|answer|then|but|and|also|yes)\b[\s,:]*)*(?=[(\[<{letters}]|{lower}\W*\Z)",
            re.IGNORECASE,
        )
        # "B would be right if ..., but it is C"
        self.hedged = re.compile(
            r"(?:\A.*\b(?:would|might|may|could|first|seems?|sounds?|looks?|tempt\w*|almost|initially)\b.*?,?\s+but\b"
            r"|\A.*,\s+(?:so|hence|therefore|thus)\b)"
            rf"(?=.*{one})",
        )


@lru_cache
def letters_of(number: int) -> Letters:
    return Letters(LETTERS[:number])
