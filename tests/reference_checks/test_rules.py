"""The reference's noise and rules, checked against known answers and hand-made cases."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.reference import (
    Prediction,
    Reference,
    Settings,
    by_entropy,
    by_entropy_threshold,
    by_factor,
    by_threshold,
    philox4x32,
    predict,
    quota_at,
    reveal,
    step_limit,
    uniform,
)
from tests.reference_checks.inputs import EOS, EOT, MASK, RULES, prompts

# --- the generator ---


@pytest.mark.parametrize(
    "key, counter, words",
    [  # Random123's kat_vectors, philox4x32 10
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(key, counter, words):
    assert [f"{int(word):08x}" for word in philox4x32(key, counter)] == words.split()


def test_uniforms_are_the_first_53_bits():
    assert float(uniform(0, 0, 0, 0, 0)) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


def test_uniforms_use_every_coordinate():
    base = dict(seed=5, vocabulary_id=3, position=2, step=1, purpose=0)
    changes = [
        {},
        dict(seed=6),
        dict(seed=5 + 2**32),
        dict(vocabulary_id=4),
        dict(position=3),
        dict(step=2),
        dict(purpose=1),
    ]
    drawn = {float(uniform(**base | change)) for change in changes}
    assert len(drawn) == len(changes)
    many = uniform(0, np.arange(1000), np.arange(50)[:, None], 0, 0)
    assert many.min() > 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.01 and abs(many.var() - 1 / 12) < 0.002


def test_sampling_follows_the_softmax(model):
    logits = model.logits(prompts(1, seed=2)[0] + [MASK])[-1:]
    settings = Settings(temperature=1.0, seed=11)
    drawn = predict(logits.expand(20000, -1), list(range(20000)), 0, model.config, settings)
    counts = np.bincount(drawn.tokens, minlength=61) / 20000
    logits[:, MASK] = -math.inf
    expected = logits.softmax(-1)[0].numpy()
    assert np.abs(counts - expected).max() < 0.02
    assert 1 + drawn.scores[0] == pytest.approx(expected[drawn.tokens[0]], rel=1e-6)  # without the noise


# --- the rules, on hand-made confidences ---


def test_schedule():
    assert [quota_at(step, 8, 3) for step in range(3)] == [3, 3, 2]
    assert step_limit(5, Settings(block_length=8, denoising_steps=4)) == 3  # ceil(4 * 5 / 8)
    assert step_limit(8, Settings(block_length=8, denoising_steps=100)) == 8
    assert step_limit(8, Settings(block_length=8)) == 8
    assert step_limit(8, Settings(block_length=8, unmasking="entropy")) is None


def less_one(*confidences):
    """What is ranked: minus what is left for others."""
    return [confidence - 1 for confidence in confidences]


def test_threshold_rule():
    scores = less_one(0.5, 0.9, 0.3, 0.7)
    assert by_threshold([-float(np.float32(0.3)), -0.9, -0.2], 0.7)[0] == [0, 2]  # at least, not above, at float32
    assert by_threshold(scores, 0.6) == ([1, 3], pytest.approx(0.1))
    assert by_threshold(scores, 0.95)[0] == [1]
    assert by_threshold(scores, 0.0)[0] == [0, 1, 2, 3]
    assert by_threshold(less_one(0.4, 0.4), 0.5) == ([0], 0.0)
    assert by_threshold([-math.inf, -math.inf], 0.5)[0] == [0]
    # of two that round to 1 the surer one, alone
    assert by_threshold([-1e-12, -1e-13], 1.0)[0] == [1]


def test_factor_rule():
    # bars for factor 1: -, 2/3, 3/4, 4/5
    assert by_factor(less_one(0.1, 0.7, 0.8, 0.76), 1.0)[0] == [2, 3]  # 0.8, 0.76 >= 2/3, 0.7 < 3/4
    assert by_factor(less_one(0.99, 0.9, 0.95, 0.85), 1.0)[0] == [0, 2, 1, 3]
    assert by_factor(less_one(0.99, 0.9, 0.95, 0.79), 1.0)[0] == [0, 2, 1]  # failing at the last index is failing
    assert by_factor(less_one(0.2, 0.1), 1.0)[0] == [0]
    assert by_factor(less_one(0.2, 0.1, 0.05), 4.0)[0] == [0, 1, 2]
    assert by_factor([-math.inf, -0.1, -math.inf], 100.0)[0] == [1]


def test_entropy_rule():
    assert by_entropy([0.3, 0.05, 0.2, 0.02], 0.15)[0] == [3, 1, 2]  # .02 + .05 <= .15, + .2 is not
    assert by_entropy([0.3, 0.05, 0.2, 0.02], 0.0)[0] == [3]
    assert by_entropy([0.3, 0.05, 0.2, 0.02], 9.0)[0] == [3, 1, 2, 0]
    assert by_entropy([math.inf, 0.01], 9.0)[0] == [1]
    assert by_entropy([math.inf, math.inf], 9.0)[0] == [0]


def test_entropy_threshold_rule():
    entropy = [0.3, 0.05, 0.2, 0.02]
    assert by_entropy_threshold(entropy, 0.1) == ([1, 3], pytest.approx(0.05))
    assert by_entropy_threshold(entropy, 0.01) == ([3], pytest.approx(0.01))  # the lowest one
    assert by_entropy_threshold(entropy, 9.0)[0] == [0, 1, 2, 3]
    assert by_entropy_threshold([float(np.float32(0.2)), 0.3], 0.2)[0] == [0]  # at most, not below, at float32
    assert by_entropy_threshold([0.4, 0.3, 0.3], 0.2) == ([1], 0.0)
    assert by_entropy_threshold([math.inf, 0.4], 0.2)[0] == [1]
    assert by_entropy_threshold([math.inf, math.inf], 9.0)[0] == [0]


def test_margins_on_hand_made_confidences():
    settings = Settings(unmasking="low_confidence")
    predicted = Prediction([1, 2, 3], [0.5, 0.004, 0.001], [0.6, 0.59, 0.2], [0.0] * 3)
    assert reveal(predicted, 1, False, settings) == ([0], pytest.approx(0.01))
    assert reveal(predicted, 2, False, settings) == ([0, 1], 0.004)  # the third token's own gap is not at stake
    sampled = dataclasses.replace(settings, temperature=1.0)
    assert reveal(predicted, 2, False, sampled) == ([0, 1], 0.001)
    assert reveal(predicted, 2, True, settings) == ([0, 1, 2], 0.001)


@pytest.mark.parametrize("count, top", [(1, math.inf), (3, math.inf), (60, -math.inf)])
def test_infinite_logits_share_the_confidence(model, count, top):
    logits = torch.full((1, 61), -math.inf, dtype=torch.float64)
    logits[0, 10 : 10 + count] = top
    logits[0, MASK], logits[0, 5] = math.inf, math.nan
    predicted = predict(logits, [0], 0, model.config, Settings())
    assert predicted.tokens == [10 if top > 0 else 0] and predicted.scores == [pytest.approx(1 / count - 1)]
    assert predicted.entropy == [pytest.approx(math.log(count), abs=1e-6)]


def test_ids_that_do_not_compete(folders):
    """The mask id and columns from vocab_size on win nothing, however large; nor does eos with its logits at -inf."""
    reference = Reference(folders["wide"])
    logits = torch.zeros(1, 64, dtype=torch.float64)
    logits[0, 8], logits[0, EOS], logits[0, MASK], logits[0, 61:] = 1.0, 2.0, 50.0, 90.0
    predicted = predict(logits, [0], 0, reference.config, Settings(eos_ids=(EOS,)))
    assert predicted.tokens == [EOS]
    assert predicted.scores == [pytest.approx(math.e**2 / (math.e**2 + math.e + 58) - 1)]
    suppressed = Settings(eos_ids=(EOS,), logits_eos_inf=True)
    assert predict(logits, [0], 0, reference.config, suppressed).tokens == [8]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "sequential"])
def test_eos_and_eot_are_revealed_last(rule):
    predicted = Prediction([EOS, 3, EOT], [1.0] * 3, [-math.inf, 0.1, -math.inf], [math.inf, 2.0, math.inf])
    settings = Settings(unmasking=rule, threshold=0.0, factor=50.0, entropy_bound=50.0, entropy_threshold=50.0)
    assert reveal(predicted, 1, False, settings)[0] == [1]
    only_held = Prediction([EOS, EOT], [1.0] * 2, [-math.inf] * 2, [math.inf] * 2)
    assert reveal(only_held, 1, False, settings)[0] == [0]
