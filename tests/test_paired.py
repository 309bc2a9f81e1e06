"""The paired interval against published values, against its own definition found by brute force, and at its limits."""

import math
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.results import paired
from evals.results.paired import Paired

Z = NormalDist().inv_cdf(0.95)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014): Tango's interval for the table 1, 1, 7, 12
        ((21, 1, 7), -0.517, -0.026),
    ],
)
def test_published_intervals(counts, low, high, monkeypatch):
    """Published ones are two-sided: 2.5 % at each end."""
    monkeypatch.setattr(paired, "_Z", NormalDist().inv_cdf(0.975))
    pair = Paired(*counts)
    assert (pair.lower(), pair.upper()) == (pytest.approx(low, abs=6e-4), pytest.approx(high, abs=6e-4))


def likeliest_share_won(pair, loss):
    """The share of won rows that maximises the likelihood at a given loss, by golden-section search."""
    n, lost, won = pair

    def likelihood(share):
        terms = [(lost, share + loss), (won, share), (n - lost - won, 1 - 2 * share - loss)]
        return sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

    low, high = max(0.0, -loss), (1 - loss) / 2
    for _ in range(200):
        third = (high - low) / 3
        low, high = (low + third, high) if likelihood(low + third) < likelihood(high - third) else (low, high - third)
    return (low + high) / 2


@st.composite
def pairs(draw):
    n = draw(st.integers(2, 400))
    lost = draw(st.integers(0, n))
    return Paired(n, lost, draw(st.integers(0, n - lost)))


@given(pair=pairs())
def test_the_bounds_are_where_the_score_is_z(pair):
    for bound, sign in ((pair.lower(), 1), (pair.upper(), -1)):
        if abs(bound) > 1 - 1e-6:
            continue
        share = likeliest_share_won(pair, bound)
        variance = pair.n * (2 * share + bound - bound * bound)
        score = (pair.lost - pair.won - pair.n * bound) / math.sqrt(variance)
        assert score == pytest.approx(sign * Z, abs=2e-3)


@given(pair=pairs())
def test_the_interval_holds_the_loss_and_turns_with_the_roles(pair):
    assert pair.lower() - 1e-8 <= pair.loss <= pair.upper() + 1e-8
    turned = Paired(pair.n, pair.won, pair.lost)
    assert turned.lower() == pytest.approx(-pair.upper(), abs=1e-6)
    assert turned.mcnemar() == pair.mcnemar()


def test_nothing_changed():
    """Without a changed row the bound is z^2 / (n + z^2)."""
    for n in (8, 32, 200, 10_000):
        pair = Paired(n, 0, 0)
        assert pair.upper() == pytest.approx(Z * Z / (n + Z * Z), abs=1e-7)
        assert pair.lower() == pytest.approx(-pair.upper(), abs=1e-7)
        assert pair.mcnemar() == 1.0


def test_mcnemar():
    assert Paired(100, 10, 0).mcnemar() == pytest.approx(2 / 1024)
    assert Paired(100, 8, 2).mcnemar() == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert Paired(100, 5, 5).mcnemar() == 1.0


def test_the_rows_needed_are_enough():
    """At that many rows, with as large a share of them changed and nothing lost on balance, 80 % pass the margin."""
    pair = Paired(200, 10, 10)
    n = pair.rows_needed(0.03)
    changed = 20.5 / 201
    assert n == math.ceil((Z + NormalDist().inv_cdf(0.8)) ** 2 * changed / 0.03**2) == 701
    half_width = Z * math.sqrt(changed / n)
    typical = NormalDist(0, math.sqrt(changed / n))
    assert typical.cdf(0.03 - half_width) == pytest.approx(0.8, abs=0.005)
    assert Paired(200, 1, 1).rows_needed(0.03) < n
