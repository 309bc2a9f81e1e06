"""Graders on gold answers in the forms that models write, on near misses, and on text made to mislead them."""

import random
import signal
import sys
import threading
import time
from collections import Counter
from fractions import Fraction

import pytest
from torchmetrics.functional.text import squad

from evals.questions import graders
from evals.questions.graders import GRADER_VERSIONS, grade, require
from evals.questions.graders.arithmetic import same
from evals.questions.graders.limit import within
from evals.questions.graders.spans import f1
from evals.questions.rows import load_rows
from evals.runs.settings import SAMPLE
from tests.phrasings import cases, phrasings

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
        "b",
        "b. a trumpet",
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
        "B.C. is",
        "B could be right. Rain falls from clouds. Rivers carry it to the sea.",
        "Whether it is B is open. Rain falls from clouds. Rivers carry it to the sea.",
    ],
)
def test_wrong_or_misleading_letters(text):
    assert not is_right(row("mmlu", "B", choices=CHOICES), text)


@pytest.mark.parametrize("text", ["a trumpet.", "The answer is a trumpet.", "The answer is a trumpet", "B"])
def test_choices_that_end_with_a_period(text):
    one = row("mmlu", "B", choices=["a cow.", "a trumpet.", "Vans.", "iron."])
    assert is_right(one, text)
    assert not is_right(one | {"answer": "A"}, text)


@pytest.mark.parametrize("text", ["A. weak", "The answer is A. weak.", "(A) weak", "\\boxed{A. weak}", "A is correct."])
def test_choices_that_sound_like_a_verdict(text):
    one = row("mmlu", "A", choices=["weak", "false", "not wrong", "incorrect"])
    assert is_right(one, text)
    assert is_right(one | {"answer": "B"}, text.replace("A", "B").replace("weak", "false"))
    assert not is_right(one | {"answer": "B"}, text)


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


HOTPOTQA_QUESTION = "Who directed the film that was shot in Berlin?"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Ann Lee", "The film was directed by Ann Lee (born 1950)."),
        ("Ann Lee", "The director, Ann Lee, was born in Rome."),
        ("Ann Lee", "The film that was shot in Berlin was directed by Ann Lee, who was born in Rome."),
        ("Ann Lee", "Ann Lee directed the film. She was born in Rome in 1950."),
        ("Ann Lee", "Everything in the passages points to Ann Lee."),
        ("It's Always Sunny", "So it's It's Always Sunny."),
        ("Dr. No", "I first thought of Goldfinger, but it's Dr. No."),
        ("Who's the Boss?", "The answer is Who's the Boss?, as Passage 3 says."),
        ("from 1969 until 1974", "The answer is from 1969 until 1974."),
        ("yes", "Both of them were directors, so yes."),
        ("no", "No, only one of them is."),
    ],
)
def test_a_sentence_that_states_the_answer(answer, text):
    one = row("longbench_hotpotqa", answer, answers=[answer], question=HOTPOTQA_QUESTION)
    assert is_right(one, text)
    assert not is_right(one | {"answers": ["Bob Ray"]}, text)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Ann Lee", "Ann Lee is the sister of Bob. Bob directed the film."),
        ("Ann Lee", "The film was written by Ann Lee and directed by Bob Ray."),
        ("Ann Lee", "The film was directed by Bob Ray, who married Ann Lee."),
        ("Ann Lee", "Ann Lee wrote it, but Bob Ray directed it."),
        ("Ann Lee", "Bob Ray, not Ann Lee, directed the film."),
        ("Ann Lee", "The answer is not in the passages. Ann Lee is mentioned."),
        ("Ann Lee", "We can rule out Ann Lee. That leaves Bob Ray."),
        ("Ann Lee", "It seems to be Ann Lee, but it is actually Bob Ray."),
        ("Ann Lee", "Passage 1 names Ann Lee. Passage 3 names Bob Ray, and so we have to compare the"),
        ("Ann Lee", "I don't think it's Ann Lee."),
        ("Ann Lee", "Ann Lee's brother directed it."),
        ("Washington", "The answer is George Washington."),
        ("Long Island", "The answer is Long Island City."),
        ("American", "The answer is American football."),
        ("The Fall", "The answer is The Fall of Man."),
        ("building", "The answer is an office building."),
        ("poet", "The answer is poet and novelist."),
        ("tuba", "She plays the viola and the tuba."),
        ("Paris", "The answer is Paris in Texas."),
        ("no", "Yes, there is no doubt."),
        ("yes", "The answer is no. Yes, one is."),
    ],
)
def test_a_sentence_that_only_holds_the_answer(answer, text):
    one = row("longbench_hotpotqa", answer, answers=[answer], question=HOTPOTQA_QUESTION)
    assert not is_right(one, text)


