"""Two-hop questions over short passages, with distractor passages of the same form."""

import random
from collections.abc import Callable

from evals.llada_tiny.problems.split import draw
from evals.llada_tiny.problems.words import FIRMS, INSTRUMENTS, MEN, NOVELS, PRODUCTS, RIVERS, SURNAMES, TOWNS, WOMEN

FIRST_NAMES = [name for pair in zip(WOMEN, MEN, strict=True) for name in pair]


def hotpotqa(rng: random.Random, split: str, level: float = 1.0) -> dict:
    """One question as a row without id and source. `level` below 1: fewer distractors and smaller pools."""
    n = rng.randint(2, 2 + round(8 * level))
    kind = rng.choice(KINDS)
    pools = {name: pool[: max(8, round(level * len(pool)))] for name, pool in POOLS.items()}
    people = _people(rng, split, n, pools)
    passages, question, chain, answer = kind(rng, split, people, pools)
    rng.shuffle(passages)
    return {
        "question": question,
        "context": "\n".join(passages),
        "answer": answer,
        "answers": [answer],
        "solution": f"{chain} The answer is {answer}.",
    }


POOLS = {
    "first": FIRST_NAMES,
    "last": SURNAMES,
    "town": TOWNS,
    "river": RIVERS,
    "firm": FIRMS,
    "novel": NOVELS,
    "instrument": INSTRUMENTS,
    "product": PRODUCTS,
}
Pools = dict[str, list[str]]
Built = tuple[list[str], str, str, str]  # passages, question, chain, answer


def _people(rng: random.Random, split: str, n: int, pools: Pools) -> list[str]:
    """n full names; the first, whom the question is about, belongs to the split."""
    first = draw(rng, split, lambda r: f"{r.choice(pools['first'])} {r.choice(pools['last'])}", "hotpotqa name")
    names = {first: None}
    while len(names) < n:
        names[f"{rng.choice(pools['first'])} {rng.choice(pools['last'])}"] = None
    return list(names)


def _pairing(
    rng: random.Random, split: str, kind: str, n: int, middles: list[str], ends: list[str]
) -> tuple[list[str], list[str]]:
    """n different middles and n different ends; the asked (middle, end) pairing belongs to the split."""
    n_middles, n_ends = min(n, len(middles)), min(n, len(ends))
    middle, end = draw(rng, split, lambda r: (r.choice(middles), r.choice(ends)), "hotpotqa pair", kind)
    rest = rng.sample([m for m in middles if m != middle], n_middles - 1)
    others = rng.sample([e for e in ends if e != end], n_ends - 1)
    return [middle, *rest], [end, *others]


def _two_hops(
    rng: random.Random,
    split: str,
    people: list[str],
    firsts: tuple[list[str], str],
    seconds: tuple[list[str], str],
    kind: str,
    forms: tuple[str, ...],
) -> Built:
    """people -> middles (stated by one of the first sentences), middles -> ends; `forms` ask for the end."""
    (middle_pool, first), (end_pool, second) = firsts, seconds
    middles, ends = _pairing(rng, split, kind, len(people), middle_pool, end_pool)
    passages = [first.format(p=p, m=m) for p, m in zip(people, middles, strict=True)]
    passages += [second.format(m=m, e=e) for m, e in zip(middles, ends, strict=True)]
    chain = f"{first.format(p=people[0], m=middles[0])} {second.format(m=middles[0], e=ends[0])}"
    return passages, rng.choice(forms).format(p=people[0]), chain, ends[0]


def firm_town(rng: random.Random, split: str, people: list[str], pools: Pools) -> Built:
    forms = ("In which town does {p} work?", "In which town is the place where {p} works?")
    return _two_hops(
        rng,
        split,
        people,
        (pools["firm"], "{p} works at the {m}."),
        (pools["town"], "The {m} is in {e}."),
        "firm town",
        forms,
    )


def firm_year(rng: random.Random, split: str, people: list[str], pools: Pools) -> Built:
    years = [str(year) for year in range(1800, 2000)]
    forms = ("In what year did the place where {p} works open?", "When did the workplace of {p} open?")
    return _two_hops(
        rng,
        split,
        people,
        (pools["firm"], "{p} works at the {m}."),
        (years, "The {m} opened in {e}."),
        "firm year",
        forms,
    )


def town_river(rng: random.Random, split: str, people: list[str], pools: Pools) -> Built:
    forms = ("Which river flows through the town where {p} lives?", "On which river is the home town of {p}?")
    return _two_hops(
        rng,
        split,
        people,
        (pools["town"], "{p} lives in {m}."),
        (pools["river"], "The town of {m} is on the {e}."),
        "town river",
        forms,
    )


def town_product(rng: random.Random, split: str, people: list[str], pools: Pools) -> Built:
    forms = ("What is the town where {p} was born known for?", "For which product is the birthplace of {p} known?")
    return _two_hops(
        rng,
        split,
        people,
        (pools["town"], "{p} was born in {m}."),
        (pools["product"], "{m} is known for its {e}."),
        "town product",
        forms,
    )


def _author(
    rng: random.Random, split: str, people: list[str], pools: Pools, about: str, sentence: str, ask: str
) -> Built:
    """Novel -> author -> what the author plays or where the author lives."""
    novel, end = draw(
        rng, split, lambda r: (r.choice(pools["novel"]), r.choice(pools[about])), "hotpotqa pair", "novel", about
    )
    novels = [novel, *rng.sample([n for n in pools["novel"] if n != novel], len(people) - 1)]
    ends = [end, *rng.sample([e for e in pools[about] if e != end], len(people) - 1)]
    passages = [f"{p} wrote {n}." for p, n in zip(people, novels, strict=True)]
    passages += [sentence.format(p=p, e=e) for p, e in zip(people, ends, strict=True)]
    chain = f"{people[0]} wrote {novels[0]}. {sentence.format(p=people[0], e=ends[0])}"
    return passages, ask.format(n=novel), chain, end


def author_plays(rng: random.Random, split: str, people: list[str], pools: Pools) -> Built:
    ask = rng.choice(("Which instrument does the author of {n} play?", "What does the person who wrote {n} play?"))
    return _author(rng, split, people, pools, "instrument", "{p} plays the {e}.", ask)


def author_town(rng: random.Random, split: str, people: list[str], pools: Pools) -> Built:
    ask = rng.choice(("In which town does the author of {n} live?", "Where does the person who wrote {n} live?"))
    return _author(rng, split, people, pools, "town", "{p} lives in {e}.", ask)


KINDS: tuple[Callable[[random.Random, str, list[str], Pools], Built], ...] = (
    firm_town,
    firm_year,
    town_river,
    town_product,
    author_plays,
    author_town,
)
