"""Products of many rows, gated and in FP8, which only a Hopper GPU runs, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels import fp8_linear, linear
from blockinfer.kernels import hopper_linear as module
from blockinfer.kernels.hopper_linear import HopperTile, choose_fp8_tile, choose_gated_tile, hopper_linear
from blockinfer.kernels.quantize import FP8, QuantizedRows, QuantizedWeight
from tests.kernels import test_fp8_linear
from tests.kernels.test_linear import TOLERANCE, assert_near, draw
from tests.kernels.test_wide_attention import hopper

TILES = [HopperTile(2, 128), HopperTile(3, 64), HopperTile(2, 64)]


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 700), columns=st.integers(1, 150), depth=st.integers(1, 60))
def test_equals_its_definition(guarded_empty, tile, gated, dtype, seed, rows, columns, depth):
    """Columns and depth in eights."""
    x, weight = draw(seed, rows, 8 * columns * (1 + gated), 8 * depth, dtype, "cuda")
    before = x.clone(), weight.clone()
    out = hopper_linear(x, weight, tile, gated)
    assert out.shape == (rows, 8 * columns) and out.dtype == dtype
    assert_near(out, x, weight, gated, TOLERANCE[dtype])
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])
    guarded_empty.check()


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 500), columns=st.integers(1, 100), depth=st.integers(1, 30))
def test_equals_its_definition_in_fp8(guarded_empty, tile, gated, dtype, seed, rows, columns, depth):
    """Columns in eights, depth in sixteens."""
    shape = rows, 8 * columns * (1 + gated), 16 * depth
    x, weight = test_fp8_linear.draw(seed, *shape, dtype, "cuda")
    test_fp8_linear.assert_product(hopper_linear(x, weight, tile, gated), x, weight, gated)
    guarded_empty.check()


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("tile", TILES)
def test_a_program_has_several_tiles_and_a_row_is_what_it_is_alone(tile):
    x, weight = draw(0, 777, 2 * 6144, 512, torch.bfloat16, "cuda")
    out = hopper_linear(x, weight, tile, gated=True)
    assert_near(out, x, weight, True, TOLERANCE[torch.bfloat16])
    for row in (0, 64, 200, 776):
        assert torch.equal(hopper_linear(x[row : row + 1].clone(), weight, tile, gated=True)[0], out[row])


@pytest.mark.gpu
@hopper
def test_a_gate_of_any_size():
    """The SiLU of a large negative gate is 0, not NaN."""
    x = torch.zeros(130, 64, dtype=torch.bfloat16, device="cuda")
    x[:, 0], x[:, 1] = torch.linspace(-1e38, 1e38, 130), 1
    weight = torch.zeros(2 * 64, 64, dtype=torch.bfloat16, device="cuda")
    weight[:64, 0], weight[64:, 1] = 1, 1
    out = hopper_linear(x, weight, TILES[0], gated=True)
    assert torch.equal(out, x[:, :1].clamp(min=0).expand(-1, 64))


LLADA = 2 * 12288, 4096


def on_an_h200(monkeypatch):
    monkeypatch.setattr(module, "num_processors", lambda device: 132)
    monkeypatch.setattr(module, "is_hopper", lambda device: True)


def empty(rows, shape, dtype=torch.bfloat16):
    return torch.empty(rows, shape[1], dtype=dtype, device="meta"), torch.empty(shape, dtype=dtype, device="meta")


def empty_fp8(rows, shape, dtype=torch.bfloat16):
    x, weight = empty(rows, shape, FP8)
    return QuantizedRows(x, torch.empty(rows), dtype), QuantizedWeight(weight, torch.empty(shape[0], 1))


@pytest.mark.parametrize(
    "rows, shape, expected",
    [
        (0, LLADA, None),
        (65, LLADA, None),
        (192, LLADA, None),
        (256, LLADA, HopperTile(2, 64)),
        (320, LLADA, None),
        (384, LLADA, HopperTile(3, 64)),
        (512, LLADA, HopperTile(2, 128)),
        (768, LLADA, HopperTile(3, 64)),
        (1024, LLADA, HopperTile(2, 128)),
        (2048, LLADA, HopperTile(2, 128)),
        # a rank's of four
        (1024, (2 * 3072, 4096), HopperTile(2, 64)),
        (1024, (2 * 3076, 4096), None),
        (1024, (2 * 12288, 4100), None),
    ],
)
def test_a_gate_where_the_gpu_is_full(monkeypatch, rows, shape, expected):
    """Of an H200's 132 processors, and where rows begin at multiples of 16 bytes."""
    on_an_h200(monkeypatch)
    x, weight = empty(rows, shape)
    assert choose_gated_tile(x, weight) == expected
    assert choose_gated_tile(*empty(rows, shape, torch.float32)) is None
    monkeypatch.setattr(module, "is_hopper", lambda device: False)
    assert choose_gated_tile(x, weight) is None


