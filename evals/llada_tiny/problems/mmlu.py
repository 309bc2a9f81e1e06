"""Four-choice questions over common facts and rules.

The solution states the fact first, then the letter, then its choice as the question lists it.
"""

import random

from evals.llada_tiny.problems.facts import CATEGORIES, COUNTING, DAYS, LETTERS, MONTHS, RELATIONS
from evals.llada_tiny.problems.split import draw

# A kind draws (subject key, right choice, three wrong ones) and phrases them as (question forms, fact).
Drawn = tuple[tuple, str, tuple[str, ...]]


def mmlu(rng: random.Random, split: str, level: float = 1.0) -> dict:
    """One question as a row without id and source. `level` below 1 uses fewer facts of each kind."""
    kind = rng.choice(KINDS)
    subject, right, wrong = draw(rng, split, lambda r: _with_sorted_wrong(kind(r, level)), "mmlu", kind.__name__)
    forms, fact = PHRASES[kind](subject, right)
    choices = [right, *wrong]
    rng.shuffle(choices)
    letter = "ABCD"[choices.index(right)]
    question = rng.choice(forms)
    question = question[0].upper() + question[1:]
    return {
        "question": question,
        "choices": choices,
        "answer": letter,
        "solution": f"{fact[0].upper()}{fact[1:]} The answer is {letter}. {right}.",
    }


def lettering(rng: random.Random, split: str, level: float = 1.0) -> dict:
    """A drill for training: the letters of several choices. A row with question, choices and solution."""
    choices = mmlu(rng, split, level)["choices"]
    asked = rng.sample(list(zip("ABCD", choices, strict=True)), rng.randint(2, 4))
    names = [choice for _, choice in asked]
    return {
        "question": f"Name the letters of {', '.join(names[:-1])} and {names[-1]}.",
        "choices": choices,
        "solution": " ".join(f"{letter}. {choice}." for letter, choice in asked),
    }


def _with_sorted_wrong(drawn: Drawn) -> Drawn:
    subject, right, wrong = drawn
    return subject, right, tuple(sorted(wrong))


def _first(pool: list, level: float, least: int = 6) -> list:
    """The first share `level` of a pool."""
    return pool[: max(least, round(level * len(pool)))]


def relation(rng: random.Random, level: float) -> Drawn:
    name = rng.choice(list(RELATIONS))
    pairs = _first(RELATIONS[name][2], level)
    s, o = rng.choice(pairs)
    others = [other for _, other in pairs if other != o]
    return (name, s), o, tuple(rng.sample(others, 3))


def relation_phrase(subject: tuple, right: str) -> tuple[tuple[str, ...], str]:
    name, s = subject
    forms, fact, _ = RELATIONS[name]
    return tuple(form.format(s=s) for form in forms), fact.format(s=s, o=right)


def category(rng: random.Random, level: float) -> Drawn:
    name, *others = rng.sample(_first(list(CATEGORIES), level), 4)
    return (name,), _member(rng, name, level), tuple(_member(rng, other, level) for other in others)


def category_phrase(subject: tuple, right: str) -> tuple[tuple[str, ...], str]:
    phrase = CATEGORIES[subject[0]][0]
    return (f"which of these is {phrase}?", f"which word names {phrase}?"), f"the word {right} names {phrase}."


def odd_one(rng: random.Random, level: float) -> Drawn:
    name, other = rng.sample(_first(list(CATEGORIES), level), 2)
    return (name, other), _member(rng, other, level), tuple(rng.sample(_first(CATEGORIES[name][1], level), 3))


def odd_one_phrase(subject: tuple, right: str) -> tuple[tuple[str, ...], str]:
    phrase, other = CATEGORIES[subject[0]][0], CATEGORIES[subject[1]][0]
    return (
        f"which of these is not {phrase}?",
        f"which word does not name {phrase}?",
    ), f"the word {right} names {other}, not {phrase}."


def _member(rng: random.Random, name: str, level: float) -> str:
    return rng.choice(_first(CATEGORIES[name][1], level))


