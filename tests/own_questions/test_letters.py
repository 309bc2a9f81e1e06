"""The letter that a text settles on, of other numbers of choices than four: the phrasings of mmlu, and I, a pronoun."""

import pytest

from evals.questions.graders import grade
from evals.questions.graders.letters import Undecided, final_letter
from evals.questions.sources import LETTERS
from tests.phrasings import fill, phrasings, rows

CHOICES = list(dict.fromkeys(choice for choices in rows.MMLU for choice in choices if "I" not in choice.split()))


def cases(number, stated, every):
    """(gold, choices, text): every phrasing, with each `every`-th letter of this number."""
    letters = LETTERS[:number]
    for i, phrasing in enumerate(
        phrasing for part in ("seen", "held") for phrasing in phrasings("mmlu")["undecided_" * (not stated) + part]
    ):
        for k in range(i % every, number, every):
            choices = [CHOICES[(i + 7 * k + j) % len(CHOICES)] for j in range(number)]
            letter, other = letters[k], letters[(k + 1 + i % (number - 1)) % number]
            rest = [x for x in letters if x != letter][:3]
            words = {"@L": letter, "@l": letter.lower(), "@t": choices[k], "@M": other, "@W": ", ".join(rest)}
            yield other if stated == "wrong" else letter, choices, fill(phrasing, words)


@pytest.mark.parametrize(("number", "every"), [(2, 1), (3, 1), (8, 3), (10, 3), (26, 9)])
@pytest.mark.parametrize(("stated", "least"), [("right", 0.98), ("wrong", 0.995), ("", 0.99)])
def test_phrasings(number, every, stated, least):
    one = {"id": "x", "source": "mine", "grader": "choice"}
    results = [
        (grade(one | {"answer": gold, "choices": choices}, text).correct == (stated == "right"), gold, text)
        for gold, choices, text in cases(number, stated, every)
    ]
    failed = [rest for ok, *rest in results if not ok]
    assert len(failed) <= (1 - least) * len(results), (len(failed), len(results), failed[:20])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is I.", "I"),
        ("I", "I"),
        ("(i)", "I"),
        ("It is a well-known fact.\n\nI", "I"),
        ("I is correct.", "I"),
        ("Option I fits best.", "I"),
        ("A is wrong, so the answer is I", "I"),
        ("I think the answer is B.", "B"),
        ("The answer is B. I am sure.", "B"),
        ("I, however, say B.", "B"),
        ("As I see it, C is right.", "C"),
        ("The option I choose is G.", "G"),
        ("B, I guess.", "B"),
        ("I'd go with F", "F"),
        ("It must be H, I think", "H"),
        ("Here I consider each. B is wrong. I settle on J.", "J"),
        ("The answer is J. I hope so", "J"),
        ("A and I are both correct.", None),
        ("I or J", None),
        ("I do not know.", None),
        ("I think that this is hard, and so I", None),
        ("The answer is K.", None),
    ],
)
def test_i_is_a_letter_and_a_pronoun(text, letter):
    try:
        found = final_letter(text, [f"thing {i}" for i in range(10)])
    except Undecided:
        found = None
    assert found == letter


def test_letters_beyond_the_choices_are_none():
    two = ["yes", "no"]
    assert final_letter("The answer is B.", two) == "B" and final_letter("The answer is C.", two) is None
    # what "The answer is X." is in a prompt's instruction
    assert final_letter("The answer is X.", list("abcd")) is None
    assert final_letter("The answer is X.", [f"thing {i}" for i in range(26)]) == "X"
