"""The small model's problems: they are right, their answers unique, and what is evaluated was never trained on."""

import math
import random
import re
from collections import Counter
from importlib import import_module

import pytest

from evals.llada_tiny.data import Encoder, make_batch
from evals.llada_tiny.problems import SOURCES, drill, problem, split
from evals.llada_tiny.sample import sample_rows, sample_text
from evals.questions.graders import grade
from evals.questions.prompts import messages
from evals.questions.rows import load_rows
from evals.runs.settings import SAMPLE, TINY_MODEL

# the package's names are those of the functions
MODULES = {
    name: import_module(f"evals.llada_tiny.problems.{name}") for name in ("gsm8k", "math500", "mmlu", "hotpotqa")
}


def asked(row):
    """What identifies a row for someone who is asked it."""
    return row["question"], row.get("context"), tuple(sorted(row.get("choices", ())))


def test_the_sample_is_what_its_command_writes():
    assert SAMPLE.read_text("utf-8") == sample_text()


def test_the_sample_s_rows():
    rows = load_rows(SAMPLE)
    assert [row["source"] for row in rows] == list(SOURCES) * 50
    assert len({row["id"] for row in rows}) == len({asked(row) for row in rows}) == 200


def test_the_sample_s_lengths(tokenizer):
    lengths = {source: [] for source in SOURCES}
    for row in sample_rows():
        answer = len(tokenizer(row["solution"], add_special_tokens=False).input_ids) + 1  # with the stop token
        assert answer <= 120
        lengths[row["source"]].append(answer - 1)
        prompt = tokenizer.apply_chat_template(messages(row), add_generation_prompt=True, return_dict=False)
        assert len(prompt) + 128 <= 512
    for source in ("gsm8k", "math500"):
        assert sum(length > 40 for length in lengths[source]) * 3 >= 50, source


@pytest.fixture
def draws(monkeypatch):
    """Every (keys, split asked for) of the draws that make problems."""
    drawn = []

    def recorded(rng, wanted, make, *name):
        value = split.draw(rng, wanted, make, *name)
        drawn.append(((*name, value), wanted))
        return value

    for module in MODULES.values():
        monkeypatch.setattr(module, "draw", recorded)
    return drawn


def test_no_row_was_trained_on(draws):
    """Structures, numbers, names and pairings of every row belong to the held-out split, and training draws none."""
    rows = sample_rows()
    heldout = {key for key, _ in draws}
    assert len(heldout) >= 200 and {split.split_of(*key) for key in heldout} == {"heldout"}
    draws.clear()
    rng = random.Random(0)
    trained = set()
    for number in range(8_000):
        row = problem(SOURCES[number % 4], rng, "train", rng.random())
        trained.add(asked(row))
    seen = {key for key, _ in draws}
    assert len(seen) > 8_000 and {split.split_of(*key) for key in seen} == {"train"}
    assert not trained & {asked(row) for row in rows}


def test_training_batches_draw_from_the_training_split_only(draws):
    encoder = Encoder(str(TINY_MODEL / "tokenizer.json"))
    for number, level in enumerate((0.0, 0.5, 1.0)):
        make_batch(encoder, number, 2, level, 0)
    assert len(draws) > 50 and {wanted for _, wanted in draws} == {"train"}


@pytest.mark.parametrize(
    ("kind", "numbers", "same"),
    [
        ("expression", (2, 3, 4, 5, "-"), [(4, 5, 2, 3, "-")]),
        ("expression", (2, 3, 4, 5, "+"), []),
        ("linear", (2, 9, 3, "-"), "asks 5"),
        ("linear", (2, 9, 3, "+"), []),
    ],
)
def test_the_same_question_from_other_numbers_is_known(kind, numbers, same):
    build = MODULES["math500"].KINDS[kind][1]
    found = MODULES["math500"]._same_question(kind, numbers)
    assert all(build(*other) == build(*numbers) for other in found)
    if isinstance(same, list):
        assert found == same
    else:
        assert len(found) == 27  # every other b = 5 + 2k up to 60: 5, 7, 11, ..., 59


def result(row):
    """The answer without the generator: from the question's numbers, or what the last checked equation comes to."""
    numbers = [int(x) for x in re.findall(r"\d+", row["question"])]
    if "greatest common" in row["question"] or "gcd" in row["question"]:
        return math.gcd(*numbers)
    if "^" in row["question"]:
        return pow(*numbers)
    return int(re.findall(r"= (\d+)", row["solution"])[-1])


@pytest.mark.parametrize("source", SOURCES)
def test_the_generators_own_solutions_are_right(source):
    rng = random.Random(1)
    rows = [problem(source, rng, "train", rng.random()) for _ in range(300)]
    for row in rows:
        assert grade({"id": "x", **row}, row["solution"]).correct, row
        for left, value in re.findall(r"(\d+ [-+*/] \d+) = (\d+)", row["solution"]):
            assert eval(left) == int(value), row["solution"]
        if source in ("gsm8k", "math500"):
            assert int(row["answer"]) == result(row), row
    assert len({asked(row) for row in rows}) > 250
    if source == "mmlu":
        assert all(len(set(row["choices"])) == 4 for row in rows)
        assert min(Counter(row["answer"] for row in rows).values()) > 40
    if source == "longbench_hotpotqa":
        for row in rows:
            assert row["context"].count(row["answer"]) >= 1


def test_a_two_hop_question_has_one_answer():
    """Follow the passages from the question's subject: each hop is stated once, and one word tells two things apart."""
    rng = random.Random(2)
    for _ in range(200):
        row = problem("longbench_hotpotqa", rng, "train")
        first, second, last = row["solution"].removeprefix("Facts: ").split(". ")
        passages = row["context"].removeprefix("Passages: ").removesuffix(".").split(". ")
        assert passages.count(first) == passages.count(second) == 1
        assert last == f"The answer is {row['answer']}."
        starts = Counter(passage.removeprefix("The ").split()[0] for passage in passages)
        assert set(starts.values()) <= {1, 2}


def test_a_drill_states_facts_of_the_passages():
    rng = random.Random(6)
    for level in (0.0, 0.5, 1.0):
        for _ in range(50):
            row = drill("longbench_hotpotqa", rng, "train", level)
            facts = row["solution"].removeprefix("Facts: ").removesuffix(".").split(". ")
            assert len(facts) in (4, 6, 8) and len(set(facts)) == len(facts)
            assert all(row["context"].count(f" {fact}.") == 1 for fact in facts)


def test_a_drill_names_the_letters_of_choices():
    rng = random.Random(8)
    for level in (0.0, 1.0):
        for _ in range(50):
            row = drill("mmlu", rng, "train", level)
            named = dict(re.findall(r"([A-D])\. (.+?)\.(?: |$)", row["solution"]))
            assert 2 <= len(named) <= 4 and all(row["choices"]["ABCD".index(x)] == named[x] for x in named), row
            assert all(choice in row["question"] for choice in named.values())


def test_shopping_without_change_is_held_out_by_its_numbers():
    rng = random.Random(7)
    found = 0
    for wanted in split.SPLITS:
        for _ in range(300):
            row = problem("gsm8k", rng, wanted)
            numbers = re.findall(r"buys (\d+) \w+ for (\d+) dollars each and (\d+) \w+ for (\d+)", row["question"])
            if numbers and "pays with" not in row["question"]:
                found += 1
                assert split.split_of("gsm8k shopping", False, (*map(int, numbers[0]), 0)) == wanted, row
    assert found > 20
