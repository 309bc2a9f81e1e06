"""The predicted token and its confidence, against a plain float64 definition, and at the edges of floating point."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels import philox
from blockinfer.kernels.confidence import RowNoise, token_confidence


def plain(row: list[float], vocab_size: int, mask_token_id: int) -> tuple[int, float, float]:
    """token, confidence, entropy of one row of logits."""
    candidates = {i: -math.inf if math.isnan(x) else x for i, x in enumerate(row[:vocab_size]) if i != mask_token_id}
    top = max(candidates.values())
    if math.isinf(top):
        weights = {i: float(x == top) for i, x in candidates.items()}
    else:
        weights = {i: math.exp(x - top) for i, x in candidates.items()}
    total = sum(weights.values())
    token = min(i for i, x in candidates.items() if x == top)
    entropy = sum(-w / total * math.log(w / total) for w in weights.values() if w > 0)
    return token, weights[token] / total, entropy


LOGIT = st.sampled_from([0.0, 1.0, -2.0, 30.0, -30.0, math.inf, -math.inf, math.nan]) | st.floats(-50, 50, width=16)


@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
def test_equals_its_definition(data, dtype):
    vocab_size = data.draw(st.integers(2, 12))
    width = vocab_size + data.draw(st.integers(0, 3))
    mask_token_id = data.draw(st.integers(0, width - 1))
    rows = data.draw(st.lists(st.lists(LOGIT, min_size=width, max_size=width), min_size=1, max_size=4))
    logits = torch.tensor(rows, dtype=dtype)
    expected = [plain(row, vocab_size, mask_token_id) for row in logits.double().tolist()]
    token_ids, confidence, entropy = token_confidence(logits, vocab_size, mask_token_id, with_entropy=True)
    assert token_ids.tolist() == [token for token, _, _ in expected]
    assert confidence.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(confidence, torch.tensor([c for _, c, _ in expected]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, torch.tensor([h for _, _, h in expected]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize(("mask_token_id", "token", "candidates"), [(0, 1, 4), (2, 0, 4), (5, 0, 5)])
def test_a_row_without_any_preference(value, mask_token_id, token, candidates):
    """All candidates at -inf, or all at +inf: the lowest id but for the mask, each as likely as the others."""
    logits = torch.full((1, 6), value)
    token_ids, confidence, entropy = token_confidence(logits, 5, mask_token_id, with_entropy=True)
    assert token_ids.tolist() == [token]
    torch.testing.assert_close(confidence, torch.tensor([1 / candidates]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(candidates)]))


def test_a_constant_added_to_a_row_changes_nothing():
    logits = torch.randn(5, 300, dtype=torch.float64)
    before = token_confidence(logits.clone(), 300, 7)
    after = token_confidence(logits + 100.0, 300, 7)
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(before[1], after[1])


def test_sampled_tokens_follow_the_softmax_at_that_temperature():
    logits = torch.tensor([[2.0, 1.0, 0.0, 5.0]])  # 5.0 is the mask token's
    rows, temperature = 20_000, 0.7
    index = torch.arange(rows)
    noise = RowNoise(torch.full((rows,), temperature, dtype=torch.float64), torch.full((rows,), 11), index, index * 0)
    token_ids, confidence, _ = token_confidence(logits.repeat(rows, 1), 4, 3, noise)
    # Gumbel noise times T added to the logits samples softmax(logits / T)
    expected = (logits[0, :3].double() / temperature).softmax(-1)
    frequency = token_ids.bincount(minlength=3).double() / rows
    torch.testing.assert_close(frequency, expected, rtol=0, atol=4 * (0.25 / rows) ** 0.5)
    torch.testing.assert_close(confidence, logits[0, :3].softmax(-1)[token_ids])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_meets_the_published_known_answers(counter, key, expected):
    words = philox.philox4x32([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_uniform_takes_53_bits_of_the_first_two_words():
    zero = torch.tensor(0)
    bits = (0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)  # the known answer for counter 0 and key 0
    assert float(philox.uniform(zero, 0, zero, zero, zero)) == bits * 2.0**-53


def test_uniform_is_never_0_or_1_and_depends_on_every_argument():
    base = dict(seed=5, position=3, step=2, token_id=1)

    def draw(purpose=0, **changed):
        named = {name: torch.tensor(value) for name, value in (base | changed).items()}
        return float(philox.uniform(purpose=purpose, **named))

    draws = [draw(), draw(1), *(draw(**{name: value + 1}) for name, value in base.items()), draw(seed=5 + 2**32)]
    assert len(set(draws)) == len(draws)
    many = philox.uniform(torch.tensor(0), 0, torch.tensor(0), torch.tensor(0), torch.arange(10_000))
    assert many.min() > 0 and many.max() < 1
    assert abs(many.mean() - 0.5) < 0.02
