"""Attention over pages, kernel and twin: against dense attention in float64, and laws that need no reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels import segments
from blockinfer.kernels.paged_attention import Tiling, paged_attention_torch, paged_attention_triton
from blockinfer.kernels.segments import TILE_COLUMNS, Cutting, SegmentTable, count_tiles, cut, make_scratch

# ||out - exact|| / ||exact|| that a dtype's rounding explains; float32 is no tf32
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
NARROW = [torch.float32, torch.float16, torch.bfloat16]
UNSPLIT = Cutting(8, 0)
# rows and keys of the kernel's tiles, and how many tiles are enough: fewer are split
TILINGS = [(Tiling(16, 16), 1), (Tiling(16, 16), 6), (Tiling(32, 16), 4), (Tiling(16, 32), 9)]


def ragged(
    seed, sizes, heads, kv_heads, dim, page_size, dtype=torch.float64, device="cpu", cutting=UNSPLIT, padded_rows=1
):
    """q, k_pages, v_pages, table of segments with the (rows, kv_len) of `sizes`, and each one's dense K and V, float64.

    The slots are in another order than the segments, and tiles past num_tiles are not to be believed. NaN stands in
    every slot of a page, and the number of no page in every entry of the page tables, that may not be read.
    """
    g = torch.Generator().manual_seed(seed)
    pages_of = [-(-kv_len // page_size) for _, kv_len in sizes]
    order = torch.randperm(sum(pages_of) + 2, generator=g)
    shape = (len(order), page_size, kv_heads, dim)
    k_pages, v_pages = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    page_tables = torch.full((len(sizes) + 1, max(pages_of) + 1), 2**40)
    slots = torch.randperm(len(page_tables), generator=g)[: len(sizes)]
    dense, taken = [], 0
    for i, (_, kv_len) in enumerate(sizes):
        mine = order[taken : taken + pages_of[i]]
        taken += pages_of[i]
        page_tables[slots[i], : len(mine)] = mine
        kv = torch.randn(2, kv_len, kv_heads, dim, generator=g, dtype=torch.float64).to(dtype)
        at = (mine[:, None] * page_size + torch.arange(page_size)).flatten()[:kv_len]
        k_pages.view(-1, kv_heads, dim)[at], v_pages.view(-1, kv_heads, dim)[at] = kv[0], kv[1]
        dense.append(kv.double())
    rows, kv_lens = (np.array(column) for column in zip(*sizes, strict=True))
    q = torch.randn(int(rows.sum()), heads, dim, generator=g, dtype=torch.float64).to(dtype)
    tiles = cut(slots.numpy(), np.zeros_like(rows), rows, kv_lens, cutting, padded_rows)
    lies = np.full((2, tiles.shape[1]), 2**40)
    scratch = make_scratch(cutting, heads, kv_heads, dim, device) if cutting.may_split(padded_rows) else None
    tensors = torch.from_numpy(np.concatenate([tiles, lies])), torch.tensor([len(tiles)]), page_tables
    table = SegmentTable(*(tensor.to(device) for tensor in tensors), kv_slots=None, scratch=scratch)
    return q.to(device), k_pages.to(device), v_pages.to(device), table, list(zip(rows, dense, strict=True))


def dense_attention(q, dense):
    """[T, H, D] -> [T, H, D] float64, one segment, query head and matrix product at a time."""
    q = q.double().cpu()
    out, start = torch.zeros_like(q), 0
    for number, (k, v) in dense:
        rows, group = slice(start, start + number), q.shape[1] // k.shape[1]
        start += number
        for h in range(q.shape[1]):
            weights = (q[rows, h] @ k[:, h // group].T / q.shape[-1] ** 0.5).softmax(dim=-1)
            out[rows, h] = weights @ v[:, h // group]
    return out


def cutting_of(tiling, enough, heads, kv_heads):
    return Cutting(max(1, tiling.block_m // (heads // kv_heads)), enough)


def assert_close(out, expected, dtype):
    assert not out.isnan().any()
    error = (out.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < BOUND[dtype], f"relative error {error:.2e}"


# a segment may have no rows: a padded one has none
sizes = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 70)), min_size=1, max_size=3)
heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (6, 2)])


@given(seed=st.integers(0, 2**31), sizes=sizes, heads=heads, dim=st.integers(1, 20), page_size=st.integers(1, 17))
def test_twin_equals_dense_attention(seed, sizes, heads, dim, page_size):
    q, k_pages, v_pages, table, dense = ragged(seed, sizes, *heads, dim, page_size)
    assert_close(paged_attention_torch(q, k_pages, v_pages, table), dense_attention(q, dense), torch.float64)


@given(
    seed=st.integers(0, 2**31),
    sizes=sizes,
    heads=heads,
    dim=st.sampled_from([64, 128, 8, 12, 80]),
    page_size=st.sampled_from([1, 3, 16, 17, 32]),
    tiling=st.sampled_from(TILINGS),
    dtype=st.sampled_from(NARROW),
)
def test_kernel_equals_dense_attention(device, guarded_empty, seed, sizes, heads, dim, page_size, tiling, dtype):
    tiling, enough = tiling
    cutting = cutting_of(tiling, enough, *heads)
    with pytest.MonkeyPatch.context() as patch:
        # these are few keys, and yet some are to be split
        patch.setattr(segments, "_UNSPLIT_KEYS", 20)
        patch.setattr(segments, "_LEAST_KEYS", 7)
        q, k_pages, v_pages, table, dense = ragged(seed, sizes, *heads, dim, page_size, dtype, device, cutting)
    out = paged_attention_triton(q, k_pages, v_pages, table, tiling=tiling)
    assert out.dtype == dtype and out.shape == q.shape
    assert_close(out, dense_attention(q, dense), dtype)
    guarded_empty.check()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (8, 2)])
@pytest.mark.parametrize("dim", [64, 128])
def test_kernel_with_its_own_tiling(device, dtype, heads, kv_heads, dim):
    """A prompt, two blocks of 32, a last block of 5, one row; keys of more than one tile."""
    sizes = [(70, 70), (32, 134), (5, 7), (1, 1)]
    cutting = Cutting.of(heads, kv_heads, torch.device(device))
    q, k_pages, v_pages, table, dense = ragged(3, sizes, heads, kv_heads, dim, 16, dtype, device, cutting, 140)
    assert_close(paged_attention_triton(q, k_pages, v_pages, table), dense_attention(q, dense), dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_kernel_with_the_parts_of_its_own_cutting(device, dtype, monkeypatch):
    """On a GPU of few processors: a block of two rows over 330 keys, and a segment with too few keys for parts."""
    for module in ("paged_attention", "segments"):
        monkeypatch.setattr(f"blockinfer.kernels.{module}.num_processors", lambda _: 12)
    cutting = Cutting.of(2, 2, torch.device(device))
    q, k_pages, v_pages, table, dense = ragged(3, [(2, 330), (1, 3)], 2, 2, 16, 16, dtype, device, cutting, 3)
    assert table.tiles[: int(table.num_tiles), 5].tolist() == [3, 3, 3, 1]
    assert_close(paged_attention_triton(q, k_pages, v_pages, table), dense_attention(q, dense), dtype)


def test_output_goes_where_it_is_asked_for(device):
    """And rows of no tile stay as they are."""
    q, k_pages, v_pages, table, dense = ragged(3, [(5, 20), (3, 3)], 2, 2, 16, 16, torch.float32, device)
    wide = torch.cat([q, q[:2]])
    for attend in (paged_attention_triton, paged_attention_torch):
        out = torch.full_like(wide, 7.0)
        assert attend(wide, k_pages, v_pages, table, out) is out
        assert (out[len(q) :] == 7).all()
        assert_close(out[: len(q)], dense_attention(q, dense), torch.float32)


@pytest.mark.parametrize("tiling, enough", TILINGS)
@pytest.mark.parametrize("implementation", ["kernel", "twin"])
def test_permuting_physical_pages_changes_nothing(device, implementation, tiling, enough):
    cutting = cutting_of(tiling, enough, 4, 2)
    q, k_pages, v_pages, table, _ = ragged(1, [(5, 300), (2, 17)], 4, 2, 8, 4, torch.float32, device, cutting)
    new_place = torch.randperm(len(k_pages), generator=torch.Generator().manual_seed(0)).to(device)
    known = torch.where(table.page_tables < len(k_pages), table.page_tables, 0)
    moved = torch.where(table.page_tables == known, new_place[known], table.page_tables)
    old_place = new_place.argsort()
    attend = {"kernel": lambda *a: paged_attention_triton(*a, tiling=tiling), "twin": paged_attention_torch}
    before = attend[implementation](q, k_pages, v_pages, table)
    after = attend[implementation](q, k_pages[old_place], v_pages[old_place], table._replace(page_tables=moved))
    assert torch.equal(before, after)


def test_rows_of_a_wider_tensor(device):
    """q may be the first heads of q, k and v together."""
    q, k_pages, v_pages, table, _ = ragged(1, [(5, 30)], 4, 2, 64, 16, torch.float32, device)
    wide = torch.cat([q, torch.full_like(q, torch.nan)], dim=1)[:, :4]
    assert not wide.is_contiguous()
    expected = paged_attention_triton(q, k_pages, v_pages, table)
    assert torch.equal(expected, paged_attention_triton(wide, k_pages, v_pages, table))


def test_nothing_to_do(device):
    q, k_pages, v_pages, table, _ = ragged(1, [(0, 3), (0, 1)], 4, 2, 64, 16, torch.float32, device)
    assert paged_attention_triton(q, k_pages, v_pages, table).shape == (0, 4, 64)


def test_page_numbers_beyond_32_bits(device):
    """An offset past 2 ** 31 elements is reached: the last page of a cache of 4.3 GB, on a GPU."""
    if device == "cpu":
        pytest.skip("needs 4.3 GB of GPU memory")
    pages, page_size, dim = 2**31 // (16 * 64) + 5, 16, 64
    k_pages = torch.zeros(pages, page_size, 1, dim, dtype=torch.float16, device=device)
    k_pages[-1] = torch.randn(page_size, 1, dim, device=device)
    q = torch.randn(3, 1, dim, device=device).half()
    tensors = ([[0, 3, 0, 16, 0, 1, 0]], [1], [[pages - 1]])
    table = SegmentTable(*(torch.tensor(value, device=device) for value in tensors), kv_slots=None)
    out = paged_attention_triton(q, k_pages, k_pages, table)
    kv = k_pages[-1].double().cpu()
    assert_close(out, dense_attention(q, [(3, (kv, kv))]), torch.float16)


def test_a_cut_fills_the_gpu(monkeypatch):
    """Few segments of many keys are split, and a full batch, a short context or a step padded to many rows is not."""
    monkeypatch.setattr("blockinfer.kernels.segments.num_processors", lambda device: 132)
    cutting, grouped = (Cutting.of(32, kv_heads, torch.device("cuda")) for kv_heads in (32, 8))

    def parts(segments, rows, kv_len, padded_rows, cutting=cutting):
        columns = (np.full(segments, value) for value in (0, kv_len - rows, rows, kv_len))
        return cut(*columns, cutting, padded_rows)[:, 5].tolist()

    assert parts(1, 32, 3200, 32) == [4] * 4 and parts(2, 32, 3200, 64) == [2] * 4
    assert parts(1, 32, 160, 32) == parts(1, 32, 256, 32) == parts(1, 32, 3200, 256) == [1]
    # a part has at least 64 keys
    assert parts(1, 32, 257, 32) == [4] * 4 and parts(1, 8, 383, 8, grouped) == [5] * 5
    assert parts(32, 32, 4096, 1024) == [1] * 32 and parts(64, 1, 64, 64) == [1] * 64


@given(
    sizes=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 5000)), min_size=1, max_size=9),
    rows=st.integers(1, 70),
    enough=st.integers(1, 140),
    padded_rows=st.sampled_from([0, 10**6]),
)
def test_a_cut_covers_each_row_and_part_once(sizes, rows, enough, padded_rows):
    segments, kv_lens = (np.array(column) for column in zip(*sizes, strict=True))
    slots, starts = np.arange(len(sizes)) + 7, kv_lens - segments
    tiles = cut(slots, starts, segments, kv_lens, Cutting(rows, enough), padded_rows)
    assert tiles.shape[1] == TILE_COLUMNS.value
    covered, places = [], []
    for first, stop, slot, kv_len, part, parts, place in tiles.tolist():
        assert 0 < stop - first <= rows and kv_len == kv_lens[slot - 7] and 0 <= part < parts
        covered += [(row, slot, part) for row in range(first, stop)] if part == 0 else []
        places += [place + part] if parts > 1 else []
    expected = np.repeat(np.arange(len(sizes)) + 7, segments)
    assert covered == [(row, slot, 0) for row, slot in enumerate(expected)]
    assert count_tiles(tiles) == [len(tiles), 0]
    # each part has a place of its own among those that there are
    assert len(set(places)) == len(places) and all(place < enough for place in places)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(3, 3, 8)), r"H a multiple of HK, got \(3, 3, 8\)"),
        (dict(k_pages=torch.zeros(2, 4, 2, 16)), r"\(2, 4, 2, 16\)"),
        (dict(v_pages=torch.zeros(2, 4, 2, 8, dtype=torch.float16)), "one dtype, got torch.float32, torch.float32 and"),
        (dict(q=torch.zeros(3, 4, 16)[:, :, ::2]), "contiguous"),
        (dict(v_pages=torch.zeros(2, 4, 8, 2).mT), "contiguous"),
        (dict(out=torch.zeros(3, 4, 16)[:, :, ::2]), "out must be contiguous"),
        (dict(out=torch.zeros(2, 4, 8)), r"of q's shape and dtype, got \(2, 4, 8\)"),
        (dict(tiling=Tiling(16, 16)), r"parts of tiles are \[2, 16, 8\], the scratch memory is for \[2, 64, 8\]"),
    ],
)
def test_misfits_are_named(change, message):
    q, k_pages, v_pages = torch.zeros(3, 4, 8), torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8)
    tensors = map(torch.tensor, ([[0, 3, 0, 4, 0, 1, 0]], [1], [[1]]))
    table = SegmentTable(*tensors, kv_slots=None, scratch=make_scratch(Cutting(32, 8), 4, 2, 8, "cpu"))
    with pytest.raises(ValueError, match=message):
        paged_attention_triton(**dict(q=q, k_pages=k_pages, v_pages=v_pages, table=table) | change)