@pytest.mark.parametrize(
    "rows, shape, gated, expected",
    [
        (128, LLADA, True, None),
        (256, LLADA, True, HopperTile(2, 64)),
        (384, LLADA, True, HopperTile(3, 64)),
        (512, LLADA, True, None),
        (128, (12288, 4096), False, None),
        (384, (12288, 4096), False, HopperTile(3, 64)),
        # a tile for each processor at most
        (96, (4096, 4096), False, HopperTile(2, 64)),
        (256, (4096, 12288), False, HopperTile(2, 64)),
        (384, (4096, 12288), False, HopperTile(3, 64)),
        (512, (4096, 12288), False, None),
        (256, (4096, 4104), False, None),
        (256, (4100, 4096), False, None),
    ],
)
def test_fp8_where_torch_is_slower(monkeypatch, rows, shape, gated, expected):
    on_an_h200(monkeypatch)
    x, weight = empty_fp8(rows, shape)
    assert choose_fp8_tile(x, weight, gated) == expected
    assert choose_fp8_tile(x._replace(dtype=torch.float32), weight, gated) is None
    monkeypatch.setattr(module, "is_hopper", lambda device: False)
    assert choose_fp8_tile(x, weight, gated) is None


@pytest.mark.parametrize("gated", [False, True])
def test_all_tiles_fit_into_shared_memory(gated):
    for tile in TILES:
        stage = 64 * 2 * (64 * tile.groups + (1 + gated) * tile.columns)
        out = 2 * 64 * tile.groups * tile.columns
        stages = tile.stages(gated)
        assert stages >= 4 and stages * stage + out <= 226 * 1024 < (stages + 1) * stage + out


def test_the_model_calls_it_with_what_was_chosen(monkeypatch):
    x, weight = torch.ones(3, 8), torch.ones(16, 8)
    monkeypatch.setattr(linear, "choose_gated_tile", lambda *given: TILES[1] if given == (x, weight) else None)
    monkeypatch.setattr(linear, "hopper_linear", lambda *given, gated: (*given, gated))
    assert linear.gated_linear(x, weight) == (x, weight, TILES[1], True)


def test_the_model_calls_it_in_fp8(monkeypatch):
    """With more rows than those whose time is that of reading the weights."""
    monkeypatch.setattr(fp8_linear, "_multiplied_as_fp8", lambda x: True)
    monkeypatch.setattr(fp8_linear, "choose_fp8_tile", lambda x, weight, gated: TILES[1 + gated])
    monkeypatch.setattr(fp8_linear, "hopper_linear", lambda *given, gated=False: (*given, gated))
    x, weight = empty_fp8(65, (32, 16))
    assert linear.linear(x, weight) == linear.linear_parts(x, weight) == (x, weight, TILES[1], False)
    assert linear.gated_linear(x, weight) == (x, weight, TILES[2], True)
    few, _ = empty_fp8(64, (32, 16))
    assert fp8_linear._hopper_tile(few, weight) is None


@pytest.mark.parametrize(
    "x, weight, message",
    [
        ((3, 16), (16, 8), r"do not fit: \(3, 16\) and \(16, 8\)"),
        ((3, 8), (17, 8), r"do not fit: \(3, 8\) and \(17, 8\)"),
        ((8,), (16, 8), r"do not fit: \(8,\)"),
        ((3, 12), (16, 12), r"multiples of 16 bytes, got \(3, 12\)"),
        ((3, 8), (24, 8), r"multiples of 16 bytes, .* \(24, 8\)"),
    ],
)
def test_misfits_are_named(x, weight, message):
    with pytest.raises(ValueError, match=message):
        hopper_linear(torch.zeros(x).half(), torch.zeros(weight).half(), TILES[0], gated=True)


def test_other_dtypes_are_named():
    x, weight = torch.zeros(3, 8), torch.zeros(16, 8)
    for one, other in ((x, weight), (x.half(), weight.bfloat16())):
        with pytest.raises(ValueError, match="one half precision or FP8, got torch.float"):
            hopper_linear(one, other, TILES[0])
    with pytest.raises(ValueError, match="contiguous"):
        hopper_linear(torch.zeros(8, 3).half().mT, weight.half(), TILES[0])
    x, weight = empty_fp8(3, (16, 16), torch.float32)
    with pytest.raises(ValueError, match="one half precision or FP8, got torch.float8_e4m3fn"):
        hopper_linear(x, weight, TILES[0])
    with pytest.raises(ValueError, match="both be quantised or neither, got .*Tensor.* and .*QuantizedWeight"):
        hopper_linear(torch.zeros(3, 16).half(), weight, TILES[0])
    with pytest.raises(ValueError, match="scales of x and weight must be contiguous"):
        hopper_linear(x._replace(scale=torch.zeros(6)[::2]), weight, TILES[0])


def test_memory_that_begins_elsewhere(monkeypatch):
    on_an_h200(monkeypatch)
    storage, weight = torch.zeros(256 * 64 + 1).half(), torch.zeros(2 * 4224, 64).half()
    aligned, other = (storage[start:][: 256 * 64].view(256, 64) for start in (0, 1))
    assert choose_gated_tile(aligned, weight) == TILES[2] and choose_gated_tile(other, weight) is None
    with pytest.raises(ValueError, match="begin at multiples of 16 bytes"):
        hopper_linear(other, weight, TILES[0], gated=True)
