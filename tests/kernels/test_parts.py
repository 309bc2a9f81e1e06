"""The sum of a product's parts, kernel and twin."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels.parts import sum_parts, sum_parts_torch, sum_parts_triton


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 70)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_sum(device, guarded_empty, shape, dtype, seed):
    """Of no parts, which are a product whole, and of one or more, which are float32."""
    parts = torch.randn(shape[1:] if shape[0] == 0 else shape, generator=torch.Generator().manual_seed(seed))
    parts = parts.to(device, dtype if shape[0] == 0 else torch.float32)
    expected = (parts if shape[0] == 0 else parts.sum(0)).to(dtype)
    for function in (sum_parts_triton, sum_parts_torch):
        out = torch.empty(shape[1:], dtype=dtype, device=device)
        assert function(parts, out) is out
        torch.testing.assert_close(out, expected)
    guarded_empty.check()


def test_what_needs_no_sum_is_not_copied(device):
    x = torch.ones(2, 3, device=device)
    assert sum_parts(x, torch.float32) is x
    assert sum_parts(x[None], torch.float32) is not x


def test_misfits_are_named():
    with pytest.raises(ValueError, match=r"x must be a contiguous .* got \(2, 3, 4\) and \(3, 5\)"):
        sum_parts_triton(torch.zeros(2, 3, 4), torch.zeros(3, 5))
