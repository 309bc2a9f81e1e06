"""The experts' products, kernel and twin, against a loop over rows in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels.experts import ExpertTiling, expert_tilings, mixture_torch, mixture_triton, order_pairs
from blockinfer.kernels.router import Routing

ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def by_hand(x, routing, gate_up, down):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row, (experts, weights) in enumerate(zip(*(part.tolist() for part in routing), strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = (gate_up[expert].double() @ x[row].double()).chunk(2)
            out[row] += weight * (down[expert].double() @ (gate * torch.sigmoid(gate) * up))
    return out


def drawn(seed, rows, experts, places, width, columns, dtype, skewed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g).to(dtype)
    gate_up = (torch.randn(experts, 2 * columns, width, generator=g) / width**0.5).to(dtype)
    down = (torch.randn(experts, width, columns, generator=g) / columns**0.5).to(dtype)
    order = torch.rand(rows, experts, generator=g)
    if skewed:
        # nearly all rows go to the same ones
        order[:, : places + 1] += 1
    chosen = order.topk(places, dim=-1).indices.int()
    wide = torch.promote_types(dtype, torch.float32)
    return x, Routing(chosen, torch.rand(rows, places, generator=g).to(wide)), gate_up, down


shapes = dict(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 12),
    sizes=st.sampled_from([(1, 1), (5, 2), (9, 8), (40, 3)]),
    width=st.sampled_from([1, 16, 33, 64]),
    columns=st.sampled_from([1, 16, 24, 70]),
    skewed=st.booleans(),
)


@given(**shapes, dtype=st.sampled_from([*ERROR]))
def test_twin(seed, rows, sizes, width, columns, skewed, dtype):
    inputs = drawn(seed, rows, *sizes, width, columns, dtype, skewed)
    found = mixture_torch(*inputs)
    assert found.dtype == dtype and found.shape == (rows, width)
    expected = by_hand(*inputs)
    assert (found.double() - expected).norm() <= ERROR[dtype] * max(expected.norm(), 1e-3)


@given(
    **shapes, dtype=st.sampled_from([*ERROR][1:]), tiling=st.sampled_from([(16, 16, 16), (32, 16, 32), (16, 64, 64)])
)
def test_kernel(device, guarded_empty, seed, rows, sizes, width, columns, skewed, dtype, tiling):
    x, routing, gate_up, down = drawn(seed, rows, *sizes, width, columns, dtype, skewed)
    expected = by_hand(x, routing, gate_up, down)
    tilings = ExpertTiling(*tiling), ExpertTiling(*tiling)
    on_device = [part.to(device) for part in (x, gate_up, down)]
    found = mixture_triton(on_device[0], Routing(*(part.to(device) for part in routing)), *on_device[1:], tilings)
    guarded_empty.check()
    assert found.dtype == dtype and found.shape == (sizes[1], rows, width)
    assert (found.double().sum(0).cpu() - expected).norm() <= ERROR[dtype] * max(expected.norm(), 1e-3)


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 60),
    sizes=st.sampled_from([(1, 1), (5, 2), (64, 8), (130, 9)]),
    block_t=st.sampled_from([16, 64]),
)
def test_every_pair_is_in_one_tile_of_its_expert(device, seed, rows, sizes, block_t):
    experts, places = sizes
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, experts, generator=g).topk(places, dim=-1).indices.int()
    order, tiles = (part.cpu() for part in order_pairs(chosen.to(device), experts, block_t))
    assert sorted(order.tolist()) == list(range(rows * places))
    flat, seen = chosen.flatten(), []
    for expert, first, stop in tiles.tolist():
        assert 0 <= expert < experts and stop - first <= block_t
        pairs = order[first:stop] if first < stop else order[:0]
        assert (flat[pairs] == expert).all()
        seen += pairs.tolist()
    assert sorted(seen) == list(range(rows * places))


def test_a_row_s_output_depends_on_no_other(device):
    """Nor on what order its expert's pairs come in, to the bit."""
    x, routing, gate_up, down = drawn(0, 20, 9, 3, 32, 16, torch.float16, True)
    weights, tilings = (gate_up.to(device), down.to(device)), (ExpertTiling(16, 16, 16), ExpertTiling(16, 16, 16))

    def mixed(rows):
        of_rows = Routing(routing.experts[rows].to(device), routing.weights[rows].to(device))
        return mixture_triton(x[rows].to(device), of_rows, *weights, tilings)

    backwards = torch.arange(19, -1, -1)
    assert torch.equal(mixed(backwards).flip(1), mixed(torch.arange(20)))
    assert torch.equal(mixed(torch.arange(3)), mixed(torch.arange(20))[:, :3])


@pytest.mark.parametrize("pairs", [1, 288, 2304, 9216, 73728])
@pytest.mark.parametrize("experts", [64, 257])
def test_both_products_have_tiles_of_as_many_pairs(pairs, experts):
    for memory in (100 * 1024, 228 * 1024):
        first, second = expert_tilings(pairs, experts, memory)
        assert first.block_t == second.block_t
        # gate and up, and the rows, in half precision
        for tiling, matrices in ((first, 2), (second, 1)):
            columns = matrices * tiling.block_n + tiling.block_t
            assert 2 * tiling.num_stages * tiling.block_k * columns <= memory


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(3, 9)), r"do not fit: \(3, 9\)"),
        (dict(down=torch.zeros(5, 8, 7)), r"\(5, 8, 7\)"),
        (dict(down=torch.zeros(5, 8, 6).half()), "of one dtype"),
        (dict(x=torch.zeros(3, 16)[:, ::2]), "contiguous"),
    ],
)
def test_misfits_are_named(change, message):
    right = dict(x=torch.zeros(3, 8), gate_up=torch.zeros(5, 12, 8), down=torch.zeros(5, 8, 6))
    right["routing"] = Routing(torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=message):
        mixture_triton(**right | change)
