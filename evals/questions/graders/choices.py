"""Searches a text for the words of the choices."""

import re

from evals.questions.graders.patterns import GOOD, letters_of
from evals.questions.sources import LETTERS

# Quotes and TeX around a letter or its words; removed before a search for either.
DRESS = re.compile(
    r"[\"$]|\\[()\[\] ,;]|\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|mbox|boldsymbol|quad)\b\s*|[{}]"
    r"|</?[a-z]{1,6}>"
    r"|(?<![^\s(\[])'(?=\w)|(?<=[\w.])'(?![\w])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
)


class Words:
    """The choices' words, each in the form that is compared, and their letters."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices = [
            (_bare(choice), letter) for letter, choice in zip(LETTERS[: len(choices)], choices, strict=True)
        ]
        self.letters = letters_of(len(choices))

    def whole(self, text: str) -> str | None:
        """The letter of the one choice that is the whole text."""
        bare = _bare(text)
        found = [letter for words, letter in self.choices if words == bare]
        return found[0] if len(found) == 1 and bare else None

    def at_start(self, text: str) -> tuple[str, int] | None:
        """The letter of the longest choice that the text begins with, and where it ends."""
        folded, best = text.casefold(), None
        for words, letter in self.choices:
            at = re.match(r"(?:(?:an?|the)\s+)?", folded).end()
            if not words or not folded.startswith(words, at):
                at = 0
            if words and folded.startswith(words, at) and not folded[at + len(words) : at + len(words) + 1].isalnum():
                best = max(best or (0, ""), (at + len(words), letter))
        return (best[1], best[0]) if best else None

    def without(self, text: str) -> str:
        """The text without the choices' words."""
        for words, _ in self.choices:
            text = re.sub(rf"(?<!\w){re.escape(words)}(?!\w)", "x", text, flags=re.IGNORECASE) if words else text
        return text

    def called_right(self, text: str) -> str | None:
        """The letter of the choice that the text begins with and calls correct."""
        named = self.at_start(text)
        good = named and re.match(rf"\W*(?:is|are|would be|must be)\s+(?:\w+\s+){{0,2}}?{GOOD}", text[named[1] :])
        return named[0] if good else None

    def without_own(self, text: str, bad: str) -> str:
        """The text without a choice's words after its letter, if they might be read as a verdict: "A. weak"."""
        for words, letter in self.choices:
            if re.match(bad, words):
                text = re.sub(
                    rf"(?<!\w)({letter}[)\].:–-]*\s+){re.escape(words)}(?!\w)", r"\1", text, flags=re.IGNORECASE
                )
        return text

    def at_end(self, text: str) -> str | None:
        """The letter of the longest choice that the text ends with, after "is" or the like."""
        bare = _bare(text)
        found = [
            (len(words), letter)
            for words, letter in self.choices
            if words
            and bare.endswith(words)
            and re.search(r"(?:(?:\b(?:is|are|was|were|be|means)|:)\s+|=\s*)(?:an?\s+|the\s+)?\Z", bare[: -len(words)])
        ]
        return max(found)[1] if found else None


def _bare(text: str) -> str:
    text = DRESS.sub("", text.replace("\\{", "(").replace("\\}", ")")).strip().rstrip(".!").strip("'\"` ").casefold()
    return re.sub(r"\A(?:an?|the)\s+", "", re.sub(r"\s+", " ", text))
