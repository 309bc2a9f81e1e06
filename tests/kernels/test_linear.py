"""Products of a few rows with a matrix, plain, in parts and gated, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels import linear as module
from blockinfer.kernels.linear import Tiling, choose_tiling, gated_linear, linear, linear_parts, skinny_linear_triton

# of the norm of the error to that of the product, which the output's rounding makes
TOLERANCE = {torch.float32: 1e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# to that of what was summed in float32, which nearly cancels at times
SUMMED = 1e-6


def draw(seed, rows, columns, depth, dtype, device):
    g = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, depth, generator=g).to(dtype).to(device) for n in (rows, columns))
    return x, weight


def exact(x, weight, gated):
    product = x.double() @ weight.double().mT
    if not gated:
        return product
    gate, up = product.chunk(2, dim=1)
    return gate / (1 + (-gate).exp()) * up


def magnitudes(x, weight, gated):
    """What is summed, without its signs; through a gate, by how much that moves the result at most."""
    summed = x.double().abs() @ weight.double().abs().mT
    if not gated:
        return summed
    (gate, up), (of_gate, of_up) = (x.double() @ weight.double().mT).chunk(2, dim=1), summed.chunk(2, dim=1)
    # the slope of SiLU is at most 1.1
    return 1.1 * of_gate * up.abs() + of_up * (gate / (1 + (-gate).exp())).abs()


def assert_near(out, x, weight, gated, tolerance):
    expected, summed = exact(x, weight, gated), magnitudes(x, weight, gated)
    assert (out.double() - expected).norm() <= tolerance * expected.norm() + SUMMED * summed.norm()


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 64),
    columns=st.integers(1, 130),
    depth=st.integers(1, 300) | st.sampled_from([64, 128, 256]),
    tiling=st.tuples(st.sampled_from([16, 64]), st.sampled_from([16, 64]), st.integers(1, 4)).map(lambda t: Tiling(*t)),
    gated=st.booleans(),
    dtype=st.sampled_from([*TOLERANCE]),
)
def test_equals_its_definition(device, guarded_empty, seed, rows, columns, depth, tiling, gated, dtype):
    x, weight = draw(seed, rows, columns * (1 + gated), depth, dtype, device)
    before = x.clone(), weight.clone()
    tiling = tiling._replace(splits=1 if gated else tiling.splits)
    if device == "cuda" and dtype == torch.float32:
        # no matrix unit computes it exactly, and without one a larger tile takes minutes to compile
        tiling = tiling._replace(block_n=16, block_k=16)
    out = skinny_linear_triton(x, weight, tiling, gated)
    assert out.shape == (tiling.splits, rows, columns)
    assert out.dtype == (dtype if tiling.splits == 1 else torch.float32)
    assert_near(out.double().sum(0), x, weight, gated, TOLERANCE[dtype])
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])
    guarded_empty.check()


@given(seed=st.integers(0, 2**31), rows=st.integers(2, 20))
def test_a_row_does_not_depend_on_those_beside_it(device, seed, rows):
    x, weight = draw(seed, rows, 40, 100, torch.float16, device)
    tiling = Tiling(16, 32, 2)
    together = skinny_linear_triton(x, weight, tiling)
    alone = skinny_linear_triton(x[:1].contiguous(), weight, tiling)
    # tiles of other heights may add in another order
    torch.testing.assert_close(together[:, :1], alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("skinny", [False, True])
def test_what_the_model_calls(device, monkeypatch, skinny):
    monkeypatch.setattr(module, "_is_skinny", lambda x: skinny)
    monkeypatch.setattr(module, "choose_tiling", lambda *args, **options: Tiling(16, 16, 1 if options else 3))
    x, weight = draw(1, 9, 48, 64, torch.float32, device)
    parts = linear_parts(x, weight)
    assert parts.shape == ((3, 9, 48) if skinny else (9, 48))
    for out in (linear(x, weight), parts.sum(0) if skinny else parts):
        assert_near(out, x, weight, False, TOLERANCE[torch.float32])
    assert_near(gated_linear(x, weight), x, weight, True, TOLERANCE[torch.float32])


@pytest.mark.parametrize("rows", [1, 16, 33, 64, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_tiles_that_are_chosen(device, monkeypatch, rows, dtype):
    """With as many columns as two tiles and a part of one, and as much depth as parts need; as on a GPU of 132."""
    monkeypatch.setattr(module, "runs_triton", lambda x: True)
    monkeypatch.setattr(module, "num_processors", lambda device: 6)
    called = []
    kernel = skinny_linear_triton
    monkeypatch.setattr(module, "skinny_linear_triton", lambda *a, **o: called.append(a[2]) or kernel(*a, **o))
    x, weight = draw(3, rows, 192, 2048, dtype, device)
    out = linear_parts(x, weight)
    assert_near(out.double() if out.ndim == 2 else out.double().sum(0), x, weight, False, TOLERANCE[dtype])
    assert_near(linear(x, weight), x, weight, False, TOLERANCE[dtype])
    if rows <= 64:
        assert_near(gated_linear(x, weight), x, weight, True, TOLERANCE[dtype])
        assert [tiling.splits for tiling in called] == [2, 1, 1] and out.dtype == torch.float32
    else:
        assert not called


def test_float32_and_small_gpus_keep_to_torch_s_products(monkeypatch):
    monkeypatch.setattr(module, "runs_triton", lambda x: True)
    x = torch.zeros(4, 8)
    assert module._is_skinny(x.half()) and not module._is_skinny(x) and not module._is_skinny(x[:0].half())
    monkeypatch.setattr(module, "shared_memory", lambda device: 100 * 1024)
    assert not module._is_skinny(x.half())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=torch.zeros(4, 9)), r"do not fit: \(3, 8\) and \(4, 9\)"),
        (dict(x=torch.zeros(8)), r"do not fit: \(8,\)"),
        (dict(weight=torch.zeros(5, 8), gated=True), "do not fit"),
        (dict(weight=torch.zeros(4, 8).half()), "one dtype, got torch.float32 and torch.float16"),
        (dict(weight=torch.zeros(8, 4).mT), "contiguous"),
        (dict(tiling=Tiling(16, 16, 2), gated=True), "splits=2"),
    ],
)
def test_misfits_are_named(change, message):
    right = dict(x=torch.zeros(3, 8), weight=torch.zeros(4, 8), tiling=Tiling(16, 16, 1))
    with pytest.raises(ValueError, match=message):
        skinny_linear_triton(**right | change)


@pytest.mark.parametrize(
    "rows, shape, gated, expected",
    [
        (32, (12288, 4096), False, Tiling(64, 128, 1)),
        (33, (12288, 4096), False, Tiling(128, 64, 1)),
        (64, (24576, 4096), True, Tiling(128, 64, 1, num_stages=4)),
        (32, (24576, 4096), True, Tiling(64, 128, 1, num_stages=4)),
        # too few columns for 132 processors: narrow tiles, and parts of the depth
        (64, (11000, 4096), False, Tiling(64, 128, 1)),
        (64, (4096, 4096), False, Tiling(64, 128, 2)),
        (64, (126464, 4096), False, Tiling(128, 128, 1, num_warps=8, num_stages=3)),
        (64, (2**17, 4096), True, Tiling(128, 64, 1, num_stages=4)),
    ],
)
def test_more_rows_take_wider_tiles_where_these_fill_the_gpu(monkeypatch, rows, shape, gated, expected):
    monkeypatch.setattr(module, "num_processors", lambda device: 132)
    x, weight = torch.empty(rows, shape[1], device="meta"), torch.empty(shape, device="meta")
    assert choose_tiling(x, weight, gated) == expected
