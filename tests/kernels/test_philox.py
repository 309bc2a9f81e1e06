"""The counter-based generator: published answers, the 53 bits, and the same bits inside a kernel."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels import philox


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
def test_meets_the_published_known_answers(counter, key, expected):
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


@triton.jit
def _uniform_kernel(out_ptr, seed_ptr, position_ptr, step_ptr, first_id, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)  # grid (rows,)
    place = tl.arange(0, BLOCK)
    seed, position, step = tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(step_ptr + row)
    u = philox.uniform_triton(seed, PURPOSE, position, step, first_id + place)
    tl.store(out_ptr + row * BLOCK + place, u)


SEEDS = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, -1, 2**31, 2**32, -(2**31)])


@given(
    rows=st.lists(st.tuples(SEEDS, st.integers(0, 2**31), st.integers(0, 2**31)), min_size=1, max_size=3),
    purpose=st.sampled_from([philox.TOKEN_NOISE, philox.RULE_NOISE]),
    first_id=st.integers(0, 2**30),
)
def test_a_kernel_draws_the_same_bits(device, rows, purpose, first_id):
    seed, position, step = torch.tensor(rows, device=device).T.contiguous()
    out = torch.zeros(len(rows), 64, dtype=torch.float64, device=device)
    _uniform_kernel[(len(rows),)](out, seed, position, step, first_id, PURPOSE=purpose, BLOCK=64)
    token_ids = torch.arange(first_id, first_id + 64, device=device)
    assert torch.equal(out, philox.uniform(seed[:, None], purpose, position[:, None], step[:, None], token_ids))
