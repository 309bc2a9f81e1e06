"""RMSNorm of a sum, kernel and twin, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels import norm
from blockinfer.kernels.norm import add_rms_norm, add_rms_norm_torch, add_rms_norm_triton
from blockinfer.kernels.quantize import quantize_rows_torch

# two roundings to the dtype: after the norm and after the weight
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
EPS = 1e-5


def exact(x, weight):
    x = x.double().cpu()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double().cpu()


def draw(seed, rows, columns, scale, dtype, device, parts=0):
    """x, residual, weight; x is float32 parts where there are any."""
    g = torch.Generator().manual_seed(seed)
    shape = (parts, rows, columns) if parts else (rows, columns)
    x = (torch.randn(shape, generator=g) * scale).to(torch.float32 if parts else dtype)
    residual = (torch.randn(rows, columns, generator=g) * scale).to(dtype)
    weight = (1 + torch.randn(columns, generator=g)).to(dtype)
    return [tensor.to(device) for tensor in (x, residual, weight)]


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 5),
    columns=st.integers(1, 300) | st.sampled_from([512, 1000, 4096]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    dtype=st.sampled_from([*TOLERANCE]),
    parts=st.integers(0, 4),
)
def test_norm_of_a_sum(device, guarded_empty, seed, rows, columns, scale, dtype, parts):
    """The sum is stored in the residual's place, rounded, and its norm is that of the rounded sum."""
    x, residual, weight = draw(seed, rows, columns, scale, dtype, device, parts)
    before = x.clone()
    total = (x.double().sum(0) if parts else x.double()) + residual.double()
    tolerance = TOLERANCE[dtype]
    for implementation in (add_rms_norm_triton, add_rms_norm_torch):
        stored = residual.clone()
        out = implementation(x, stored, weight, EPS)
        assert out.dtype == dtype
        torch.testing.assert_close(stored.double(), total, rtol=tolerance / 2, atol=1e-6 * max(1, scale))
        torch.testing.assert_close(out.double().cpu(), exact(stored, weight), rtol=tolerance, atol=tolerance)
        assert torch.equal(x, before)
    guarded_empty.check()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norm_of_the_residual_alone(device, dtype):
    _, residual, weight = draw(0, 3, 300, 1.0, dtype, device)
    for implementation in (add_rms_norm_triton, add_rms_norm_torch):
        stored = residual.clone()
        out = implementation(None, stored, weight, EPS)
        assert torch.equal(stored, residual)
        torch.testing.assert_close(
            out.double().cpu(), exact(residual, weight), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 5),
    columns=st.integers(1, 300) | st.sampled_from([512, 1000]),
    dtype=st.sampled_from([*TOLERANCE]),
    parts=st.integers(0, 3),
)
def test_the_norm_in_fp8_is_the_norm_that_is_then_quantised(device, guarded_empty, seed, rows, columns, dtype, parts):
    x, residual, weight = draw(seed, rows, columns, 1.0, dtype, device, parts)
    stored, plain = residual.clone(), residual.clone()
    quantized = add_rms_norm_triton(x, stored, weight, EPS, quantized=True)
    expected = quantize_rows_torch(add_rms_norm_triton(x, plain, weight, EPS))
    assert torch.equal(quantized.values.float(), expected.values.float())
    assert torch.equal(quantized.scale, expected.scale) and quantized.dtype == dtype
    assert torch.equal(stored, plain)
    guarded_empty.check()


@pytest.mark.parametrize("kernel", [False, True])
def test_what_the_model_calls_in_fp8(device, monkeypatch, kernel):
    for name in ("runs_triton", "runs_fp8"):
        monkeypatch.setattr(norm, name, lambda x: kernel)
    x, residual, weight = draw(1, 3, 40, 1.0, torch.float32, device)
    expected = quantize_rows_torch(add_rms_norm_torch(x, residual.clone(), weight, EPS))
    quantized, stored = add_rms_norm(x, residual, weight, EPS, quantized=True)
    assert stored is residual
    torch.testing.assert_close(quantized.scale, expected.scale)
    # a value at the middle of a step may go either way
    assert (quantized.values.float() != expected.values.float()).float().mean() < 0.05


def test_the_sum_takes_the_residual_s_place():
    x, residual, weight = draw(0, 4, 33, 1.0, torch.float64, "cpu")
    total = x + residual
    out, stored = add_rms_norm(x, residual, weight, EPS)
    assert stored is residual and torch.equal(stored, total)
    torch.testing.assert_close(out, exact(total, weight))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=torch.zeros(9)), r"weight \[d\], got"),
        (dict(residual=torch.zeros(2, 8)), r"\(2, 8\)"),
        (dict(x=torch.zeros(2, 2, 3, 8)), r"\(2, 2, 3, 8\)"),
        (dict(x=torch.zeros(8, 3).mT), "contiguous"),
        (dict(residual=torch.zeros(8, 3).mT), "contiguous"),
    ],
)
def test_misfits_are_named(change, message):
    right = dict(x=torch.zeros(3, 8), residual=torch.zeros(3, 8), weight=torch.ones(8), eps=EPS)
    with pytest.raises(ValueError, match=message):
        add_rms_norm_triton(**right | change)