# Least shares: right answers accepted, wrong ones and undecided texts refused.
BARS = {"gsm8k": 0.99, "math500": 0.99, "mmlu": 0.98, "longbench_hotpotqa": 0.97}


@pytest.mark.parametrize("part", ["seen", "held"])
@pytest.mark.parametrize("source", BARS)
def test_phrasings(source, part):
    for stated, least in [("right", BARS[source]), ("wrong", 0.995), ("nothing", 0.99)]:
        every = (48 if source == "math500" else 12) if part == "seen" else (24 if source == "math500" else 8)
        results = [
            (is_right(one, text) == (stated == "right"), text) for one, text, _ in cases(source, stated, part, every)
        ]
        failed = [text for ok, text in results if not ok]
        assert len(failed) <= (1 - least) * len(results), (stated, len(failed), len(results), failed[:20])


@pytest.mark.parametrize("source", BARS)
def test_phrasings_are_many_and_each_is_used(source):
    parts = phrasings(source)
    assert len(parts["seen"]) >= 60 and len(parts["held"]) >= 30
    assert not set(parts["seen"]) & set(parts["held"])
    used = Counter(phrasing for part in ("seen", "held") for _, _, phrasing in cases(source, "right", part))
    assert set(used) == {*parts["seen"], *parts["held"]}


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("\\frac{1}{2^{98}}", "\\boxed{\\frac{1}{2^{97}}}"),
        ("\\frac{1}{20!}", "\\boxed{\\frac{1}{19!}}"),
        ("\\left( \\frac{1}{3^{60}}, 2 \\right)", "\\boxed{\\left( \\frac{1}{3^{61}}, 2 \\right)}"),
        ("0.00000012", "\\boxed{0.00000013}"),
        ("\\frac{x}{10^{20}}", "\\boxed{\\frac{x}{10^{21}}}"),
        ("e^{-40}", "$e^{-41}$"),
    ],
)
def test_small_results_are_told_apart(gold, text):
    assert not is_right(row("math500", gold), text)
    assert is_right(row("math500", gold), f"\\boxed{{{gold}}}")


@pytest.mark.parametrize("text", ["The answer is $\\frac{1}{3}$.", "0.333333", "\\boxed{0.3333333}"])
def test_a_rounded_decimal_is_its_fraction(text):
    assert is_right(row("math500", "\\frac{1}{3}"), text)
    assert not is_right(row("math500", "\\frac{1}{4}"), text)


