"""Graders on gold answers in the forms that models write, on near misses, and on text made to mislead them."""

import sys
import threading

import pytest

from evals.graders import grade, require
from evals.rows import load_rows
from evals.settings import SAMPLE

CHOICES = ["a cow", "a trumpet", "Vans", "iron"]


def row(source, answer, **more):
    return {"id": "x", "source": source, "question": "q", "answer": answer} | more


def is_right(one, text):
    return grade(one, text).correct


NUMBER_FORMS = [
    "{}",
    "The answer is {}.",
    "\\boxed{{{}}}",
    "$\\boxed{{{}}}$",
    "So 3 + 4 = 7 and 7 * 6 = 42.\nThe answer is {}.",
    "We have 12 first. Hence \\boxed{{12}} is wrong; in fact \\boxed{{{}}}.",
    "The answer is 3. No: the answer is {}.",
    "The answer is {}. Then 17 more come.",
    "He has 5 in 3 boxes.\n#### {}",
    "7 boxes of 3.\nAnswer: {}",
    "7 boxes of 3.\n**Answer:** {}",
    "The final answer is ${}$",
    "{{{}}}",
]


@pytest.mark.parametrize("form", NUMBER_FORMS)
@pytest.mark.parametrize("answer", ["72", "-5", "0.5", "1,200", "4500"])
def test_gold_numbers(form, answer):
    text = form.format(answer)
    assert is_right(row("gsm8k", answer), text)
    assert not is_right(row("gsm8k", "73"), text)


def test_thousands_commas_on_one_side_only():
    assert is_right(row("gsm8k", "1,200"), "The answer is 1200.")
    assert is_right(row("gsm8k", "1200"), "The answer is 1,200.")


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}}"),
        ("\\frac{1}{2}", "The answer is $0.5$."),
        ("x^2+1", "so we get \\boxed{1+x^2}"),
        ("(3, 4)", "\\boxed{(3,4)}"),
        ("2\\sqrt{3}", "$\\boxed{\\sqrt{12}}$"),
        ("\\frac{14+2x+3y}{4}", "The answer is $\\frac{14+2x+3y}{4}$."),
        ("\\frac{1}{2}", "{\\frac{1}{2}}."),
        ("1200", "\\boxed{\\$1,200}"),
        ("\\left[ \\frac{\\pi^2}{8}, 3 \\right]", "The answer is \\left[ \\frac{\\pi^2}{8}, 3 \\right]."),
    ],
)
def test_gold_mathematics(gold, text):
    assert is_right(row("math500", gold), text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "I do not know.",
        "\\boxed{42} but rather \\boxed{41}",
        "The answer is 420.",
        "The answer is 4.2.",
        "The answer is -42.",
        "The answer is 41. Then 42 more come.",
        "The answer is $\\frac{41 + 42 + 43}{42}$.",
        "The answer is 41. " + "{" * 3000,
        "\\boxed{" * 500 + "41",
        "41 " * 20_000,
    ],
)
def test_wrong_or_misleading_numbers(text):
    assert not is_right(row("gsm8k", "42"), text)


def test_only_the_end_of_a_long_text_counts():
    assert is_right(row("gsm8k", "42"), "The answer is 41. " * 5000 + "The answer is 42.")


def test_math_is_graded_outside_the_main_thread_too():
    results = []
    thread = threading.Thread(target=lambda: results.append(is_right(row("gsm8k", "42"), "The answer is 42.")))
    thread.start()
    thread.join()
    assert results == [True]


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "B.",
        "(B)",
        "B) a trumpet",
        "The answer is B.",
        "The answer is (B).",
        "answer: **B**",
        "A trumpet is an instrument. The answer is B.",
        "The answer is A. No, wait. The answer is B.",
        "The answer is B. Option A is wrong.",
        "Option A is a cow. Therefore, the correct option is B.",
        "**B**",
        "**B.** a trumpet",
        "B\n\nA trumpet is an instrument.",
        "\\boxed{B}",
        "\\boxed{\\text{B}}",
        "\\boxed{\\textbf{B}}",
        "\\boxed{B. a trumpet}",
        "**Answer:** B",
        "ANSWER: B",
        "Answer is $B$",
        'The answer is "B".',
        "Correct option: B",
        "The answer is a trumpet.",
        "**Answer:** a trumpet",
        "a trumpet",
        "A trumpet.",
    ],
)
def test_gold_letters(text):
    one = row("mmlu", "B", choices=CHOICES)
    assert is_right(one, text)
    assert not is_right(one | {"answer": "A"}, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A trumpet is loud",
        "A",
        "The answer is Blue.",
        "The answer is D.",
        "BBBB",
        "The answer is a trumpet or Vans",
        "The answer is not a trumpet.",
        "Options B and C are wrong",
        "b",
        "B.C. is",
    ],
)
def test_wrong_or_misleading_letters(text):
    assert not is_right(row("mmlu", "B", choices=CHOICES), text)


@pytest.mark.parametrize("text", ["a trumpet.", "The answer is a trumpet.", "The answer is a trumpet", "B"])
def test_choices_that_end_with_a_period(text):
    one = row("mmlu", "B", choices=["a cow.", "a trumpet.", "Vans.", "iron."])
    assert is_right(one, text)
    assert not is_right(one | {"answer": "A"}, text)


@pytest.mark.parametrize(
    ("text", "correct", "score"),
    [
        ("The answer is Ann Lee.", True, 1.0),
        ("Ann Lee", True, 1.0),
        ("\\boxed{Ann Lee}", True, 1.0),
        ("She works at the Mill. The Mill is in Rome. The answer is the ann lee", True, 1.0),
        ("The answer is Anna.", True, 1.0),
        ("Answer: Ann Lee", True, 1.0),
        ("**Answer:** Ann Lee", True, 1.0),
        ("The answer is Ann.", False, 2 / 3),
        ("The answer is Bob. It is not Ann Lee", False, 0.5),
        ("", False, 0.0),
        ("The answer is Bob.", False, 0.0),
    ],
)
def test_hotpotqa(text, correct, score):
    result = grade(row("longbench_hotpotqa", "Ann Lee", answers=["Ann Lee", "Anna"]), text)
    assert result.correct == correct
    assert result.score == pytest.approx(score, abs=1e-5)


def test_what_grading_needs_is_named_before_anything_is_generated(monkeypatch):
    require(["gsm8k", "mmlu", "longbench_hotpotqa"])
    monkeypatch.setitem(sys.modules, "math_verify", None)
    require(["mmlu"])
    with pytest.raises(ImportError, match=r"grading math500 needs math_verify: pip install 'blockinfer\[test\]'"):
        require(["mmlu", "math500"])


def test_an_unknown_source_is_named():
    with pytest.raises(ValueError, match="row x: there is no grader for the source 'sat'"):
        grade(row("sat", "1"), "1")


def test_the_sample_s_own_answers_are_right():
    forms = {"gsm8k": "The answer is {}.", "math500": "\\boxed{{{}}}", "mmlu": "The answer is {}."}
    for one in load_rows(SAMPLE):
        assert is_right(one, forms.get(one["source"], "The answer is {}.").format(one["answer"])), one
