"""Products of FP8 rows with FP8 weights, plain, in parts and gated, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels import fp8_linear as module
from blockinfer.kernels import quantize
from blockinfer.kernels.backend import is_hopper
from blockinfer.kernels.fp8_linear import Tile, fp8_linear_torch, fp8_linear_triton
from blockinfer.kernels.linear import gated_linear, linear, linear_parts
from blockinfer.kernels.quantize import FP8, QuantizedRows, QuantizedWeight, quantize_rows
from tests.kernels.test_linear import assert_near
from tests.quantized import dequantized

# of the norm of the error to that of the product: the output's rounding; on a GPU the matrix units add FP8 products up
# with some 13 bits of mantissa
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ON_A_GPU = 2e-3


def draw(seed, rows, columns, depth, dtype, device):
    """Quantised x and weight."""
    g = torch.Generator().manual_seed(seed)
    x = quantize_rows((torch.randn(rows, depth, generator=g) * 3).to(dtype).to(device))
    weight = QuantizedWeight.empty(columns, depth, torch.device(device))
    weight.copy_(torch.randn(columns, depth, generator=g))
    return x, weight


def assert_product(out, x, weight, gated=False):
    exact = x.values.double() * x.scale.double()[:, None]
    tolerance = TOLERANCE[x.dtype] + (ON_A_GPU if x.scale.is_cuda else 0)
    assert_near(out, exact, dequantized(weight, torch.float64), gated, tolerance)


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 70),
    columns=st.integers(1, 130),
    depth=st.integers(1, 300) | st.sampled_from([64, 128, 256]),
    tile=st.tuples(st.sampled_from([16, 64]), st.sampled_from([16, 64]), st.sampled_from([32, 64]), st.integers(1, 4)),
    gated=st.booleans(),
    dtype=st.sampled_from([*TOLERANCE]),
)
def test_equals_its_definition(device, guarded_empty, seed, rows, columns, depth, tile, gated, dtype):
    x, weight = draw(seed, rows, columns * (1 + gated), depth, dtype, device)
    before = [tensor.clone() for tensor in (*x[:2], weight.values, weight.scale)]
    tile = Tile(*tile)._replace(splits=1 if gated else tile[3])
    out = fp8_linear_triton(x, weight, tile, gated)
    assert out.shape == (tile.splits, rows, columns)
    assert out.dtype == (dtype if tile.splits == 1 else torch.float32)
    assert_product(out.double().sum(0), x, weight, gated)
    after = (*x[:2], weight.values, weight.scale)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, after, strict=True))
    guarded_empty.check()


@pytest.mark.parametrize("dtype", [torch.float64, *TOLERANCE])
def test_the_twin_equals_its_definition(dtype):
    """At float16 too, whose numbers end at 65,504."""
    g = torch.Generator().manual_seed(5)
    x = quantize.quantize_rows_torch((torch.randn(5, 3000, generator=g) + 1).to(dtype))
    weight = QuantizedWeight.empty(7, 3000, torch.device("cpu"))
    weight.copy_(torch.randn(7, 3000, generator=g) + 1)
    out = fp8_linear_torch(x, weight)
    assert out.dtype == dtype
    exact = x.values.double() * x.scale.double()[:, None]
    assert_near(out, exact, dequantized(weight, torch.float64), False, TOLERANCE.get(dtype, 1e-12))


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("given", ["rows", "quantized rows"])
def test_what_the_model_calls(device, monkeypatch, kernel, given):
    monkeypatch.setattr(quantize, "runs_fp8", lambda x: kernel)
    monkeypatch.setattr(module, "runs_fp8", lambda x: kernel)
    monkeypatch.setattr(module, "choose_tile", lambda *args, gated=False: Tile(16, 16, 32, 1 if gated else 3))
    rows, weight = draw(1, 9, 48, 64, torch.float32, device)
    x = rows if given == "quantized rows" else rows.values.float() * rows.scale[:, None]
    parts = linear_parts(x, weight)
    assert parts.shape == ((3, 9, 48) if kernel else (9, 48))
    for out in (linear(x, weight), parts.sum(0) if kernel else parts):
        assert_product(out, rows, weight)
    assert_product(gated_linear(x, weight), rows, weight, gated=True)


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "hopper", "by_torch"),
    [
        (65, 48, torch.bfloat16, True, True),
        (64, 48, torch.bfloat16, True, False),
        (65, 48, torch.float16, True, False),
        (65, 40, torch.bfloat16, True, False),
        (65, 48, torch.bfloat16, False, False),
    ],
)
def test_many_rows_are_torch_s_where_it_takes_them(device, monkeypatch, rows, columns, dtype, hopper, by_torch):
    """But for parts, which it has not."""
    monkeypatch.setattr(module, "runs_fp8", lambda x: True)
    monkeypatch.setattr(module, "is_hopper", lambda device: hopper)
    monkeypatch.setattr(module, "choose_fp8_tile", lambda *args: None)
    called, kernel, splits = [], fp8_linear_triton, 1
    choose = lambda *args, gated=False: Tile(16, 16, 32, 1 if gated else splits)  # noqa: E731
    monkeypatch.setattr(module, "choose_tile", choose)
    monkeypatch.setattr(module, "_scaled_mm", lambda x, w: called.append("torch") or fp8_linear_torch(x, w))
    monkeypatch.setattr(module, "fp8_linear_triton", lambda *a, **o: called.append("kernel") or kernel(*a, **o))
    x, weight = draw(1, rows, columns, 64, dtype, device)
    for multiply in (linear, linear_parts):
        assert_product(multiply(x, weight).reshape(rows, columns), x, weight)
    assert_product(gated_linear(x, weight), x, weight, gated=True)
    assert called == 3 * ["torch" if by_torch else "kernel"]
    called.clear()
    splits = 2
    assert_product(linear_parts(x, weight).sum(0), x, weight)
    assert_product(linear(x, weight), x, weight)
    assert called == ["kernel", "torch" if by_torch else "kernel"]


def test_torch_s_product(device):
    if device == "cuda" and not is_hopper(torch.device("cuda")):
        pytest.skip("it is called on Hopper alone")
    x, weight = draw(1, 100, 48, 64, torch.bfloat16, device)
    assert_product(module._scaled_mm(x, weight), x, weight)


@pytest.mark.parametrize("rows", [1, 33, 64, 65, 300])
def test_the_tiles_that_are_chosen(device, monkeypatch, rows):
    """As on a GPU of 132 processors, at a few columns and much depth, and with a part of a tile at the end."""
    monkeypatch.setattr(module, "num_processors", lambda device: 6)
    x, weight = draw(3, rows, 400, 2048, torch.bfloat16, device)
    for gated in (False, True):
        tile = module.choose_tile(x, weight, gated)
        out = fp8_linear_triton(x, weight, tile, gated)
        assert_product(out.double().sum(0) if len(out) > 1 else out[0], x, weight, gated)
    monkeypatch.setattr(module, "num_processors", lambda device: 132)
    assert module.choose_tile(x, weight).splits == 2


def test_a_float64_model_and_gpus_without_fp8_keep_to_the_twin(monkeypatch):
    monkeypatch.setattr(quantize, "runs_triton", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(quantize, "multiplies_fp8", lambda device: True)
    rows = QuantizedRows(torch.zeros(2, 32).to(FP8), torch.ones(2), torch.bfloat16)
    assert module._multiplied_as_fp8(rows) and not module._multiplied_as_fp8(rows._replace(dtype=torch.float64))
    monkeypatch.setattr(quantize, "multiplies_fp8", lambda device: False)
    assert not module._multiplied_as_fp8(rows)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=QuantizedWeight.empty(4, 9, torch.device("cpu"))), r"do not fit: \(3, 8\) and \(4, 9\)"),
        (dict(weight=QuantizedWeight.empty(5, 8, torch.device("cpu")), gated=True), "do not fit"),
        (dict(weight=QuantizedWeight(torch.zeros(8, 4).to(FP8).mT, torch.zeros(4, 1))), "contiguous"),
        (dict(tile=Tile(16, 16, 32, 2), gated=True), "splits=2"),
    ],
)
def test_misfits_are_named(change, message):
    rows = QuantizedRows(torch.zeros(3, 8).to(FP8), torch.ones(3), torch.float32)
    right = dict(x=rows, weight=QuantizedWeight.empty(4, 8, torch.device("cpu")), tile=Tile(16, 16, 32))
    with pytest.raises(ValueError, match=message):
        fp8_linear_triton(**right | change)