# Numbers of more digits than there is memory, integrals nobody can do, brackets without end, and lists that a careless
# pattern reads in exponential time.
ENDLESS = {
    "tower": "\\boxed{9^{9^{9^9}}}",
    "factorial": "\\boxed{((100!)!)!}",
    "power": "\\boxed{2^{1000000000}}",
    "product": "\\boxed{\\prod_{k=1}^{100000} k}",
    "integral": "\\boxed{\\int_0^{\\infty} e^{-x^2}\\sin(x^3)\\cos(x^5) dx}",
    "expansion": "\\boxed{(x+y+z)^{300}}",
    "brackets": "\\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    "braces": "{" * 4000,
    "boxes": "\\boxed{" * 500,
    "fractions": "\\frac{" * 500 + "1" + "}{2}" * 500,
    "digits": "9" * 4000,
    "sum": "1+" * 1900 + "1",
    "quotient": "1/" * 1900 + "1",
    "letters": "A, " * 1300,
    "listed": "A and " * 600,
    "cues": "The answer is " * 280,
    "negated": "not 5 but " * 400,
    "signs": "-" * 4000 + "5",
    "numbers": "5 " * 2000,
    "corrected": "Wait, no. " * 400,
    "delimiters": "\\(" * 2000,
}


# an alarm that rings while hypothesis watches the garbage collector is lost there; the next one is not
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_no_answer_keeps_the_grader_busy(text, monkeypatch):
    monkeypatch.setattr("evals.questions.graders.SECONDS", 1)
    rows = [
        row("gsm8k", "42"),
        row("math500", "x^2+2"),
        row("mmlu", "B", choices=CHOICES),
        row("longbench_hotpotqa", "Ann Lee", answers=["Ann Lee"]),
    ]
    for one in rows:
        start = time.perf_counter()
        assert not is_right(one, text)
        assert time.perf_counter() - start < 10, one["source"]


@pytest.mark.parametrize("is_main", [True, False])
def test_a_judgement_that_comes_too_late(is_main):
    def judge(results):
        results.append(within(0.1, time.sleep, 30, late="late"))
        results.append(within(10, lambda: "in time", late="late"))
        with pytest.raises(ZeroDivisionError):
            within(10, lambda: 1 / 0, late="late")
        results.append(signal.getsignal(signal.SIGALRM))

    results = []
    before = signal.getsignal(signal.SIGALRM)
    if is_main:
        judge(results)
    else:
        thread = threading.Thread(target=judge, args=(results,))
        thread.start()
        thread.join()
    assert results == ["late", "in time", before]


def test_f1_is_squad_s_metric():
    """LongBench's F1 is SQuAD's, but for two empty texts, which LongBench gives 0 and SQuAD 1."""
    rng = random.Random(0)
    words = ["the", "Ann", "lee,", "a", "Rome.", "of", "rome", "Ann-Lee"]
    for _ in range(300):
        text, answer = (" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(2))
        target = [{"id": "x", "answers": {"answer_start": [0], "text": [answer]}}]
        expected = float(squad([{"id": "x", "prediction_text": text}], target)["f1"]) / 100
        if f1(answer, answer):
            assert f1(text, answer) == pytest.approx(expected, abs=1e-5), (text, answer)
    assert f1("the", "the") == f1("", "") == 0.0


def test_longbench_s_own_measure_takes_the_whole_output():
    one = row("longbench_hotpotqa", "Ann Lee", answers=["Ann Lee", "Anna"])
    result = grade(one, "Facts: x. The answer is Ann Lee.")
    assert result.correct and result.score == 1.0
    # 7 tokens but for articles, 2 of them the answer's
    assert result.longbench_f1 == pytest.approx(2 * 2 / (6 + 2))
    assert grade(row("gsm8k", "1"), "1").longbench_f1 is None


MULTIPLE = row("mmlu", "B", choices=CHOICES)
SPAN = row("longbench_hotpotqa", "Ann Lee", answers=["Ann Lee", "Lee"], question="Who wrote it?")


@pytest.mark.parametrize(
    ("one", "text", "extracted"),
    [
        (row("gsm8k", "7"), "3 + 4 = 7. The answer is 7.", "7"),
        (row("gsm8k", "7"), "The answer is $1,250.50.", "1250.5"),
        (row("gsm8k", "7"), "The answer is 1/3.", "1/3"),
        (row("gsm8k", "7"), "So it is \\boxed{x}.", "x"),
        (row("gsm8k", "7"), "The answer is 10^64 * 10^64 * 10^64 * 10^64 * 10^64.", "a number of hundreds of digits"),
        (row("gsm8k", "7"), "I do not know.", None),
        (row("gsm8k", "7"), "It is 6 or 7.", None),
        (row("math500", "x^2"), "Hence \\boxed{2x}.", "2x"),
        (row("math500", "x^2"), "Hence \\boxed{x^2}.", "x^2"),
        (row("math500", "Evelyn"), "Evelyn was the fastest.", "Evelyn"),
        (row("math500", "x^2"), "I do not know the answer.", None),
        (MULTIPLE, "The answer is C.", "C"),
        (MULTIPLE, "It is a trumpet", "B"),
        (MULTIPLE, "B or C", None),
        (MULTIPLE, "No idea at all", None),
        (SPAN, "The answer is Ann Lee.", "Ann Lee"),
        (SPAN, "Lee", "Lee"),
        (SPAN, "The answer is Bob Ray.\nHe wrote it.", "Bob Ray."),
        (SPAN, "It was long ago. Bob Ray wrote it.", "Bob Ray wrote it."),
        (SPAN, "I do not know who wrote it.", None),
        *((one, "", None) for one in (row("gsm8k", "7"), row("math500", "7"), MULTIPLE, SPAN)),
    ],
)
def test_what_was_judged_is_told(one, text, extracted):
    assert grade(one, text).extracted == extracted


def test_what_took_too_long_has_told_nothing(monkeypatch):
    monkeypatch.setattr("evals.questions.graders.SECONDS", 0.01)
    monkeypatch.setitem(graders._GRADERS, "choice", lambda row, text: time.sleep(30))
    assert grade(MULTIPLE, "The answer is B.") == graders.Grade(False, 0.0)


def test_every_source_has_a_version():
    assert GRADER_VERSIONS == {"gsm8k": 5, "math500": 5, "mmlu": 6, "longbench_hotpotqa": 5}


def test_what_grading_needs_is_named_before_anything_is_generated(monkeypatch):
    choice, number = row("mmlu", "A"), row("mine", "1", grader="number")
    require([choice, number, row("math500", "1")])
    monkeypatch.setitem(sys.modules, "math_verify", None)
    require([choice, row("mine", "A", grader="choice"), row("mine", "A", grader="squad")])
    with pytest.raises(ImportError, match=r"grading math500 needs math_verify: pip install 'blockinfer\[test\]'"):
        require([choice, row("math500", "1")])
    with pytest.raises(ImportError, match="grading mine needs math_verify"):
        require([number])


def test_an_unknown_source_is_named():
    with pytest.raises(ValueError, match="row x: there is no grader for the source 'sat'"):
        grade(row("sat", "1"), "1")


def test_the_sample_s_own_answers_are_right():
    forms = {"gsm8k": "The answer is {}.", "math500": "\\boxed{{{}}}", "mmlu": "The answer is {}."}
    for one in load_rows(SAMPLE):
        assert is_right(one, forms.get(one["source"], "The answer is {}.").format(one["answer"])), one


@pytest.mark.parametrize(
    "gold, value, equal",
    [
        ("1/3", "0.333333", True),
        ("1/3", "0.33333", False),
        ("2.5", "2.5000004", True),
        ("2.5", "2.500001", False),
        ("0.005", "0.0050001", False),
        ("10000000", "10000001", False),
    ],
)
def test_a_decimal_that_was_rounded_has_six_places(gold, value, equal):
    """A number below a hundredth, of which six places say little, is compared exactly."""
    assert same(Fraction(gold), Fraction(value)) is equal


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The answer is 10, or if Tom is counted too, 12.", False),
        ("The answer is 10 apples, or if Tom is counted too, 12.", False),
        ("The answer is 10 minutes or 12 minutes.", False),
        ("The answer is 10 or, as a sum, 10.", True),
        ("The answer is 10, or in other words half of 20.", True),
        ("The answer is 10, or equivalently 20/2.", True),
        ("The answer is 10 minutes or 600 seconds.", True),
    ],
)
def test_another_number_after_words_is_another_answer(text, right):
    assert is_right(row("gsm8k", "10"), text) is right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 33.4, which we round up to 34.", "34"),
        ("33.4 rounds down to 33.", "33"),
        ("The answer is 33.33, rounded to 2 decimal places.", "33.33"),
        ("The answer is 34 because 33.4 rounded to 33 is too little.", "34"),
        ("The answer is 9:00 am.", "9"),
        ("So 42 remain.\n\nTo verify: 42 + 8 = 50, the number at first.", "42"),
        ("I get 41. Let me check: 6 * 7 = 42, so it is 42.", "42"),
        ("Mary will have 42 left after giving 8 away.", "42"),
        ("There are 50, and after eating 8 there are 42.", "42"),
        ("So Mary has a total of 42 apples in her 6 baskets.", "42"),
        ("Mary spent $42 more than Tom's $8.", "42"),
    ],
)
def test_a_number_that_is_the_result_of_others(text, answer):
    for other in ("8", "33", "33.4", "34", "41", "42", "50"):
        assert is_right(row("gsm8k", answer), text)
        assert other == answer or not is_right(row("gsm8k", other), text)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("57500", "The answer is \\$57{,}500."),
        ("57500", "\\boxed{57,\\!500}"),
        ("57500", "The answer is $57\\,500$."),
        ("57500", "He sold it for $57.5k."),
        ("1500000", "The answer is $1.5M."),
        ("2.5", "The answer is $2\\frac{1}{2}$ hours."),
        ("2.5", "\\boxed{2\\frac12}"),
        ("-5", "The answer is negative 5."),
        ("-5", "The answer is minus 5 degrees."),
    ],
)
def test_a_number_has_many_spellings(answer, text):
    assert is_right(row("gsm8k", answer), text)
    assert not is_right(row("gsm8k", "5"), text)


