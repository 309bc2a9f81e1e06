"""Labels beside the marks of a scatter: each as near as possible without covering a mark or another label."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

SIZE = 12  # of a label's font, in pixels
HEIGHT = SIZE + 3
ROUNDS = 3
MARK = 7  # half a mark's width, with some margin


# Two marks nearer than this in both directions hide each other.
_COVERED = 6


class Box(NamedTuple):
    """In pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)

    def within(self, other: "Box") -> bool:
        inside = self.left >= other.left and self.right <= other.right
        return inside and self.top >= other.top and self.bottom <= other.bottom


class Boxes:
    """Boxes, by the squares of a grid in which they lie: of hundreds only a few are near another one."""

    SQUARE = 24  # pixels

    def __init__(self, boxes: Iterable[Box] = ()) -> None:
        self._near: dict[tuple[int, int], list[Box]] = defaultdict(list)
        self.add(boxes)

    def add(self, boxes: Iterable[Box]) -> None:
        for box in boxes:
            for square in self._squares(box):
                self._near[square].append(box)

    def meets(self, box: Box, but: Box | None = None) -> bool:
        """Whether any box except `but` meets `box`."""
        near = (self._near[square] for square in self._squares(box) if square in self._near)
        return any(other is not but and box.meets(other) for others in near for other in others)

    def _squares(self, box: Box) -> Iterator[tuple[int, int]]:
        columns = range(int(box.left // self.SQUARE), int(box.right // self.SQUARE) + 1)
        rows = range(int(box.top // self.SQUARE), int(box.bottom // self.SQUARE) + 1)
        return product(columns, rows)


class Label(NamedTuple):
    """Text whose box begins at left and whose middle is at y; `leader` is the line to its mark, (x, y1, y2)."""

    text: str
    left: float
    y: float
    leader: tuple[float, float, float] | None


def width_of(text: str) -> float:
    """An upper bound in pixels: no widely used sans-serif system font is wider than DejaVu Sans, the source of these
    widths."""
    return SIZE * sum(map(_em, text))


def _em(c: str) -> float:
    if c in " !'(),-./:;I[]fijlrt|":
        return 0.42
    if c in "%@MWmw" or unicodedata.east_asian_width(c) in "WF":
        return 1.05
    return 0.64 if c.isascii() and not c.isupper() and c not in '"#$&+<=>^~' else 0.9


def shortened(text: str, pixels: float) -> str:
    """The text, cut if it would be wider."""
    if width_of(text) <= pixels:
        return text
    end = next(i for i in range(1, len(text) + 1) if width_of(text[:i] + "…") > pixels)
    return text[: end - 1] + "…"


def apart(marks: list[tuple[float, float]], first: list[bool], area: Box) -> list[tuple[float, float]]:
    """Where the marks are drawn: in their places, except beside marks that they would cover; the marks of `first`
    choose first. One that finds no free place near its own stays there."""
    drawn: dict[int, tuple[float, float]] = {}
    steps = sorted(product(range(-3, 4), repeat=2), key=lambda step: (step[0] ** 2 + step[1] ** 2, abs(step[1])))
    for i in sorted(range(len(marks)), key=lambda i: not first[i]):
        x, y = marks[i]
        near = [other for other in drawn.values() if abs(other[0] - x) < 60 and abs(other[1] - y) < 60]
        tried = [(round(x + 2 * MARK * right, 1), round(y + 2 * MARK * down, 1)) for right, down in steps]
        inside = [at for at in tried if _mark(*at).within(area)]
        free = (at for at in inside if all(max(abs(at[0] - a), abs(at[1] - b)) >= _COVERED for a, b in near))
        covered = any(max(abs(x - a), abs(y - b)) < _COVERED for a, b in near)
        drawn[i] = next(free, marks[i]) if covered else marks[i]
    return [drawn[i] for i in range(len(marks))]


def _mark(x: float, y: float) -> Box:
    return Box(x - MARK, y - MARK, x + MARK, y + MARK)


def place(
    marks: list[tuple[float, float]], choices: list[list[list[str]]], first: list[bool], area: Box, lines: list[Box]
) -> list[Label | None]:
    """A label for each mark, None if there is no room. Texts stay off the lines; leaders may cross them.

    Each of the choices gives every mark its texts, of which the first that fits is taken; the marks of `first` choose
    first. The first choice that labels every mark wins, else the one that labels most.
    """
    best: list[Label | None] = [None] * len(marks)
    drawn = Boxes(lines)
    for texts in choices:
        for outwards in (1, -1):
            urgent = [0 if is_first else 1 for is_first in first]
            for _ in range(ROUNDS):
                order = sorted(range(len(marks)), key=lambda i: (urgent[i], -outwards * marks[i][0]))
                found = _place(marks, texts, order, area, drawn, outwards)
                if found.count(None) < best.count(None):
                    best = found
                if None not in best:
                    return best
                # squeaky wheels first (Joslin and Clements, JAIR 10, 1999)
                urgent = [u - (label is None) for u, label in zip(urgent, found, strict=True)]
    return best


def _place(
    marks: list[tuple[float, float]],
    texts: list[list[str]],
    order: list[int],
    area: Box,
    lines: Boxes,
    outwards: int,
) -> list[Label | None]:
    taken = Boxes(_mark(x, y) for x, y in marks)
    # without a leader, a name above or under another mark would seem to be that mark's
    around = [Box(x - MARK, y - MARK - HEIGHT, x + MARK, y + MARK + HEIGHT) for x, y in marks]
    foreign = Boxes(around)
    placed: list[Label | None] = [None] * len(marks)
    for i in order:
        for name, (left, y), boxes in _candidates(*marks[i], texts[i], outwards):
            text, *leader = boxes
            if not text.within(area) or any(map(taken.meets, boxes)) or lines.meets(text):
                continue
            if leader or not foreign.meets(text, but=around[i]):
                line = (marks[i][0], round(leader[0].top, 1), round(leader[0].bottom, 1)) if leader else None
                placed[i] = Label(name, round(left, 1), round(y, 1), line)
                taken.add(boxes)
                break
    return placed


def _candidates(
    x: float, y: float, texts: list[str], outwards: int
) -> Iterator[tuple[str, tuple[float, float], list[Box]]]:
    """Beside the mark, above and under it, then away from it on a leader: text, left and middle, its box, the leader's.

    If marks are taken from right to left, outwards is 1: texts begin at their leaders, which leaves room for leaders
    further left. -1 is the mirror image.
    """
    for text in texts:
        width = width_of(text)
        beside = [(x + MARK + 2, y), (x - MARK - 2 - width, y)]
        close = [(x - width / 2, y + side * (MARK + HEIGHT / 2)) for side in (-1, 1)]
        for left, middle in beside + close:
            yield text, (left, middle), [_box(left, middle, width)]
        begins, ends = (x - 1, x + 1 - width)[::outwards]
        for side, left in [(-1, begins), (1, ends), (-1, ends), (1, begins)]:
            for level in range(8):
                middle = y + side * (MARK + HEIGHT * (level + 1))
                begin, end = sorted((y + side * MARK, middle - side * HEIGHT / 2))
                yield text, (left, middle), [_box(left, middle, width), Box(x - 1, begin, x + 1, end)]


def _box(left: float, middle: float, width: float) -> Box:
    return Box(left, middle - HEIGHT / 2, left + width, middle + HEIGHT / 2)
