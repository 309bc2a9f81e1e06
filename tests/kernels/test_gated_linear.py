"""The gated product of many rows, which only a Hopper GPU runs, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels import gated_linear as module
from blockinfer.kernels import linear
from blockinfer.kernels.backend import is_hopper
from blockinfer.kernels.gated_linear import GatedTile, choose_gated_tile, gated_linear_gluon
from tests.kernels.test_linear import TOLERANCE, assert_near, draw

hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and is_hopper(torch.device("cuda"))), reason="needs a Hopper GPU"
)
TILES = [GatedTile(2, 128), GatedTile(3, 64), GatedTile(2, 64)]


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 700), columns=st.integers(1, 150), depth=st.integers(1, 60))
def test_equals_its_definition(tile, dtype, seed, rows, columns, depth):
    """Columns and depth in eights."""
    x, weight = draw(seed, rows, 16 * columns, 8 * depth, dtype, "cuda")
    before = x.clone(), weight.clone()
    out = gated_linear_gluon(x, weight, tile)
    assert out.shape == (rows, 8 * columns) and out.dtype == dtype
    assert_near(out, x, weight, True, TOLERANCE[dtype])
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("tile", TILES)
def test_a_program_has_several_tiles_and_a_row_is_what_it_is_alone(tile):
    x, weight = draw(0, 777, 2 * 6144, 512, torch.bfloat16, "cuda")
    out = gated_linear_gluon(x, weight, tile)
    assert_near(out, x, weight, True, TOLERANCE[torch.bfloat16])
    for row in (0, 64, 200, 776):
        assert torch.equal(gated_linear_gluon(x[row : row + 1].clone(), weight, tile)[0], out[row])


@pytest.mark.gpu
@hopper
def test_a_gate_of_any_size():
    """The SiLU of a large negative gate is 0, not NaN."""
    x = torch.zeros(130, 64, dtype=torch.bfloat16, device="cuda")
    x[:, 0] = torch.linspace(-3e38, 3e38, 130)
    weight = torch.zeros(2 * 64, 64, dtype=torch.bfloat16, device="cuda")
    weight[:64, 0], weight[64:, 1] = 1, 1
    x[:, 1] = 1
    out = gated_linear_gluon(x, weight, TILES[0])
    assert torch.equal(out, x[:, :1].clamp(min=0).expand(-1, 64))


LLADA = 2 * 12288, 4096


@pytest.mark.parametrize(
    "rows, shape, expected",
    [
        (65, LLADA, None),
        (192, LLADA, None),
        (256, LLADA, GatedTile(2, 64)),
        (320, LLADA, None),
        (384, LLADA, GatedTile(3, 64)),
        (512, LLADA, GatedTile(2, 128)),
        (768, LLADA, GatedTile(3, 64)),
        (1024, LLADA, GatedTile(2, 128)),
        (2048, LLADA, GatedTile(2, 128)),
        # a rank's of four
        (1024, (2 * 3072, 4096), GatedTile(2, 64)),
        (1024, (2 * 3076, 4096), None),
        (1024, (2 * 12288, 4100), None),
    ],
)
def test_it_is_chosen_where_the_gpu_is_full(monkeypatch, rows, shape, expected):
    """Of an H200's 132 processors; where rows and weights begin at multiples of 16 bytes."""
    monkeypatch.setattr(module, "num_processors", lambda device: 132)
    monkeypatch.setattr(module, "is_hopper", lambda device: True)
    x, weight = torch.empty(rows, shape[1], dtype=torch.bfloat16, device="meta"), torch.empty(shape, device="meta")
    assert choose_gated_tile(x, weight) == expected
    assert choose_gated_tile(x.float(), weight) is None
    monkeypatch.setattr(module, "is_hopper", lambda device: False)
    assert choose_gated_tile(x, weight) is None


def test_all_tiles_fit_into_shared_memory():
    for tile in TILES:
        stage = 64 * 2 * (64 * tile.groups + 2 * tile.columns)
        out = 2 * 64 * tile.groups * tile.columns
        assert tile.stages() >= 4 and tile.stages() * stage + out <= 226 * 1024 < (tile.stages() + 1) * stage + out


def test_the_model_calls_it_with_what_was_chosen(monkeypatch):
    x, weight = torch.ones(3, 8), torch.ones(16, 8)
    monkeypatch.setattr(linear, "choose_gated_tile", lambda *given: TILES[1] if given == (x, weight) else None)
    monkeypatch.setattr(linear, "gated_linear_gluon", lambda *given: given)
    assert linear.gated_linear(x, weight) == (x, weight, TILES[1])


@pytest.mark.parametrize(
    "x, weight, message",
    [
        ((3, 16), (16, 8), r"contiguous, K and m multiples of 8, got \(3, 16\) and \(16, 8\)"),
        ((3, 12), (16, 12), r"multiples of 8, got \(3, 12\)"),
        ((3, 8), (24, 8), r"multiples of 8, .* \(24, 8\)"),
        ((8,), (16, 8), r"got \(8,\)"),
    ],
)
def test_misfits_are_named(x, weight, message):
    with pytest.raises(ValueError, match=message):
        gated_linear_gluon(torch.zeros(x).half(), torch.zeros(weight).half(), TILES[0])


def test_other_dtypes_are_named():
    x, weight = torch.zeros(3, 8), torch.zeros(16, 8)
    for one, other in ((x, weight), (x.half(), weight.bfloat16())):
        with pytest.raises(ValueError, match="one half precision, got torch.float"):
            gated_linear_gluon(one, other, TILES[0])
    with pytest.raises(ValueError, match="contiguous"):
        gated_linear_gluon(torch.zeros(8, 3).half().mT, weight.half(), TILES[0])
