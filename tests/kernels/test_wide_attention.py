"""Attention of wide segments, kernel and twin: against dense attention in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels.attention import attention
from blockinfer.kernels.kv_store import rope_tables
from blockinfer.kernels.segments import Cutting, SegmentTable, count_tiles, cut
from blockinfer.kernels.wide_attention import wide_attention_gluon, wide_attention_torch, with_wide
from tests.kernels.test_paged_attention import assert_close, dense_attention

TWIN = Cutting(2, 4, wide_rows=5, least_wide=3)
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
KERNEL = Cutting(64, 0, wide_rows=128, least_wide=128)


def is_wide(start, rows, kv_len, cutting):
    many = rows >= cutting.least_wide and (start == 0 or 2 * rows > cutting.rows * cutting.enough)
    return cutting.wide_rows > 0 and start + rows == kv_len and many


def ragged(seed, sizes, heads, kv_heads, dim, page_size, dtype, device, cutting, padding=7):
    """qkv, the pages and the table of segments with the (start, rows, kv_len) of `sizes`, and of each wide one its
    rows, q, K and V, float64.

    NaN stands in all rows of other segments, in those that pad the step, and in all slots that hold no key of a wide
    one. Those of its own rows hold other numbers than qkv.
    """
    g = torch.Generator().manual_seed(seed)
    starts, rows, kv_lens = (np.array(column) for column in zip(*sizes, strict=True))
    total = int(rows.sum()) + padding

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    qkv = torch.full((total, heads + 2 * kv_heads, dim), torch.nan, dtype=dtype)
    width = -(-int(kv_lens.max()) // page_size) + 1
    page_tables = torch.randperm(len(sizes) * width, generator=g).view(len(sizes), width)
    pages = torch.full((2, len(sizes) * width, page_size, kv_heads, dim), torch.nan, dtype=dtype)
    dense, stop = [], 0
    for slot, (start, number, kv_len) in enumerate(sizes):
        mine = slice(stop, stop + number)
        stop += number
        if is_wide(start, number, kv_len, cutting):
            qkv[mine] = randn(*qkv[mine].shape)
            stored = randn(2, kv_len, kv_heads, dim)
            at = (page_tables[slot, :, None] * page_size + torch.arange(page_size)).flatten()[:kv_len]
            pages.flatten(1, 2)[:, at] = stored
            q, *own = qkv[mine].split([heads, kv_heads, kv_heads], dim=1)
            kv = (torch.cat([earlier[:start], one]).double() for earlier, one in zip(stored, own, strict=True))
            dense.append((mine, q.double(), tuple(kv)))
    slots = np.arange(len(sizes))
    tiles = cut(slots, starts, rows, kv_lens, cutting, total)
    tensors = torch.from_numpy(tiles), torch.tensor(count_tiles(tiles)), page_tables
    table = SegmentTable(*(tensor.to(device) for tensor in tensors), None, may_be_wide=True)
    return qkv.to(device), pages.to(device), table, dense


def check(implementation, seed, sizes, heads, kv_heads, dim, page_size, dtype, device, cutting):
    of_keys = kv_heads, dim, page_size, dtype, device
    qkv, pages, table, dense = ragged(seed, sizes, heads, *of_keys, cutting)
    out = torch.full((len(qkv), heads, dim), 7.0, dtype=dtype, device=device)
    implementation(qkv[:, :-kv_heads].contiguous(), qkv[:, -kv_heads:], pages, table, out)
    others = torch.ones(len(qkv), dtype=torch.bool)
    for rows, q, kv in dense:
        assert_close(out[rows], dense_attention(q, [(len(q), kv)]), dtype)
        others[rows] = False
    assert (out[others.to(device)] == 7).all()


heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (6, 2)])


def sizes_around(least, most):
    """(start, rows, kv_len) of segments, wide ones among them, some that have too few rows, and some that are not the
    last of their keys."""
    rows, wide, start = st.integers(0, most), st.integers(least, most), st.just(0) | st.integers(1, most)
    suffixes = st.tuples(start, rows | wide).map(lambda pair: (*pair, max(1, sum(pair))))
    others = st.tuples(start, rows | wide, st.integers(1, 5)).map(lambda three: (*three[:2], sum(three)))
    one = st.tuples(start, wide).map(lambda pair: (*pair, sum(pair)))
    return st.tuples(st.lists(suffixes | others, max_size=3), one, st.lists(suffixes | others, max_size=1)).map(
        lambda parts: [*parts[0], parts[1], *parts[2]]
    )


@given(
    seed=st.integers(0, 2**31),
    sizes=sizes_around(5, 17),
    heads=heads,
    dim=st.integers(1, 20),
    page_size=st.integers(1, 9),
)
def test_twin_equals_dense_attention(seed, sizes, heads, dim, page_size):
    check(wide_attention_torch, seed, sizes, *heads, dim, page_size, torch.float64, "cpu", TWIN)


@pytest.mark.gpu
@hopper
@given(
    seed=st.integers(0, 2**31),
    sizes=sizes_around(128, 500),
    variant=st.sampled_from(
        [(4, 4, 64, 16, torch.bfloat16), (6, 2, 128, 24, torch.bfloat16), (4, 1, 64, 256, torch.float16)]
    ),
)
def test_kernel_equals_dense_attention(seed, sizes, variant):
    """A variant takes seconds to compile, so there are few of them."""
    check(wide_attention_gluon, seed, sizes, *variant, "cuda", KERNEL)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("before", [0, 1, 127, 128, 129])
@pytest.mark.parametrize("length", [128, 129, 191, 192, 255, 256, 257])
@pytest.mark.parametrize("number", [1, 60])
def test_kernel_at_the_edges_of_its_tiles(length, before, number):
    """One tile of a program, and many: the tiles of one head, and of heads times segments."""
    sizes = [(before, length, before + length)] * number
    check(wide_attention_gluon, 0, sizes, 4, 2, 128, 16, torch.bfloat16, "cuda", KERNEL)


@pytest.mark.gpu
@hopper
def test_kernel_in_a_graph_reads_its_tiles_anew():
    first, second = [(0, 300, 300), (0, 128, 128)], [(0, 140, 140), (100, 288, 388)]
    (qkv, *_, table, _), (_, pages, other, _) = (
        ragged(0, sizes, 4, 2, 128, 16, torch.bfloat16, "cuda", KERNEL) for sizes in (first, second)
    )
    qkv[:] = torch.randn_like(qkv)
    qk, v = qkv[:, :-2].contiguous(), qkv[:, -2:]
    expected = torch.zeros(len(qkv), 4, 128, dtype=torch.bfloat16, device="cuda")
    wide_attention_gluon(qk, v, pages, other, expected)
    tiles = torch.zeros(9, 7, dtype=torch.int64, device="cuda")
    out, num_tiles = torch.zeros_like(expected), torch.zeros_like(table.num_tiles)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wide_attention_gluon(qk, v, pages, SegmentTable(tiles, num_tiles, other.page_tables, None), out)
    for one in (table, other):
        tiles[: len(one.tiles)], num_tiles[:] = one.tiles, one.num_tiles
        out.zero_()
        graph.replay()
    assert torch.equal(out, expected)


@given(
    sizes=sizes_around(3, 40),
    rows=st.integers(1, 20),
    wide_rows=st.integers(0, 20),
    least=st.integers(1, 30),
    enough=st.integers(1, 60),
)
def test_wide_segments_are_cut_apart_by_themselves_alone(sizes, rows, wide_rows, least, enough):
    starts, numbers, kv_lens = (np.array(column) for column in zip(*sizes, strict=True))
    slots = np.arange(len(sizes)) + 7
    cutting = Cutting(rows, enough, wide_rows, least)
    tiles = cut(slots, starts, numbers, kv_lens, cutting, 0)
    paged, wide = count_tiles(tiles)
    covered = {True: [], False: []}
    for i, (first, stop, slot, kv_len, part, parts, place) in enumerate(tiles.tolist()):
        assert 0 < stop - first <= (rows if i < paged else wide_rows) and kv_len == kv_lens[slot - 7]
        if i >= paged:
            assert (part, parts, place) == (starts[slot - 7], 0, numbers[: slot - 7].sum())
        covered[i >= paged] += [(row, slot) for row in range(first, stop)] if part == 0 or i >= paged else []
    assert len(tiles) == paged + wide
    of_row = np.repeat(np.arange(len(sizes)), numbers)
    for kind, rows_of_kind in covered.items():
        mine = [(row, i + 7) for row, i in enumerate(of_row) if is_wide(*sizes[i], cutting) == kind]
        assert rows_of_kind == mine


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_is_the_same_however_segments_are_cut(device, dtype):
    """A prompt with the block behind it, and one with the rest of its canvas: wide ones apart, or all of them from the
    pages that they are written to."""
    heads, kv_heads, dim, page_size, rows = 4, 2, 64, 16, 150 + 32 + 130 + 200
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim, generator=generator).to(dtype).to(device)
    positions = torch.cat([torch.arange(182), torch.arange(330)])
    cos_sin = rope_tables(dim, 330, 10_000.0, dtype, torch.device("cpu"))[positions].to(device)
    page_tables = torch.randperm(42, generator=generator).view(2, 21)
    slots = torch.tensor([0] * 182 + [1] * 330)
    kv_slots = page_tables[slots, positions // page_size] * page_size + positions % page_size
    columns = [[0, 0, 1, 1], [0, 150, 0, 130], [150, 32, 130, 200], [150, 182, 130, 330]]
    columns = [np.array(column) for column in columns]
    plain = Cutting(32, 0)
    made = []
    for cutting in (plain, with_wide(plain, dim, page_size, dtype, torch.device(device))):
        tiles = cut(*columns, cutting, rows)
        counts = torch.tensor(count_tiles(tiles))
        tensors = (torch.from_numpy(tiles), counts, page_tables, kv_slots)
        table = SegmentTable(*(x.to(device) for x in tensors), may_be_wide=bool(counts[1]))
        pages = torch.full((2, 42, page_size, kv_heads, dim), torch.nan, dtype=dtype, device=device)
        made.append((attention(qkv, cos_sin, pages, table), pages))
    (expected, expected_pages), (out, pages) = made
    assert counts[1] == (5 + 1 + 5 + 7 if device == "cpu" or dtype == torch.float64 else 2 + 2 + 2 if IS_HOPPER else 0)
    assert torch.equal(pages.nan_to_num(), expected_pages.nan_to_num())
    assert_close(out, expected.double().cpu(), dtype)


def test_who_serves_wide_segments(monkeypatch):
    """The twin all of them; the kernel, where it runs, those from 128 rows on."""
    plain, bfloat16, cuda = Cutting(32, 4), torch.bfloat16, torch.device("cuda")
    assert with_wide(plain, 80, 3, torch.float32, torch.device("cpu")) == Cutting(32, 4, 32, 1)
    monkeypatch.setattr("blockinfer.kernels.wide_attention.runs_triton", lambda tensor: True)
    monkeypatch.setattr("blockinfer.kernels.wide_attention.is_hopper", lambda device: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: None)
    for head_dim, page_size in [(128, 16), (64, 24)]:
        assert with_wide(plain, head_dim, page_size, bfloat16, cuda) == Cutting(32, 4, 128, 128)
    for head_dim, page_size, dtype in [(80, 16, bfloat16), (128, 12, bfloat16), (128, 16, torch.float32)]:
        assert with_wide(plain, head_dim, page_size, dtype, cuda) == plain
    monkeypatch.setattr("blockinfer.kernels.wide_attention.is_hopper", lambda device: False)
    assert with_wide(plain, 128, 16, bfloat16, cuda) == plain


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(qk=torch.zeros(3, 5, 64).half()), r"qk \[T, H \+ HK, D\], v .* must fit, got \(3, 5, 64\)"),
        (dict(v=torch.zeros(3, 3, 64).half()), r"H a multiple of HK, must fit, got .* \(3, 3, 64\)"),
        (dict(out=torch.zeros(3, 4, 64)), "one half precision, got .* torch.float16 and torch.float32"),
        (dict(v=torch.zeros(3, 64, 2).half().mT), "contiguous"),
        (dict(kv_pages=torch.zeros(2, 5, 12, 2, 64).half()), r"P a multiple of 8, .* got \(2, 5, 12, 2, 64\)"),
        (dict(kv_pages=torch.zeros(2, 5, 16, 3, 64).half()), r"HK, D = \(2, 64\), got \(2, 5, 16, 3, 64\)"),
        (dict(kv_pages=torch.zeros(2, 5, 16, 64, 2).half().mT), "contiguous"),
    ],
)
def test_misfits_are_named(change, message):
    qk, v, out = (torch.zeros(3, number, 64).half() for number in (6, 2, 4))
    kv_pages = torch.zeros(2, 5, 16, 2, 64).half()
    with pytest.raises(ValueError, match=message):
        wide_attention_gluon(**dict(qk=qk, v=v, kv_pages=kv_pages, table=None, out=out) | change)
