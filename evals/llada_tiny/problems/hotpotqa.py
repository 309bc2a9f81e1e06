"""Two-hop questions over short passages, with distractor passages of the same form.

Within one problem all things have different first words, so that one word is enough to look a passage up; what the
passage says about it begins three or four words later (init.py's local heads look that far). Every passage follows a
space, so that a name is the same token in the passages, in the question and in the answer.
"""

import random
from dataclasses import dataclass

from evals.llada_tiny.problems.facts import MONTHS
from evals.llada_tiny.problems.split import draw
from evals.llada_tiny.problems.words import (
    FIRM_KINDS,
    FIRM_NAMES,
    INSTRUMENTS,
    MEN,
    NOVEL_KINDS,
    NOVEL_NAMES,
    PRODUCTS,
    RIVERS,
    SURNAMES,
    TOWNS,
    WOMEN,
)


@dataclass(frozen=True)
class Kind:
    """subject -> middle -> end, each the name of a pool; the passages and the questions with {s}, {m} and {e}."""

    subject: str
    middle: str
    end: str
    first: str
    second: str
    forms: tuple[str, str]


KINDS: dict[str, Kind] = {
    "firm town": Kind(
        *("person", "firm", "town"),
        *("{s} works at {m}.", "{m} is in {e}."),
        ("In which town does {s} work?", "In which town is the place where {s} works?"),
    ),
    "firm month": Kind(
        *("person", "firm", "month"),
        *("{s} works at {m}.", "{m} opened in {e}."),
        ("In which month did the place where {s} works open?", "When did the workplace of {s} open?"),
    ),
    "town river": Kind(
        *("person", "town", "river"),
        *("{s} lives in {m}.", "{m} is on the {e}."),
        ("Which river flows through the town where {s} lives?", "On which river is the home town of {s}?"),
    ),
    "town product": Kind(
        *("person", "town", "product"),
        *("{s} comes from {m}.", "{m} is known for {e}."),
        ("What is the town that {s} comes from known for?", "For which product is the home town of {s} known?"),
    ),
    "author instrument": Kind(
        *("novel", "person", "instrument"),
        *("{s} is by {m}.", "{m} plays the {e}."),
        ("Which instrument does the author of {s} play?", "What does the person who wrote {s} play?"),
    ),
    "author town": Kind(
        *("novel", "person", "town"),
        *("{s} is by {m}.", "{m} lives in {e}."),
        ("In which town does the author of {s} live?", "Where does the person who wrote {s} live?"),
    ),
}
# first words, all different within a problem, and second words (none: things of one word)
POOLS: dict[str, tuple[list[str], list[str]]] = {
    "person": ([name for pair in zip(WOMEN, MEN, strict=True) for name in pair], SURNAMES),
    "firm": (FIRM_NAMES, FIRM_KINDS),
    "novel": (NOVEL_NAMES, NOVEL_KINDS),
    "town": (TOWNS, []),
    "river": (RIVERS, []),
    "month": (MONTHS, []),
    "instrument": (INSTRUMENTS, []),
    "product": (PRODUCTS, []),
}


def hotpotqa(rng: random.Random, split: str, level: float = 1.0) -> dict:
    """One question as a row without id and source. `level` below 1: fewer distractors and smaller pools."""
    kind, things, context = _passages(rng, split, level)
    s, _, answer = things[0]
    return {
        "question": rng.choice(kind.forms).format(s=s),
        "context": context,
        "answer": answer,
        "answers": [answer],
        "solution": f"Facts: {_chain(kind, things[0])} The answer is {answer}.",
    }


def recital(rng: random.Random, split: str, level: float = 1.0) -> dict:
    """A drill for training: the two facts about each of several subjects. A row with question, context and solution."""
    kind, things, context = _passages(rng, split, level)
    asked = rng.sample(things, min(len(things), rng.randint(2, 4)))
    subjects = [s for s, _, _ in asked]
    return {
        "question": f"What is known of {', '.join(subjects[:-1])} and {subjects[-1]}?",
        "context": context,
        "solution": f"Facts: {' '.join(_chain(kind, thing) for thing in asked)}",
    }


def _passages(rng: random.Random, split: str, level: float) -> tuple[Kind, list[tuple[str, str, str]], str]:
    """A kind, its (subject, middle, end) triples, the asked one first, and the context that states them."""
    name = rng.choice(list(KINDS))
    kind = KINDS[name]
    n = rng.randint(2, 4 + round(6 * level))
    columns = (kind.subject, kind.middle, kind.end)
    people = columns.index("person")
    # the asked person belongs to the split, and so does the pairing of the two others
    person = draw(rng, split, lambda r: _thing(r, "person", level), "hotpotqa name")
    pair = draw(
        rng,
        split,
        lambda r: tuple(_thing(r, columns[i], level) for i in range(3) if i != people),
        *("hotpotqa pair", name),
    )
    asked = [*pair[:people], person, *pair[people:]]
    things = list(zip(*(_different(rng, *args, n, level) for args in zip(columns, asked, strict=True)), strict=True))
    passages = [form.format(s=s, m=m, e=e) for s, m, e in things for form in (kind.first, kind.second)]
    rng.shuffle(passages)
    return kind, things, f"Passages: {' '.join(passages)}"


def _chain(kind: Kind, thing: tuple[str, str, str]) -> str:
    return f"{kind.first} {kind.second}".format(**dict(zip("sme", thing, strict=True)))


def _pool(pool: str, level: float) -> tuple[list[str], list[str]]:
    firsts, seconds = POOLS[pool]
    return firsts[: max(10, round(level * len(firsts)))], seconds[: max(10, round(level * len(seconds)))]


def _name(pool: str, *words: str) -> str:
    return " ".join(("The", *words) if pool == "novel" else words)


def _thing(rng: random.Random, pool: str, level: float) -> str:
    return _name(pool, *(rng.choice(words) for words in _pool(pool, level) if words))


def _different(rng: random.Random, pool: str, asked: str, n: int, level: float) -> list[str]:
    """n things of a pool, `asked` in front, with different first words and, where the pool has n, second words."""
    taken = asked.split()
    firsts, seconds = ([word for word in words if word not in taken] for words in _pool(pool, level))
    columns = [rng.sample(firsts, n - 1)]
    if seconds:
        columns.append(rng.sample(seconds, n - 1) if len(seconds) >= n - 1 else rng.choices(POOLS[pool][1], k=n - 1))
    return [asked, *(_name(pool, *words) for words in zip(*columns, strict=True))]
