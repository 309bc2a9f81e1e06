"""Single answers on the page: those lost and won against `vanilla`, and those in which nothing was found to judge."""

from collections.abc import Iterable
from typing import NamedTuple

from evals.results.samples import Sample

SHOWN = 20  # answers shown of a group; the file has all
LENGTH = 2000  # characters shown of a text

Answers = dict[str, Sample]


class Pair(NamedTuple):
    """An answer, and vanilla's to the same row if there is one."""

    answer: Sample
    vanilla: Sample | None


class Group(NamedTuple):
    """What its answers have in common, their number, and the first of them."""

    title: str
    number: int
    pairs: list[Pair]


def groups(answers: Answers, vanilla: Answers | None) -> list[Group]:
    """The groups of a configuration; vanilla's own has only the answers in which nothing was found to judge (None)."""
    both = [Pair(one, (vanilla or {}).get(row_id)) for row_id, one in answers.items()]
    compared = [pair for pair in both if pair.vanilla is not None]
    found = [
        _group("lost against vanilla", (p for p in compared if p.vanilla.correct and not p.answer.correct)),
        _group("won against vanilla", (p for p in compared if p.answer.correct and not p.vanilla.correct)),
        _group("with nothing to judge", (p for p in both if p.answer.extracted is None)),
    ]
    return [group for group in found if group.number]


def _group(title: str, pairs: Iterable[Pair]) -> Group:
    pairs = list(pairs)
    return Group(title, len(pairs), pairs[:SHOWN])


def gold(sample: Sample) -> str:
    return sample.gold if isinstance(sample.gold, str) else " / ".join(sample.gold)


def cut(text: str) -> str:
    """The text, without its middle if it is long."""
    if len(text) <= LENGTH:
        return text
    half = LENGTH // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"
