"""AUP against sums made by hand."""

import math

import pytest

from evals.results.aup import aup, scores

# where an accuracy weighs half: exp(-3 (1 - y / 100)) = 1 / 2
HALF = 100 * (1 - math.log(2) / 3)


@pytest.mark.parametrize(
    ("points", "best", "area"),
    [
        ([(2.0, 80.0)], 80.0, 160.0),
        # a rectangle
        ([(1.0, 90.0), (3.0, 90.0)], 90.0, 270.0),
        # in any order; the first point does not weigh less, the second's share of the trapezoid does not either
        ([(2.0, 100.0), (1.0, HALF)], 100.0, HALF + (HALF / 2 + 100) / 2),
        # 80 + 74 e^-0.225 over 3: 70 is more than 5 below 80, and 75 would not be
        ([(2.0, 80.0), (4.0, 70.0), (5.0, 76.0)], 80.0, 160 + 3 * (80 + 76 * math.exp(-0.15)) / 2),
        ([(2.0, 80.0), (5.0, 75.0)], 80.0, 160 + 3 * (80 + 75 * math.exp(-0.1875)) / 2),
        ([(2.0, 80.0), (5.0, 74.9)], 80.0, 160.0),
        # above the best of all nothing weighs more than 1
        ([(1.0, 50.0), (2.0, 60.0)], 50.0, 50 + 55),
        # of two at one place the better one is the first
        ([(1.0, 60.0), (1.0, 70.0), (2.0, 70.0)], 70.0, 140.0),
        ([(1.0, 0.0), (2.0, 0.0)], 0.0, 0.0),
    ],
)
def test_areas_by_hand(points, best, area):
    assert aup(points, best) == pytest.approx(area)
    assert aup(reversed(points), best) == pytest.approx(area)


def test_a_longer_sum():
    """160 + (80 + 72.3640) + (72.3640 + 65.4138), to four digits."""
    assert aup([(2.0, 80.0), (4.0, 78.0), (6.0, 76.0)], 80.0) == pytest.approx(450.1417, abs=1e-3)


def test_nothing_has_no_score():
    with pytest.raises(ValueError, match="AUP needs at least one point"):
        aup([], 80.0)


def test_decoders_of_several_points_are_scored_beside_the_best_of_all():
    found = scores(
        [("a", (1.0, 50.0)), ("b", (9.0, 100.0)), ("a", (2.0, 50.0)), ("c", (1.0, 90.0)), ("c", (2.0, 90.0))]
    )
    assert found == {
        "a": (pytest.approx(50 + 50 * math.exp(-1.5)), 2),
        "c": (pytest.approx(90 + 90 * math.exp(-0.3)), 2),
    }
    assert scores([]) == {}
