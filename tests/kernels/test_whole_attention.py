"""Attention of segments that hold all their keys, kernel and twin: against dense attention in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels.attention import attention
from blockinfer.kernels.kv_store import rope_tables
from blockinfer.kernels.segments import Cutting, SegmentTable, count_tiles, cut
from blockinfer.kernels.whole_attention import whole_attention_gluon, whole_attention_torch, with_whole
from tests.kernels.test_paged_attention import assert_close, dense_attention

TWIN = Cutting(8, 0, whole_rows=5, least_whole=3)
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
KERNEL = Cutting(64, 0, whole_rows=128, least_whole=128)


def ragged(seed, sizes, heads, kv_heads, dim, dtype, device, cutting, padding=7):
    """qkv and table of segments with the (rows, kv_len) of `sizes`, and of each whole one its rows, K and V, float64.

    NaN stands in all rows of other segments, and in those that pad the step.
    """
    g = torch.Generator().manual_seed(seed)
    rows, kv_lens = (np.array(column) for column in zip(*sizes, strict=True))
    total = int(rows.sum()) + padding
    qkv = torch.full((total, heads + 2 * kv_heads, dim), torch.nan, dtype=dtype)
    tiles = cut(np.arange(len(rows)), rows, kv_lens, cutting, total)
    dense, stop = [], 0
    for number, kv_len in sizes:
        mine = slice(stop, stop + number)
        stop += number
        if number == kv_len >= cutting.least_whole:
            qkv[mine] = torch.randn(qkv[mine].shape, generator=g, dtype=torch.float64).to(dtype)
            dense.append((mine, qkv[mine].double()))
    table = SegmentTable(torch.from_numpy(tiles), torch.tensor(count_tiles(tiles)), None, None, may_be_whole=True)
    table = table._replace(tiles=table.tiles.to(device), num_tiles=table.num_tiles.to(device))
    return qkv.to(device), table, dense


def check(implementation, seed, sizes, heads, kv_heads, dim, dtype, device, cutting):
    qkv, table, dense = ragged(seed, sizes, heads, kv_heads, dim, dtype, device, cutting)
    out = torch.full((len(qkv), heads, dim), 7.0, dtype=dtype, device=device)
    implementation(qkv[:, :-kv_heads].contiguous(), qkv[:, -kv_heads:], table, out)
    others = torch.ones(len(qkv), dtype=torch.bool)
    for rows, values in dense:
        q, k, v = values.split([heads, kv_heads, kv_heads], dim=1)
        assert_close(out[rows], dense_attention(q, [(len(q), (k, v))]), dtype)
        others[rows] = False
    assert (out[others.to(device)] == 7).all()


heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (6, 2)])


def sizes_around(least, most):
    """Whole segments, too short ones among them, and others."""
    whole = st.integers(1, most).map(lambda rows: (rows, rows))
    others = st.tuples(st.integers(0, most), st.integers(1, 5)).map(lambda pair: (pair[0], sum(pair)))
    long = st.integers(least, most).map(lambda rows: (rows, rows))
    return st.tuples(st.lists(whole | others, max_size=3), long, st.lists(whole | others, max_size=1)).map(
        lambda parts: [*parts[0], parts[1], *parts[2]]
    )


@given(seed=st.integers(0, 2**31), sizes=sizes_around(3, 17), heads=heads, dim=st.integers(1, 20))
def test_twin_equals_dense_attention(seed, sizes, heads, dim):
    check(whole_attention_torch, seed, sizes, *heads, dim, torch.float64, "cpu", TWIN)


@pytest.mark.gpu
@hopper
@given(
    seed=st.integers(0, 2**31),
    sizes=sizes_around(128, 500),
    variant=st.sampled_from([(4, 4, 64, torch.bfloat16), (6, 2, 128, torch.bfloat16), (4, 1, 64, torch.float16)]),
)
def test_kernel_equals_dense_attention(seed, sizes, variant):
    """A variant takes seconds to compile, so there are few of them."""
    check(whole_attention_gluon, seed, sizes, *variant, "cuda", KERNEL)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("length", [128, 129, 191, 192, 255, 256, 257])
@pytest.mark.parametrize("number", [1, 60])
def test_kernel_at_the_edges_of_its_tiles(length, number):
    """One tile of a program, and many: the tiles of one head, and of heads times segments."""
    check(whole_attention_gluon, 0, [(length, length)] * number, 4, 2, 128, torch.bfloat16, "cuda", KERNEL)


@pytest.mark.gpu
@hopper
def test_kernel_in_a_graph_reads_its_tiles_anew():
    first, second = [(300, 300), (128, 128)], [(140, 140), (288, 288)]
    (qkv, table, _), (_, other, _) = (
        ragged(0, sizes, 4, 2, 128, torch.bfloat16, "cuda", KERNEL) for sizes in (first, second)
    )
    qkv[:] = torch.randn_like(qkv)
    qk, v = qkv[:, :-2].contiguous(), qkv[:, -2:]
    expected = torch.zeros(len(qkv), 4, 128, dtype=torch.bfloat16, device="cuda")
    whole_attention_gluon(qk, v, other, expected)
    tiles = torch.zeros(9, 7, dtype=torch.int64, device="cuda")
    out, num_tiles = torch.zeros_like(expected), torch.zeros_like(table.num_tiles)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole_attention_gluon(qk, v, SegmentTable(tiles, num_tiles, None, None), out)
    for one in (table, other):
        tiles[: len(one.tiles)], num_tiles[:] = one.tiles, one.num_tiles
        out.zero_()
        graph.replay()
    assert torch.equal(out, expected)


@given(
    sizes=sizes_around(3, 40),
    rows=st.integers(1, 20),
    whole_rows=st.integers(0, 20),
    least=st.integers(1, 30),
    enough=st.integers(1, 60),
)
def test_whole_segments_are_cut_apart_by_themselves_alone(sizes, rows, whole_rows, least, enough):
    numbers, kv_lens = (np.array(column) for column in zip(*sizes, strict=True))
    slots = np.arange(len(sizes)) + 7
    tiles = cut(slots, numbers, kv_lens, Cutting(rows, enough, whole_rows, least), 0)
    paged, whole = count_tiles(tiles)
    covered = {True: [], False: []}
    for i, (first, stop, slot, kv_len, part, parts, place) in enumerate(tiles.tolist()):
        assert 0 < stop - first <= (rows if i < paged else whole_rows) and kv_len == kv_lens[slot - 7]
        if i >= paged:
            assert (part, parts, place) == (0, 0, numbers[: slot - 7].sum())
        covered[i >= paged] += [(row, slot) for row in range(first, stop)] if part == 0 else []
    assert len(tiles) == paged + whole
    of_row = np.repeat(np.arange(len(sizes)), numbers)
    is_whole = [whole_rows > 0 and n == keys and n >= least for n, keys in sizes]
    for kind, rows_of_kind in covered.items():
        assert rows_of_kind == [(row, i + 7) for row, i in enumerate(of_row) if is_whole[i] == kind]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_is_the_same_however_segments_are_cut(device, dtype):
    """A prompt with the block behind it, and a canvas: side by side, or from the pages that both are written to."""
    heads, kv_heads, dim, page_size, rows = 4, 2, 64, 16, 150 + 32 + 200
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim, generator=generator).to(dtype).to(device)
    positions = torch.cat([torch.arange(182), torch.arange(200)])
    cos_sin = rope_tables(dim, 200, 10_000.0, dtype, torch.device("cpu"))[positions].to(device)
    page_tables = torch.randperm(26, generator=generator).view(2, 13)
    slots = torch.tensor([0] * 182 + [1] * 200)
    kv_slots = page_tables[slots, positions // page_size] * page_size + positions % page_size
    columns = [np.array(column) for column in ([0, 0, 1], [150, 32, 200], [150, 182, 200])]
    plain = Cutting(32, 0)
    made = []
    for cutting in (plain, with_whole(plain, dim, dtype, torch.device(device))):
        tiles = cut(*columns, cutting, rows)
        counts = torch.tensor(count_tiles(tiles))
        tensors = (torch.from_numpy(tiles), counts, page_tables, kv_slots)
        table = SegmentTable(*(x.to(device) for x in tensors), may_be_whole=bool(counts[1]))
        pages = torch.full((2, 26, page_size, kv_heads, dim), torch.nan, dtype=dtype, device=device)
        made.append((attention(qkv, cos_sin, pages, table), pages))
    (expected, expected_pages), (out, pages) = made
    assert (counts[1] > 0) == (device == "cpu" or dtype == torch.float64 or IS_HOPPER)
    assert torch.equal(pages.nan_to_num(), expected_pages.nan_to_num())
    assert_close(out, expected.double().cpu(), dtype)


def test_who_serves_whole_segments():
    """The twin all of them; the kernel, where it runs, those from 128 rows on."""
    plain = Cutting(32, 4)
    assert with_whole(plain, 80, torch.float32, torch.device("cpu")) == Cutting(32, 4, 32, 1)
    if torch.cuda.is_available():
        cuda = torch.device("cuda")
        served = plain._replace(whole_rows=128, least_whole=128) if IS_HOPPER else plain
        assert with_whole(plain, 128, torch.bfloat16, cuda) == served
        assert with_whole(plain, 80, torch.bfloat16, cuda) == with_whole(plain, 128, torch.float32, cuda) == plain


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(qk=torch.zeros(3, 5, 64).half()), r"qk \[T, H \+ HK, D\], v .* must fit, got \(3, 5, 64\)"),
        (dict(v=torch.zeros(3, 3, 64).half()), r"H a multiple of HK, must fit, got .* \(3, 3, 64\)"),
        (dict(out=torch.zeros(3, 4, 64)), "one half precision, got torch.float16, torch.float16 and torch.float32"),
        (dict(v=torch.zeros(3, 64, 2).half().mT), "contiguous"),
    ],
)
def test_misfits_are_named(change, message):
    qk, v, out = (torch.zeros(3, number, 64).half() for number in (6, 2, 4))
    with pytest.raises(ValueError, match=message):
        whole_attention_gluon(**dict(qk=qk, v=v, table=None, out=out) | change)