def test_a_variable_is_no_thousand():
    assert is_right(row("gsm8k", "15"), "With $k = 5$ the answer is $3k = 15$.")


@pytest.mark.parametrize(
    ("gold", "text", "other"),
    [
        ("3, 5, 7", "\\boxed{3, 5, \\text{ and } 7}", "3, 5, 8"),
        ("3, 5, 7", "The values are 3, 5, and 7.", "3, 5"),
        ("-5, 5", "\\[\\boxed{-5} \\text{ and } \\boxed{5}\\]", "5"),
        ("[3,4]", "\\boxed{3 \\le x \\le 4}", "[3,4)"),
        ("(-\\infty,3)", "\\boxed{x < 3}", "(-\\infty,3]"),
        ("\\frac{1}{3}", "\\boxed{0.\\overline{3}}", "\\frac{3}{10}"),
        ("-\\frac{61}{495}", "\\boxed{-0.1\\overline{23}}", "\\frac{61}{495}"),
        ("6 - 5i", "\\boxed{6-5\\mathrm{i}}", "1"),
        ("6", "Thus the minimum value is $6$, attained when $x = 2$.", "2"),
    ],
)
def test_mathematics_has_many_spellings(gold, text, other):
    assert is_right(row("math500", gold), text)
    assert not is_right(row("math500", other), text)


