"""The contract of every unmasking rule for any scores, and each rule against a definition in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.decoding.unmasking import RULES, scheduled_count
from blockinfer.kernels.unmasking import CHOICES

# probabilities of all other tokens, or entropies: the scores are what is negative of them
VALUES = [0.0, 1e-30, 1e-12, 0.1, 0.25, 0.5, 0.4999999, 0.75, 0.9, 1.0]


def select(rule, scores, masked, count, value):
    value = torch.tensor([RULES[rule].choice_option(one) for one in value.tolist()], dtype=torch.float64)
    return CHOICES[RULES[rule].choice](scores, masked, count, value)


@st.composite
def blocks(draw, *, with_infinity=True):
    """scores, masked [B, L], count, value [B]: few different scores, all at most 0, so that ties are common."""
    width = draw(st.integers(1, 9))
    number = draw(st.integers(1, 4))
    values = VALUES + ([math.inf] if with_infinity else [])
    cells = number * width
    scores = [-value for value in draw(st.lists(st.sampled_from(values), min_size=cells, max_size=cells))]
    masked = draw(st.lists(st.booleans(), min_size=cells, max_size=cells))
    count = draw(st.lists(st.integers(1, width), min_size=number, max_size=number))
    value = draw(st.lists(st.sampled_from(VALUES), min_size=number, max_size=number))
    shape = (number, width)
    return (
        torch.tensor(scores).view(shape),
        torch.tensor(masked).view(shape),
        torch.tensor(count),
        torch.tensor(value, dtype=torch.float64),
    )


def narrow(value):
    """As float32: in which the rules compare."""
    return torch.tensor(value, dtype=torch.float32).item()


def plain(rule, scores, masked, count, value):
    """One block, by the definitions: lists in, the set of revealed positions out."""
    order = sorted((i for i, m in enumerate(masked) if m), key=lambda i: (-scores[i], i))
    if not order:
        return set()
    if rule in ("low_confidence", "random", "sequential"):
        return set(order[:count])
    if rule == "scheduled_threshold":
        above = {i for i in order if -scores[i] < -narrow(value - 1)}
        return above if len(above) >= count else set(order[:count])
    if rule in ("threshold", "entropy_threshold"):
        most = narrow(1 - value) if rule == "threshold" else narrow(value)
        return {i for i in order if -scores[i] <= most} | {order[0]}
    number = 1
    if rule == "factor":
        while number < len(order) and scores[order[number]] >= narrow(-value / (number + 2)):
            number += 1
    else:
        total = -scores[order[0]]
        while number < len(order) and math.isfinite(scores[order[number]]) and total <= narrow(value):
            total -= scores[order[number]]
            number += 1
    return set(order[:number])


@pytest.mark.parametrize("rule", RULES)
@given(case=blocks())
def test_reveals_at_least_one_masked_position_and_no_other(rule, case):
    scores, masked, count, value = case
    before = scores.clone(), masked.clone()
    reveal = select(rule, scores, masked, count, value)
    assert not (reveal & ~masked).any()
    assert torch.equal(reveal.any(dim=-1), masked.any(dim=-1))
    assert torch.equal(scores, before[0]) and torch.equal(masked, before[1])


@pytest.mark.parametrize("rule", RULES)
@given(case=blocks())
def test_equals_its_definition(rule, case):
    scores, masked, count, value = case
    reveal = select(rule, scores, masked, count, value)
    for i, row in enumerate(reveal):
        expected = plain(rule, scores[i].tolist(), masked[i].tolist(), int(count[i]), float(value[i]))
        assert set(row.nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("rule", ["low_confidence", "factor", "entropy"])
def test_the_lowest_position_wins_among_many_equal_ones(rule):
    """Wide enough that an unstable sort would mix them."""
    scores, masked = torch.full((1, 500), -0.02 if rule == "entropy" else -0.1), torch.ones(1, 500, dtype=torch.bool)
    masked[0, 3] = False
    reveal = select(
        rule, scores, masked, torch.tensor([8]), torch.tensor([0.15 if rule == "entropy" else 0.92]).double()
    )
    assert reveal[0].nonzero()[:, 0].tolist() == [0, 1, 2, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("length", [1, 2, 7, 32])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 31, 32])
def test_schedule_is_even_and_complete(length, steps):
    steps = min(steps, length)
    counts = [scheduled_count(length, steps, step) for step in range(steps)]
    assert sum(counts) == length
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1
    assert counts[-1] >= 1
    assert scheduled_count(length, steps, steps) == 0


def test_a_threshold_of_one_reveals_one_position_a_step():
    """Whose confidences all round to 1 in float32, but for those that leave nothing to others."""
    scores, masked, one = -torch.logspace(-30, -9, 8)[None], torch.ones(1, 8, dtype=torch.bool), torch.ones(1)
    assert (1 + scores == 1).all()
    revealed = select("threshold", scores, masked, one.long(), one)
    assert revealed[0].nonzero()[:, 0].tolist() == [0]
