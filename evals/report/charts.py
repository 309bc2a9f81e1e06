"""The geometry of the page's charts; page.html.jinja draws it."""

from dataclasses import dataclass
from itertools import pairwise

from evals.report.labels import SIZE, Box, Label, apart, place, shortened, width_of
from evals.report.scales import Scale, around


@dataclass(frozen=True)
class Point:
    """A configuration in the scatter: its number in the table, name, tokens/s, accuracy and its interval (0 to 1)."""

    number: int
    name: str
    speed: float
    accuracy: float
    interval: tuple[float, float] | None
    frontier: bool


@dataclass(frozen=True)
class Mark:
    """A point where it is drawn, and its true place if that differs; on the frontier, band is its interval, (top,
    height)."""

    point: Point
    x: float
    y: float
    band: tuple[float, float] | None
    label: Label | None
    moved_from: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scatter:
    """All in pixels of a drawing of width x height; area is the plot without its axes' texts."""

    width: int
    height: int
    area: Box
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[Mark]
    frontier: list[tuple[float, float]]
    logarithmic: bool


def scatter(points: list[Point], width: int, height: int) -> Scatter:
    """Accuracy over tokens/s. The speed axis is logarithmic if the fastest is over 5 times the slowest."""
    area = Box(40, 26, width - 8, height - 44)
    speeds = [p.speed for p in points]
    shares = [a for p in points for a in (p.accuracy, *(p.interval or ()))]
    logarithmic = 5 * min(speeds) < max(speeds) < 1e9 * min(speeds)
    limits = around(speeds, logarithmic, room=0.02 * max(speeds) or 1.0)
    x = Scale(*limits, area.left + 12, area.right - 12, logarithmic)
    y = Scale(*around(shares, False, room=0.02, most=1.0), area.bottom - 10, area.top + 10)
    places = [(x(p.speed), y(p.accuracy)) for p in points]
    marks_at = apart(places, [p.frontier for p in points], area)
    corners = _staircase([at for at, p in zip(places, points, strict=True) if p.frontier], area)
    lines = [Box(min(a, c), min(b, d), max(a, c) + 1, max(b, d) + 1) for (a, b), (c, d) in pairwise(corners)]
    named, numbers = [shortened(p.name, 240) for p in points], [str(p.number) for p in points]
    frontier = [p.frontier for p in points]
    all_names = [list(pair) for pair in zip(named, numbers, strict=True)]
    its_names = [pair if on else pair[1:] for pair, on in zip(all_names, frontier, strict=True)]
    choices = [its_names, [[number] for number in numbers]]
    if sum(map(width_of, named)) < 3 * width:
        choices.insert(0, all_names)
    labels = place(marks_at, choices, frontier, area, lines)
    bands = [_band(y(p.interval[0]), y(p.interval[1])) if p.interval and p.frontier else None for p in points]
    moved = [None if at == own else own for at, own in zip(marks_at, places, strict=True)]
    drawn = zip(points, marks_at, bands, labels, moved, strict=True)
    marks = [Mark(p, *at, band, label, own) for p, at, band, label, own in drawn]
    return Scatter(
        width=width,
        height=height,
        area=area,
        x_ticks=_ticks(x, area),
        y_ticks=[(y(v), f"{100 * v:.4g}") for v in y.ticks(7)],
        marks=marks,
        frontier=corners,
        logarithmic=logarithmic,
    )


def _band(bottom: float, top: float) -> tuple[float, float]:
    return top, round(bottom - top, 1)


def _ticks(x: Scale, area: Box) -> list[tuple[float, str]]:
    """The ticks inside the scale, as many as do not touch."""
    for most in range(8, 0, -1):
        ticks = [(x(v), f"{v:,.10g}") for v in x.ticks(most)]
        boxes = [(at - width_of(text) / 2, at + width_of(text) / 2) for at, text in ticks]
        apart = all(a[1] + 6 <= b[0] for a, b in pairwise(boxes))
        if apart and all(a >= 0 and b <= area.right + 8 for a, b in boxes):
            return ticks
    return []


