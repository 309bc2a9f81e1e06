"""The log-probability of a token, kernel and twin, against float64; and guidance of logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels.guidance import guide
from blockinfer.kernels.log_probability import log_probability_torch, log_probability_triton

dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 5),
    size=st.integers(1, 300) | st.sampled_from([127, 129, 2049]),
    beyond=st.integers(0, 3),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    dtype=dtypes,
    block=st.sampled_from([16, 64, 2048]),
)
def test_matches_float64(device, guarded_empty, seed, rows, size, beyond, scale, dtype, block):
    """What stands in columns beyond the size, and between rows, does not count."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, size, generator=g) * scale).to(dtype)
    if size > 2:
        logits[torch.rand(rows, size, generator=g) < 0.1] = -torch.inf
        logits[:, 0] = 1.0
    token_ids = torch.randint(size, (rows,), generator=g)
    whole = torch.full((rows, size + beyond), torch.nan, dtype=dtype, device=device)
    whole[:, :size] = logits.to(device)
    expected = logits.double().log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
    kernel = log_probability_triton(whole, token_ids.to(device), size, block)
    guarded_empty.check()
    for result in (kernel, log_probability_torch(whole, token_ids.to(device), size)):
        assert result.dtype == torch.float64
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=2e-5)


def test_the_twin_is_exact_at_float64():
    logits = torch.randn(4, 99, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 9
    expected = logits.log_softmax(-1)[:, 7]
    torch.testing.assert_close(log_probability_torch(logits, torch.full((4,), 7), 99), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 7, 40])
def test_what_is_not_finite_shows(device, value, column):
    logits = torch.zeros(2, 41, device=device)
    logits[1, column] = value
    for function in (log_probability_torch, lambda *args: log_probability_triton(*args, block=16)):
        result = function(logits, torch.tensor([3, 7], device=device), 41)
        assert result.isnan().tolist() == [False, True]


def test_bad_shapes(device):
    logits, token_ids = torch.zeros(2, 9, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    for arguments, message in (
        ((logits[0], token_ids, 9), "logits must be"),
        ((logits.T.contiguous().T, token_ids, 9), "its stride 1"),
        ((logits, token_ids, 10), "V at least 10"),
        ((logits, token_ids[:1], 9), "token_ids must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            log_probability_triton(*arguments)


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_guidance(device, seed, dtype):
    """LLaDA's u + (s + 1) (c - u); a row of scale 0 is left as it is, infinite logits and all."""
    g = torch.Generator().manual_seed(seed)
    c, u = (torch.randn(3, 17, generator=g).to(dtype).to(device) for _ in range(2))
    c[1, 4], u[1, 5] = -torch.inf, torch.nan
    scale = torch.tensor([0.5, 0.0, 3.0], dtype=torch.float64, device=device)
    guided = guide(c, u, scale)
    assert guided.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    expected = u.to(wide) + (scale[:, None] + 1).to(wide) * (c.to(wide) - u.to(wide))
    assert torch.equal(guided[[0, 2]], expected.to(dtype)[[0, 2]])
    assert torch.equal(guided[1], c[1])