def calendar(rng: random.Random, level: float) -> Drawn:
    days = rng.random() < 0.5
    pool = DAYS if days else MONTHS
    i, step = rng.randrange(len(pool)), rng.choice((1, -1) if rng.random() > level else (1, 2, 3, -1, -2))
    right = pool[(i + step) % len(pool)]
    wrong = rng.sample([x for x in pool if x != right], 3)
    return ("day" if days else "month", pool[i], step), right, tuple(wrong)


def calendar_phrase(subject: tuple, right: str) -> tuple[tuple[str, ...], str]:
    unit, start, step = subject
    side = "after" if step > 0 else "before"
    if abs(step) == 1:
        return (f"which {unit} comes right {side} {start}?",), f"the {unit} right {side} {start} is {right}."
    count = COUNTING[abs(step) - 1]
    return (f"which {unit} comes {count} {unit}s {side} {start}?",), f"{count} {unit}s {side} {start} is {right}."


def alphabet(rng: random.Random, level: float) -> Drawn:
    i, step = rng.randrange(1, 25), rng.choice((1, -1))
    right = LETTERS[i + step]
    wrong = rng.sample([x for x in LETTERS if x not in (right, LETTERS[i])], 3)
    return (LETTERS[i], step), right, tuple(wrong)


def alphabet_phrase(subject: tuple, right: str) -> tuple[tuple[str, ...], str]:
    letter, step = subject
    side = "after" if step > 0 else "before"
    forms = (f"which letter comes right {side} {letter}?", f"in the alphabet, which letter is right {side} {letter}?")
    return forms, f"the letter right {side} {letter} is {right}."


def arithmetic(rng: random.Random, level: float) -> Drawn:
    sign = rng.choice("+-*")
    a, b = (rng.randint(2, 9), rng.randint(2, 12)) if sign == "*" else (rng.randint(3, 60), rng.randint(2, 39))
    if sign == "-" and a < b:
        a, b = b, a
    value = a * b if sign == "*" else a + b if sign == "+" else a - b
    near = [x for x in range(max(0, value - 12), value + 13) if x != value]
    return (a, sign, b), str(value), tuple(str(x) for x in rng.sample(near, 3))


def arithmetic_phrase(subject: tuple, right: str) -> tuple[tuple[str, ...], str]:
    a, sign, b = subject
    return (f"what is {a} {sign} {b}?", f"which number equals {a} {sign} {b}?"), f"{a} {sign} {b} = {right}."


def extreme(rng: random.Random, level: float) -> Drawn:
    values = rng.sample(range(1, 100), 4)
    largest = rng.random() < 0.5
    right = (max if largest else min)(values)
    return ("largest" if largest else "smallest",), str(right), tuple(str(x) for x in values if x != right)


def extreme_phrase(subject: tuple, right: str) -> tuple[tuple[str, ...], str]:
    word = subject[0]
    return (f"which of these numbers is the {word}?", f"which number is {word}?"), f"the {word} number is {right}."


def parity(rng: random.Random, level: float) -> Drawn:
    even = rng.random() < 0.5
    right = rng.randrange(1, 99) // 2 * 2 + (0 if even else 1)
    wrong = rng.sample([x for x in range(1, 100) if x % 2 != right % 2], 3)
    return ("even" if even else "odd",), str(right), tuple(str(x) for x in wrong)


def parity_phrase(subject: tuple, right: str) -> tuple[tuple[str, ...], str]:
    word = f"an {subject[0]} number"
    return (f"which of these is {word}?", f"which choice is {word}?"), f"the number {right} is {subject[0]}."


PHRASES = {
    relation: relation_phrase,
    category: category_phrase,
    odd_one: odd_one_phrase,
    calendar: calendar_phrase,
    alphabet: alphabet_phrase,
    arithmetic: arithmetic_phrase,
    extreme: extreme_phrase,
    parity: parity_phrase,
}
KINDS = [relation, relation, relation, category, odd_one, calendar, alphabet, arithmetic, extreme, parity]