def _staircase(places: list[tuple[float, float]], area: Box) -> list[tuple[float, float]]:
    """The best accuracy at each speed or above: level up to a mark, then down to the next."""
    corners = []
    left = area.left
    for x, y in sorted(places):
        corners += [(left, y), (x, y)]
        left = x
    return [*corners, (left, area.bottom)]


@dataclass(frozen=True)
class Step:
    """One run in a history: x in percent of the chart's width, y in pixels (None: not measured then)."""

    x: float
    y: float | None
    value: float | None


@dataclass(frozen=True)
class History:
    """One configuration's tokens/s, run after run; the newest's text gives its change from the one before.

    base is the axis's y, lines join neighbouring runs. values are texts at (x in percent, y, anchor), commits at (x,
    anchor) under the axis.
    """

    height: int
    base: float
    radius: float
    steps: list[Step]
    lines: list[tuple[Step, Step]]
    values: list[tuple[float, float, str, str]]
    commits: list[tuple[float, str, str]]


NARROWEST = 260  # the minimum width in pixels of a panel in style.css
HISTORY_HEIGHT = 116  # of a history, in pixels


def history(values: list[float | None], commits: list[str]) -> History:
    """values: tokens/s, oldest first, at least two of them known; commits: their labels. The y axis begins at 0."""
    known = [v for v in values if v is not None]
    base = HISTORY_HEIGHT - 22.0
    y = Scale(0.0, max(known) or 1.0, base, 24.0)
    at = [round(3 + 94 * i / (len(values) - 1), 2) for i in range(len(values))]
    steps = [Step(x, None if v is None else y(v), v) for x, v in zip(at, values, strict=True)]
    drawn = [s for s in steps if s.y is not None]
    lines = [(a, b) for a, b in pairwise(steps) if a.y is not None and b.y is not None]
    change = _change(*values[-2:])
    ends = [(drawn[0], drawn[1], ""), (drawn[-1], drawn[-2], change * (drawn[-1] is steps[-1]))]
    texts = [(s.x, _beside(s, near, base), _anchor(s.x), f"{s.value:,.1f}{more}") for s, near, more in ends]
    (first, *_, oldest), (last, *_, newest) = texts
    return History(
        height=HISTORY_HEIGHT,
        base=base,
        radius=3.0 if len(values) <= 12 else 2.0,
        steps=steps,
        lines=lines,
        values=texts[1:] if _overlap(first, oldest, last, newest) else texts,
        commits=_apart(at, commits),
    )


def _beside(end: Step, neighbour: Step, base: float) -> float:
    """Where the text of an end of the line goes: above it, or below if the line comes down to it."""
    return end.y + 17 if neighbour.y < end.y - 3 and end.y + 21 < base else end.y - 9


def _change(before: float | None, now: float | None) -> str:
    return f" ({100 * (now / before - 1):+.1f} %)".replace("-", "−") if before and now is not None else ""


def _apart(at: list[float], texts: list[str]) -> list[tuple[float, str, str]]:
    """The newest text, the oldest, and those of the others that fit between."""
    chosen: list[int] = []
    for i in [len(at) - 1, 0, *range(len(at) - 2, 0, -1)]:
        if all(not _overlap(at[i], texts[i], at[j], texts[j]) for j in chosen):
            chosen.append(i)
    return [(at[i], _anchor(at[i]), texts[i]) for i in sorted(chosen)]


def _anchor(x: float) -> str:
    return "start" if x < 15 else "end" if x > 85 else "middle"


def _overlap(x: float, text: str, other_x: float, other: str) -> bool:
    def span(at: float, text: str) -> tuple[float, float]:
        shift = {"start": 0.0, "middle": -0.5, "end": -1.0}[_anchor(at)]
        left = at / 100 * NARROWEST + shift * width_of(text)
        return left, left + width_of(text)

    (a, b), (c, d) = span(x, text), span(other_x, other)
    return a < d + SIZE and c < b + SIZE