@pytest.mark.parametrize("text", ["$\\boxed6$", "\\boxed 6", "\\framebox{6}"])
def test_boxes_with_other_braces(text):
    assert is_right(row("math500", "6"), text)
    assert is_right(row("gsm8k", "6"), text)


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (row("gsm8k", "42"), "The answer is 42.\n\nQuestion: 3 + 4?\nAnswer: 3 + 4 = 7. The answer is 7."),
        (row("mmlu", "B", choices=CHOICES), "The answer is B.\n\nQuestion: Which barks?\nA. a dog\nThe answer is A."),
        (
            row("longbench_hotpotqa", "Ann", answers=["Ann"]),
            "The answer is Ann.\n\nUser: And who wrote it?\nAnswer: Bob",
        ),
        (row("gsm8k", "42"), "Question: How much is 6 * 7?\nAnswer: 42"),
    ],
)
def test_a_question_after_the_answer_is_not_read(one, text):
    assert is_right(one, text)


LISTED = ["A. a cow - {}. It moos.", "B. a trumpet - {}.", "C. Vans - {}.", "D. iron - {}."]


@pytest.mark.parametrize("right", "ABCD")
def test_a_list_of_verdicts(right):
    lines = [line.format("Correct" if line[0] == right else "Incorrect") for line in LISTED]
    one = row("mmlu", right, choices=CHOICES)
    for text in ("\n".join(lines), "Let us look at each option:\n\n" + "\n\n".join(lines)):
        assert is_right(one, text)
        assert not is_right(one | {"answer": "ABCD"["BCDA".index(right)]}, text)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A. a cow\nB. a trumpet\nC. Vans\nD. iron", None),
        ("A. a cow\nB. a trumpet\nC. Vans\nD. iron\n\nSo C.", "C"),
        ("A. a cow moos.\nB. a trumpet blares.\nC. Vans are shoes.\nD. iron rusts. So the answer is B.", "B"),
        ("A. a cow moos.\nB. a trumpet blares.\nC. Vans are shoes.\nD. iron rusts. So it must be B.", "B"),
        ("A) a cow moos.\nC) Vans are shoes.\nD) iron rusts.\n\nSo B it is.", "B"),
        ("B. a trumpet\n\nA. a cow moos.\nC. Vans are shoes.\nD. iron rusts.", "B"),
        ("A. a cow\n\nThe others do not moo:\nB. a trumpet\nC. Vans\nD. iron", "A"),
    ],
)
def test_choices_that_are_gone_through(text, letter):
    assert grade(row("mmlu", "A", choices=CHOICES), text).extracted == letter


