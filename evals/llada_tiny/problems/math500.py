"""Short mathematics problems with a worked solution; the answer stands in a box."""

import math
import random
from collections.abc import Callable

from evals.llada_tiny.problems.split import draw, split_of

# Each kind: numbers from (rng, level), or None where they do not fit; then (question forms, steps, answer).
Problem = tuple[tuple[str, ...], list[str], int]


def math500(rng: random.Random, split: str, level: float = 1.0) -> dict:
    """One problem as a row without id and source. `level` below 1 leaves the harder kinds out."""
    names = list(KINDS)[: 4 + round(level * (len(KINDS) - 4))]
    kind = rng.choice(names)
    numbers, build = KINDS[kind]
    drawn = draw(rng, split, numbers, "math500", kind)
    while split != "train" and any(split_of("math500", kind, other) != split for other in _same_question(kind, drawn)):
        drawn = draw(rng, split, numbers, "math500", kind)
    questions, steps, answer = build(*drawn)
    solution = " ".join([*steps, f"The answer is \\boxed{{{answer}}}."])
    return {"question": rng.choice(questions), "answer": str(answer), "solution": solution}


def _same_question(kind: str, drawn: tuple) -> list[tuple]:
    """The other number tuples that make the same question, so that none of them may be trained on."""
    if kind == "expression" and drawn[4] == "-":
        a, b, c, d, _ = drawn
        return [(c, d, a, b, "-")]
    if kind == "linear" and drawn[3] == "-":
        a, b, x, _ = drawn
        asked = _positive(a, b, x)
        return [(a, other, x, "-") for other in range(1, 61) if other != b and _positive(a, other, x) == asked]
    return []


