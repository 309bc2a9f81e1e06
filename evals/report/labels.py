"""Labels beside the marks of a scatter: each as near as it fits without covering a mark or another label."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

SIZE = 12  # of a label's font, in pixels
HEIGHT = SIZE + 3
ROUNDS = 3
MARK = 7  # half a mark's width, with some room


@dataclass(frozen=True)
class Box:
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


@dataclass(frozen=True)
class Label:
    """Text whose box begins at left and whose middle is at y; `leader` is the line to its mark, (x, y1, y2)."""

    text: str
    left: float
    y: float
    leader: tuple[float, float, float] | None


def width_of(text: str) -> float:
    """In pixels, at most: no system's sans-serif face in wide use is wider than DejaVu Sans, from which these are."""
    return SIZE * sum(map(_em, text))


def _em(c: str) -> float:
    if c in " !'(),-./:;I[]fijlrt|":
        return 0.42
    if c in "%@MWmw" or unicodedata.east_asian_width(c) in "WF":
        return 1.05
    return 0.64 if c.isascii() and not c.isupper() and c not in '"#$&+<=>^~' else 0.9


def shortened(text: str, pixels: float) -> str:
    """The text, cut where it would be wider."""
    if width_of(text) <= pixels:
        return text
    end = next(i for i in range(1, len(text) + 1) if width_of(text[:i] + "…") > pixels)
    return text[: end - 1] + "…"


def place(
    marks: list[tuple[float, float]], choices: list[list[list[str]]], first: list[bool], area: Box, lines: list[Box]
) -> list[Label | None]:
    """A label for each mark, None where there is no room. Texts stay off the lines; leaders may cross them.

    Each of the choices gives every mark its texts, of which the first that fits is taken; the marks of `first` choose
    first. The first choice that labels every mark wins, else the one that labels most.
    """
    best: list[Label | None] = [None] * len(marks)
    for texts in choices:
        for outwards in (1, -1):
            urgent = [0 if is_first else 1 for is_first in first]
            for _ in range(ROUNDS):
                order = sorted(range(len(marks)), key=lambda i: (urgent[i], -outwards * marks[i][0]))
                found = _place(marks, texts, order, area, lines, outwards)
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
    lines: list[Box],
    outwards: int,
) -> list[Label | None]:
    taken = [Box(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in marks]
    # a name without a leader, above or under another mark, would seem to be that mark's
    around = [Box(x - MARK, y - MARK - HEIGHT, x + MARK, y + MARK + HEIGHT) for x, y in marks]
    placed: list[Label | None] = [None] * len(marks)
    for i in order:
        others = around[:i] + around[i + 1 :]
        for label, boxes in _candidates(*marks[i], texts[i], outwards):
            text, *leader = boxes
            free = text.within(area) and not any(box.meets(other) for box in boxes for other in taken)
            unclear = not leader and any(text.meets(other) for other in others)
            if free and not unclear and not any(text.meets(line) for line in lines):
                placed[i] = label
                taken += boxes
                break
    return placed


def _candidates(x: float, y: float, texts: list[str], outwards: int) -> Iterator[tuple[Label, list[Box]]]:
    """Beside the mark, above and under it, then away from it on a leader: the text's box, and the leader's.

    Where marks are taken from right to left, outwards is 1: texts that begin at their leaders leave leaders further
    left their way. -1 is the mirror image.
    """
    for text in texts:
        width = width_of(text)
        beside = [(x + MARK + 2, y), (x - MARK - 2 - width, y)]
        close = [(x - width / 2, y + side * (MARK + HEIGHT / 2)) for side in (-1, 1)]
        for left, middle in beside + close:
            yield Label(text, round(left, 1), round(middle, 1), None), [_box(left, middle, width)]
        begins, ends = (x - 1, x + 1 - width)[::outwards]
        for side, left in [(-1, begins), (1, ends), (-1, ends), (1, begins)]:
            for level in range(8):
                middle = y + side * (MARK + HEIGHT * (level + 1))
                begin, end = sorted((y + side * MARK, middle - side * HEIGHT / 2))
                label = Label(text, round(left, 1), round(middle, 1), (x, round(begin, 1), round(end, 1)))
                yield label, [_box(left, middle, width), Box(x - 1, begin, x + 1, end)]


def _box(left: float, middle: float, width: float) -> Box:
    return Box(left, middle - HEIGHT / 2, left + width, middle + HEIGHT / 2)