def test_a_choice_after_an_equation():
    one = row("mmlu", "B", choices=["38", "72", "110", "360"])
    assert is_right(one, "So the total is 42 + 30 = **72**.")
    assert is_right(one, "$42+30=72$")
    assert not is_right(one, "72 = 110 - 38")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("yes", "Yes, Ann Lee and Bob Ray were both from Rome."),
        ("yes", "Ann Lee and Bob Ray were both from Rome, so yes, they were."),
        ("yes", "Yes, they were. Both were from Rome."),
        ("no", "The answer is No, Ann Lee was from Rome."),
    ],
)
def test_yes_or_no_and_the_reason(answer, text):
    one = row("longbench_hotpotqa", answer, answers=[answer], question="Were Ann Lee and Bob Ray of the same city?")
    assert is_right(one, text)
    assert not is_right(one | {"answers": ["no" if answer == "yes" else "yes"]}, text)


@pytest.mark.parametrize("text", ["No information is given.", "There is no answer in the passages.", "No one knows."])
def test_no_before_a_noun_is_no_answer(text):
    assert not is_right(row("longbench_hotpotqa", "no", answers=["no"], question="Were Ann and Bob directors?"), text)


@pytest.mark.parametrize("text", ["5 June 1878", "The answer is June 5th, 1878.", "She was born on 5 June 1878."])
def test_a_date_with_the_day_first(text):
    one = row("longbench_hotpotqa", "June 5, 1878", answers=["June 5, 1878"], question="When was the director born?")
    assert is_right(one, text)
    assert not is_right(one | {"answers": ["June 8, 1875"]}, text)
    assert not is_right(one, "July 6, 1878, June 5, 1878")


def test_a_name_before_the_verb_of_the_question():
    one = row("longbench_hotpotqa", "Ann Lee", answers=["Ann Lee"], question=HOTPOTQA_QUESTION)
    assert is_right(one, "According to Passage 5, The Wall was directed by Ann Lee.")
    assert not is_right(one, "The Wall was written by Ann Lee.")
    assert not is_right(one, "The Wall was not directed by Ann Lee.")