def _positive(a: int, b: int, x: int) -> int:
    """b - k * a with the smallest k >= 0 for which a * x minus it is at least 1."""
    return b - a * max(0, -((a * x - b - 1) // a))


def _two_products(r: random.Random) -> tuple:
    return r.randint(2, 9), r.randint(2, 15), r.randint(2, 9), r.randint(2, 15), r.choice("+-")


def _expression(a: int, b: int, c: int, d: int, sign: str) -> Problem:
    if sign == "-" and a * b < c * d:
        a, b, c, d = c, d, a, b
    x, y = a * b, c * d
    z = x + y if sign == "+" else x - y
    text = f"{a} * {b} {sign} {c} * {d}"
    steps = [f"First, {a} * {b} = {x}.", f"Next, {c} * {d} = {y}.", f"Then {x} {sign} {y} = {z}."]
    return (f"What is {text}?", f"Compute {text}.", f"Find the value of {text}."), steps, z


def _linear_numbers(r: random.Random) -> tuple:
    return r.randint(2, 9), r.randint(1, 60), r.randint(2, 15), r.choice("+-")


def _linear(a: int, b: int, x: int, sign: str) -> Problem:
    b = b if sign == "+" else _positive(a, b, x)
    right = a * x + b if sign == "+" else a * x - b
    other = "-" if sign == "+" else "+"
    move = f"Subtract {b} from" if sign == "+" else f"Add {b} to"
    equation = f"{a}x {sign} {b} = {right}"
    steps = [
        f"{move} both sides: {right} {other} {b} = {a * x}, so {a}x = {a * x}.",
        f"Divide: x = {a * x} / {a} = {x}.",
    ]
    return (f"Solve for x: {equation}.", f"If {equation}, what is x?", f"Find x such that {equation}."), steps, x


def _remainder_numbers(r: random.Random) -> tuple:
    return r.randint(15, 150), r.randint(3, 12)


def _remainder(n: int, d: int) -> Problem:
    q = n // d
    steps = [f"The largest multiple of {d} up to {n} is {q} * {d} = {q * d}.", f"The rest is {n} - {q * d} = {n % d}."]
    forms = (
        f"What is the remainder when {n} is divided by {d}?",
        f"Find the remainder of {n} divided by {d}.",
        f"Compute {n} mod {d}.",
    )
    return forms, steps, n % d


def _sequence_numbers(r: random.Random) -> tuple:
    return r.randint(1, 50), r.randint(2, 12), r.randint(5, 15)


def _ordinal(n: int) -> str:
    return f"{n}" + ("th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th"))


def _sequence(a: int, d: int, n: int) -> Problem:
    shown = ", ".join(str(a + i * d) for i in range(3))
    steps = [
        f"The common difference is {a + d} - {a} = {d}.",
        f"To reach the {_ordinal(n)} term we add it {n} - 1 = {n - 1} times.",
        f"That is {n - 1} * {d} = {(n - 1) * d}.",
        f"Then {a} + {(n - 1) * d} = {a + (n - 1) * d}.",
    ]
    forms = (
        f"What is the {_ordinal(n)} term of the arithmetic sequence {shown}, ...?",
        f"An arithmetic sequence begins {shown}. Find its {_ordinal(n)} term.",
    )
    return forms, steps, a + (n - 1) * d


def _gcd_numbers(r: random.Random) -> tuple | None:
    g = r.randint(1, 15)
    a, b = g * r.randint(2, 12), g * r.randint(2, 12)
    return (a, b) if b < a <= 99 and a % b else None


def _euclid(a: int, b: int) -> list[str]:
    steps = []
    while b:
        steps.append(f"{a} mod {b} = {a % b}")
        a, b = b, a % b
    return steps


def _gcd(a: int, b: int) -> Problem:
    g = math.gcd(a, b)
    steps = [f"By Euclid, {', '.join(_euclid(a, b))}.", f"The last divisor is {g}."]
    forms = (
        f"What is the greatest common divisor of {a} and {b}?",
        f"Find the greatest common factor of {b} and {a}.",
        f"Compute gcd({a}, {b}).",
    )
    return forms, steps, g


def _lcm_numbers(r: random.Random) -> tuple | None:
    a, b = r.randint(4, 30), r.randint(3, 20)
    return (a, b) if b < a and a % b and math.lcm(a, b) <= 180 else None


def _lcm(a: int, b: int) -> Problem:
    g = math.gcd(a, b)
    steps = [
        f"By Euclid, {', '.join(_euclid(a, b))}, so the greatest common divisor is {g}.",
        f"Then {b} / {g} = {b // g}.",
        f"Finally {a} * {b // g} = {a * b // g}.",
    ]
    forms = (f"What is the least common multiple of {a} and {b}?", f"Find the least common multiple of {b} and {a}.")
    return forms, steps, a * b // g


def _percent_numbers(r: random.Random) -> tuple:
    return r.randint(1, 9) * 10, r.randint(2, 20) * 10


def _percent(p: int, n: int) -> Problem:
    tenth = n // 10
    steps = [
        f"10% of {n} is {n} / 10 = {tenth}.",
        f"{p}% is {p // 10} times as much: {p // 10} * {tenth} = {p // 10 * tenth}.",
    ]
    return (f"What is {p}% of {n}?", f"Find {p} percent of {n}.", f"Compute {p}% of {n}."), steps, p // 10 * tenth


def _system_numbers(r: random.Random) -> tuple | None:
    x, y = r.randint(2, 40), r.randint(1, 39)
    return (x, y) if y < x else None


def _system(x: int, y: int) -> Problem:
    s, d = x + y, x - y
    steps = [
        f"Adding the equations gives 2x = {s} + {d} = {s + d}.",
        f"So x = {s + d} / 2 = {x}.",
        f"Then y = {s} - {x} = {y}.",
    ]
    forms = (f"If x + y = {s} and x - y = {d}, what is y?", f"Solve x + y = {s}, x - y = {d} for y.")
    return forms, steps, y


def _mean_numbers(r: random.Random) -> tuple | None:
    values = tuple(r.randint(2, 50) for _ in range(3))
    return values if sum(values) % 3 == 0 else None


def _mean(a: int, b: int, c: int) -> Problem:
    s = a + b + c
    steps = [f"First, {a} + {b} = {a + b}.", f"Next, {a + b} + {c} = {s}.", f"Then {s} / 3 = {s // 3}."]
    return (f"What is the average of {a}, {b} and {c}?", f"Find the mean of {a}, {b} and {c}."), steps, s // 3


def _rectangle_numbers(r: random.Random) -> tuple | None:
    w, h, perimeter = r.randint(2, 9), r.randint(2, 20), r.random() < 0.5
    return (w, h, perimeter) if w < h else None


def _rectangle(w: int, h: int, perimeter: bool) -> Problem:
    sides = f"sides {w} and {h}"
    if perimeter:
        steps = [f"Two sides make {w} + {h} = {w + h}.", f"The perimeter is 2 * {w + h} = {2 * (w + h)}."]
        return (
            (f"What is the perimeter of a rectangle with {sides}?", f"A rectangle has {sides}. Find its perimeter."),
            steps,
            2 * (w + h),
        )
    steps = [f"The area is the product of the sides, {w} * {h} = {w * h}."]
    return (f"What is the area of a rectangle with {sides}?", f"A rectangle has {sides}. Find its area."), steps, w * h


def _power_numbers(r: random.Random) -> tuple | None:
    a, n, m = r.randint(2, 12), r.randint(3, 5), r.randint(5, 15)
    return (a, n, m) if math.gcd(a, m) == 1 else None


def _power(a: int, n: int, m: int) -> Problem:
    value = a % m
    steps = [f"We reduce after each product; start with {value}."]
    for k in range(2, n + 1):
        steps.append(f"Power {k}: {value} * {a} = {value * a}, rest {value * a % m}.")
        value = value * a % m
    forms = (f"What is the remainder when {a}^{n} is divided by {m}?", f"Compute {a}^{n} mod {m}.")
    return forms, steps, value


KINDS: dict[str, tuple[Callable[[random.Random], tuple | None], Callable[..., Problem]]] = {
    "expression": (_two_products, _expression),
    "linear": (_linear_numbers, _linear),
    "remainder": (_remainder_numbers, _remainder),
    "percent": (_percent_numbers, _percent),
    "rectangle": (_rectangle_numbers, _rectangle),
    "mean": (_mean_numbers, _mean),
    "sequence": (_sequence_numbers, _sequence),
    "gcd": (_gcd_numbers, _gcd),
    "system": (_system_numbers, _system),
    "lcm": (_lcm_numbers, _lcm),
    "power": (_power_numbers, _power),
}
