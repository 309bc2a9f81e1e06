"""Arithmetic word problems in several steps. A step of the solution restates its operands and does one operation."""

import random

from evals.llada_tiny.problems.split import draw
from evals.llada_tiny.problems.words import ACTIVITIES, CONTAINERS, GOODS, MEN, THINGS, WOMEN

HIGHEST = 150  # no intermediate result is above it; products stay within 9 * 30
FINALS = ("count", "share", "pack", "sell")


def gsm8k(rng: random.Random, split: str, level: float = 1.0) -> dict:
    """One word problem as a row without id and source. `level` below 1 keeps numbers and stories short."""
    family = rng.choices((_collection, _comparison, _shopping, _rate), (5, 3, 2, 2))[0]
    return family(rng, split, level)


def _people(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """n different people as (name, pronoun)."""
    everyone = [(name, "she") for name in WOMEN] + [(name, "he") for name in MEN]
    return rng.sample(everyone, n)


def _row(question: list[str], solution: list[str], answer: int) -> dict:
    text = " ".join([*solution, f"The answer is {answer}."])
    return {"question": " ".join(question), "answer": str(answer), "solution": text}


def _operand(rng: random.Random, level: float, low: int = 2) -> int:
    return rng.randint(low, 20 if rng.random() > level else 99)


def _collection(rng: random.Random, split: str, level: float) -> dict:
    """Someone has things, gets or loses some, and shares, packs, sells or counts what is left."""
    grouped, events, final = draw(
        rng,
        split,
        lambda r: (
            r.random() < 0.4,
            tuple(r.choice("+-") for _ in range(r.randint(1, 1 + round(2 * level)))),
            r.choice(FINALS),
        ),
        "gsm8k structure",
    )
    numbers = draw(
        rng, split, lambda r: _collection_numbers(r, grouped, events, final, level), "gsm8k", grouped, events, final
    )
    start, amounts, last = numbers
    things, (who, she) = draw(rng, split, lambda r: (r.choice(THINGS), _people(r, 1)[0]), "gsm8k pair")
    other = rng.choice([name for name in WOMEN + MEN if name != who])
    if grouped:
        holder = rng.choice(CONTAINERS)
        question = [f"{who} has {start[0]} {holder} with {start[1]} {things} in each."]
        total = start[0] * start[1]
        solution = [f"{who} starts with {start[0]} * {start[1]} = {total} {things}."]
    else:
        total = start[0]
        question = [rng.choice(("{} has {} {}.", "{} starts with {} {}.", "{} owns {} {}.")).format(who, total, things)]
        solution = [f"{who} starts with {total} {things}."]
    for sign, k in zip(events, amounts, strict=True):
        text, result = _event(rng, sign, k, total, she.capitalize(), things, other)
        question.append(text)
        verb = "Adding" if sign == "+" else "Taking away"
        solution.append(f"{verb} {k} gives {total} {sign} {k} = {result} {things}.")
        total = result
    return _finish(question, solution, total, final, last, who, she, things, rng)


def _collection_numbers(
    rng: random.Random, grouped: bool, events: tuple[str, ...], final: str, level: float
) -> tuple | None:
    """(start, amounts, divisor or price); None where a total leaves 1..HIGHEST or the end does not divide."""
    high = 6 if final == "sell" else 20 if rng.random() > level else rng.choice((20, 60, 99))
    if grouped:
        start = (rng.randint(2, min(high, 9)), rng.randint(2, min(high, 15)))
    else:
        start = (rng.randint(5, max(high, 15)),)
    total = start[0] * start[-1] if grouped else start[0]
    amounts = []
    for sign in events[:-1]:
        amounts.append(rng.randint(2, high))
        total += amounts[-1] if sign == "+" else -amounts[-1]
        if not 1 <= total <= HIGHEST:
            return None
    k, plus = rng.randint(2, 9), events[-1] == "+"
    if final in ("count", "sell"):
        end = total + rng.randint(2, high) * (1 if plus else -1)
    else:
        end = k * rng.randint(2, 15)
    if final == "sell" and end > 30:
        return None
    change = end - total if plus else total - end
    if not (1 <= change <= 99 and 1 <= end <= HIGHEST):
        return None
    return start, (*amounts, change), 0 if final == "count" else k


def _event(rng: random.Random, sign: str, k: int, total: int, she: str, things: str, other: str) -> tuple[str, int]:
    if sign == "+":
        forms = ("{she} buys {k} more {things}.", "{she} finds {k} more {things}.", "{she} gets {k} {things} from {o}.")
        return rng.choice(forms).format(she=she, k=k, things=things, o=other), total + k
    forms = ("{she} gives {k} {things} to {o}.", "{she} loses {k} {things}.", "{she} gives away {k} of the {things}.")
    return rng.choice(forms).format(she=she, k=k, things=things, o=other), total - k


def _finish(
    question: list[str],
    solution: list[str],
    total: int,
    final: str,
    k: int,
    who: str,
    she: str,
    things: str,
    rng: random.Random,
) -> dict:
    if final == "share":
        question.append(f"Then {she} shares all the {things} equally among {k} friends.")
        question.append(f"How many {things} does each friend get?")
        solution.append(f"Each friend gets {total} / {k} = {total // k} {things}.")
        return _row(question, solution, total // k)
    if final == "pack":
        question.append(f"Then {she} packs all the {things} into bags of {k}.")
        question.append(rng.choice(("How many bags does {} fill?", "How many bags are there?")).format(who))
        solution.append(f"{who} fills {total} / {k} = {total // k} bags.")
        return _row(question, solution, total // k)
    if final == "sell":
        question.append(f"Then {she} sells all the {things} for {k} dollars each.")
        question.append(f"How many dollars does {who} get?")
        solution.append(f"{who} gets {total} * {k} = {total * k} dollars.")
        return _row(question, solution, total * k)
    question.append(
        rng.choice(("How many {} does {} have now?", "How many {} does {} have in the end?")).format(things, who)
    )
    return _row(question, solution, total)


RELATIONS = ("more", "fewer", "times")


def _comparison(rng: random.Random, split: str, level: float) -> dict:
    """Two or three people whose counts are given by comparison with the one before; one count or the sum is asked."""
    relations, together = draw(
        rng,
        split,
        lambda r: (tuple(r.choice(RELATIONS) for _ in range(r.randint(1, 1 + round(level)))), r.random() < 0.6),
        "gsm8k relations",
    )
    first, amounts = draw(rng, split, lambda r: _comparison_numbers(r, relations, level), "gsm8k", relations, together)
    things, owner = draw(rng, split, lambda r: (r.choice(THINGS), _people(r, 1)[0]), "gsm8k pair")
    people = [owner, *(person for person in _people(rng, len(relations) + 1) if person != owner)]
    counts = [first]
    question = [f"{people[0][0]} has {first} {things}."]
    solution = list(question)
    for relation, k, (name, _), (before, _) in zip(relations, amounts, people[1:], people, strict=False):
        x = counts[-1]
        if relation == "times":
            question.append(f"{name} has {k} times as many {things} as {before}.")
            counts.append(x * k)
            solution.append(f"{name} has {x} * {k} = {x * k} {things}.")
        else:
            sign = "+" if relation == "more" else "-"
            question.append(f"{name} has {k} {relation} {things} than {before}.")
            counts.append(x + k if sign == "+" else x - k)
            solution.append(f"{name} has {x} {sign} {k} = {counts[-1]} {things}.")
    if not together:
        question.append(f"How many {things} does {people[len(relations)][0]} have?")
        return _row(question, solution, counts[-1])
    question.append(f"How many {things} do they have together?")
    total = counts[0]
    for count in counts[1:]:
        solution.append(f"Together that is {total} + {count} = {total + count} {things}.")
        total += count
    return _row(question, solution, total)


def _comparison_numbers(rng: random.Random, relations: tuple[str, ...], level: float) -> tuple | None:
    first = x = _operand(rng, level, 3) if relations[0] != "times" else rng.randint(3, 20)
    amounts = []
    for relation in relations:
        if relation == "times":
            amounts.append(rng.randint(2, 5))
            if x > 20:
                return None
            x *= amounts[-1]
        else:
            amounts.append(_operand(rng, level))
            x += amounts[-1] if relation == "more" else -amounts[-1]
        if not 1 <= x <= HIGHEST:
            return None
    return first, tuple(amounts)


def _shopping(rng: random.Random, split: str, level: float) -> dict:
    """Two kinds of goods at a price each; what they cost, or the change."""
    change = rng.random() < 0.5 * level
    a, p, b, q, paid = draw(
        rng,
        split,
        lambda r: (
            r.randint(2, 9),
            r.randint(2, 12),
            r.randint(2, 9),
            r.randint(2, 12),
            r.randint(1, 40) if change else 0,
        ),
        "gsm8k shopping",
        change,
    )
    one, (who, she) = draw(rng, split, lambda r: (r.choice(GOODS), _people(r, 1)[0]), "gsm8k pair")
    two = rng.choice([goods for goods in GOODS if goods != one])
    x, y = a * p, b * q
    question = [f"{who} buys {a} {one} for {p} dollars each and {b} {two} for {q} dollars each."]
    solution = [
        f"The {one} cost {a} * {p} = {x} dollars.",
        f"The {two} cost {b} * {q} = {y} dollars.",
        f"In all they cost {x} + {y} = {x + y} dollars.",
    ]
    if not change:
        question.append(
            rng.choice(("How many dollars does {} spend?", "How many dollars does {} pay in all?")).format(who)
        )
        return _row(question, solution, x + y)
    paid += x + y
    question.append(f"{she.capitalize()} pays with {paid} dollars. How many dollars does {who} get back?")
    solution.append(f"The change is {paid} - {x + y} = {paid - x - y} dollars.")
    return _row(question, solution, paid - x - y)


def _rate(rng: random.Random, split: str, level: float) -> dict:
    """So much a day for some days; how much is done after one more day, or how much of the whole is left."""
    left, bonus = rng.random() < 0.6, rng.random() < 0.5 * level
    p, d, extra, rest = draw(
        rng,
        split,
        lambda r: (
            r.randint(2, 15),
            r.randint(2, 9),
            r.randint(2, 30) if bonus else 0,
            r.randint(2, 60) if left else 0,
        ),
        "gsm8k rate",
    )
    activity, (who, she) = draw(rng, split, lambda r: (r.choice(ACTIVITIES), _people(r, 1)[0]), "gsm8k pair")
    verb, does, unit, whole = activity
    total = p * d
    question = [f"{who} {does} {p} {unit} a day for {d} days."]
    solution = [f"In {d} days {who} {does} {d} * {p} = {total} {unit}."]
    if bonus:
        question.append(f"On the next day {she} {does} {extra} {unit}.")
        solution.append(f"With the next day that is {total} + {extra} = {total + extra} {unit}.")
        total += extra
    if not left:
        question.append(f"How many {unit} does {who} {verb} in all?")
        return _row(question, solution, total)
    n = total + rest
    question.insert(0, f"{who} has {whole.format(n=n)} to {verb}.")
    question.append(f"How many {unit} are left?")
    solution.append(f"Now {n} - {total} = {rest} {unit} are left.")
    return _row(question, solution, rest)
