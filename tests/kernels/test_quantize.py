"""Rows and weights in FP8: kernel and twin against what rounding to it means."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels.quantize import FP8, QuantizedWeight, quantize_rows_torch, quantize_rows_triton
from tests.quantized import dequantized

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(seed, rows, columns, scale, dtype):
    g = torch.Generator().manual_seed(seed)
    # each row of another size
    return (torch.randn(rows, columns, generator=g) * scale * 2.0 ** torch.arange(rows)[:, None]).to(dtype)


def assert_rounds(values, scale, exact):
    """Half of a step of 3 bits of mantissa, or of the smallest step, either way; and a row's largest value is FP8's."""
    assert values.dtype == FP8 and scale.dtype == torch.float32
    values, scale, exact = values.double().cpu(), scale.double().cpu(), exact.double().cpu()
    assert ((values * scale - exact).abs() <= (exact.abs() / 16).maximum(scale * 2.0**-10) * (1 + 1e-6)).all()
    nonzero = exact.abs().amax(1) > 1e-6
    assert (values[nonzero].abs().amax(1) == 448).all()


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 5),
    columns=st.integers(1, 300) | st.sampled_from([640, 1000]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 60.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_rows_are_rounded_by_their_own_largest_value(device, guarded_empty, seed, rows, columns, scale, dtype):
    x = draw(seed, rows, columns, scale, dtype).to(device)
    before = x.clone()
    kernel, twin = quantize_rows_triton(x), quantize_rows_torch(x)
    for quantized in (kernel, twin):
        assert quantized.dtype == dtype
        assert_rounds(quantized.values, quantized.scale[:, None], x)
    assert torch.equal(kernel.values.float(), twin.values.float()) and torch.equal(kernel.scale, twin.scale)
    assert torch.equal(x, before)
    guarded_empty.check()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("quantize", [quantize_rows_torch, quantize_rows_triton])
def test_what_is_no_number_stays_none(device, quantize):
    x = torch.ones(3, 8, device=device)
    x[0, 3], x[1, 2] = torch.nan, torch.inf
    values, scale, _ = quantize(x)
    numbers = (values.float() * scale[:, None]).isfinite().cpu()
    assert not numbers[0].all() and not numbers[1].all() and numbers[2].all()


@pytest.mark.parametrize("x", [torch.zeros(4), torch.zeros(4, 2).mT])
def test_misfits_are_named(x):
    with pytest.raises(ValueError, match=r"contiguous \[T, K\], got"):
        quantize_rows_triton(x)


def test_a_weight_is_rounded_by_its_output_channels():
    exact = draw(3, 6, 40, 1.0, torch.float32)
    weight = QuantizedWeight.empty(6, 40, torch.device("cpu"))
    weight.copy_(exact)
    assert_rounds(weight.values, weight.scale, exact)
    assert weight.shape == (6, 40) and weight.numel() == 240


def test_parts_of_a_weight_are_written_in_its_place():
    whole, exact = QuantizedWeight.empty(6, 8, torch.device("cpu")), draw(4, 6, 8, 1.0, torch.float32)
    first, second, third = whole.split([3, 2, 1])
    for part, rows in ((second, exact[3:5]), (third, exact[5:]), (first, exact[:3])):
        part.copy_(rows)
    expected = QuantizedWeight.empty(6, 8, torch.device("cpu"))
    for part, rows in zip(expected.chunk(2), exact.chunk(2), strict=True):
        part.copy_(rows)
    assert torch.equal(dequantized(whole, torch.float32), dequantized(expected, torch.float32))
