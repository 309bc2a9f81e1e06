"""Attention over pages, kernel and twin: against dense attention in float64, and laws that need no reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels.paged_attention import (
    SegmentTable,
    Tiling,
    choose_tiling,
    paged_attention_torch,
    paged_attention_triton,
)

# ||out - exact|| / ||exact|| that a dtype's rounding explains; float32 is no tf32
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
NARROW = [torch.float32, torch.float16, torch.bfloat16]
TILINGS = [Tiling(16, 16, 1), Tiling(16, 16, 3), Tiling(32, 16, 2), Tiling(16, 32, 5)]


def ragged(seed, sizes, heads, kv_heads, dim, page_size, dtype=torch.float64, device="cpu"):
    """q, k_pages, v_pages, table of segments with the (rows, kv_len) of `sizes`, and each one's dense K and V, float64.

    NaN stands in every slot, and the number of no page in every entry of the page table, that may not be read.
    """
    g = torch.Generator().manual_seed(seed)
    pages_of = [-(-kv_len // page_size) for _, kv_len in sizes]
    order = torch.randperm(sum(pages_of) + 2, generator=g)
    shape = (len(order), page_size, kv_heads, dim)
    k_pages, v_pages = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    page_table = torch.full((len(sizes), max(pages_of) + 1), 2**40)
    dense, taken = [], 0
    for i, (_, kv_len) in enumerate(sizes):
        mine = order[taken : taken + pages_of[i]]
        taken += pages_of[i]
        page_table[i, : len(mine)] = mine
        kv = torch.randn(2, kv_len, kv_heads, dim, generator=g, dtype=torch.float64).to(dtype)
        slots = (mine[:, None] * page_size + torch.arange(page_size)).flatten()[:kv_len]
        k_pages.view(-1, kv_heads, dim)[slots], v_pages.view(-1, kv_heads, dim)[slots] = kv[0], kv[1]
        dense.append(kv.double())
    starts = torch.tensor([0, *(rows for rows, _ in sizes)]).cumsum(0)
    q = torch.randn(int(starts[-1]), heads, dim, generator=g, dtype=torch.float64).to(dtype)
    kv_lens = torch.tensor([kv_len for _, kv_len in sizes])
    table = SegmentTable(starts, kv_lens, page_table, torch.zeros(0, dtype=torch.int64))
    table = SegmentTable(*(tensor.to(device) for tensor in table))
    return q.to(device), k_pages.to(device), v_pages.to(device), table, dense


def dense_attention(q, table, dense):
    """[T, H, D] -> [T, H, D] float64, one segment, query head and matrix product at a time."""
    q = q.double().cpu()
    out = torch.zeros_like(q)
    starts = table.query_starts.tolist()
    for i, (k, v) in enumerate(dense):
        rows, group = slice(starts[i], starts[i + 1]), q.shape[1] // k.shape[1]
        for h in range(q.shape[1]):
            weights = (q[rows, h] @ k[:, h // group].T / q.shape[-1] ** 0.5).softmax(dim=-1)
            out[rows, h] = weights @ v[:, h // group]
    return out


def assert_close(out, expected, dtype):
    assert not out.isnan().any()
    error = (out.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < BOUND[dtype], f"relative error {error:.2e}"


# a segment may have no rows: a padded one has none
sizes = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 70)), min_size=1, max_size=3)
heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (6, 2)])


@given(seed=st.integers(0, 2**31), sizes=sizes, heads=heads, dim=st.integers(1, 20), page_size=st.integers(1, 17))
def test_twin_equals_dense_attention(seed, sizes, heads, dim, page_size):
    q, k_pages, v_pages, table, dense = ragged(seed, sizes, *heads, dim, page_size)
    assert_close(paged_attention_torch(q, k_pages, v_pages, table), dense_attention(q, table, dense), torch.float64)


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
    q, k_pages, v_pages, table, dense = ragged(seed, sizes, *heads, dim, page_size, dtype, device)
    out = paged_attention_triton(q, k_pages, v_pages, table, tiling)
    assert out.dtype == dtype and out.shape == q.shape
    assert_close(out, dense_attention(q, table, dense), dtype)
    guarded_empty.check()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (8, 2)])
@pytest.mark.parametrize("dim", [64, 128])
def test_kernel_with_its_own_tiling(device, dtype, heads, kv_heads, dim):
    """A prompt, two blocks of 32, a last block of 5, one row; keys of more than one tile."""
    sizes = [(70, 70), (32, 102), (32, 134), (5, 7), (1, 1)]
    q, k_pages, v_pages, table, dense = ragged(3, sizes, heads, kv_heads, dim, 16, dtype, device)
    assert_close(paged_attention_triton(q, k_pages, v_pages, table), dense_attention(q, table, dense), dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_kernel_with_the_splits_that_it_chooses(device, dtype, monkeypatch):
    """On a GPU of few processors: a block of two rows over 330 keys, and a segment with fewer keys than parts."""
    monkeypatch.setattr("blockinfer.kernels.paged_attention.num_processors", lambda _: 12)
    q, k_pages, v_pages, table, dense = ragged(3, [(2, 330), (1, 3)], 2, 2, 16, 16, dtype, device)
    assert choose_tiling(q, 2, 2, table.page_table.shape[1] * 16).splits == 3
    assert_close(paged_attention_triton(q, k_pages, v_pages, table), dense_attention(q, table, dense), dtype)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("implementation", ["kernel", "twin"])
def test_permuting_physical_pages_changes_nothing(device, implementation, tiling):
    q, k_pages, v_pages, table, _ = ragged(1, [(5, 30), (2, 17)], 4, 2, 8, 4, torch.float32, device)
    new_place = torch.randperm(len(k_pages), generator=torch.Generator().manual_seed(0)).to(device)
    known = torch.where(table.page_table < len(k_pages), table.page_table, 0)
    moved = table._replace(page_table=torch.where(table.page_table == known, new_place[known], table.page_table))
    old_place = new_place.argsort()
    attend = {"kernel": lambda *a: paged_attention_triton(*a, tiling), "twin": paged_attention_torch}[implementation]
    before = attend(q, k_pages, v_pages, table)
    assert torch.equal(before, attend(q, k_pages[old_place], v_pages[old_place], moved))


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
    tensors = ([0, 3], [16], [[pages - 1]], [0, 1, 2])
    table = SegmentTable(*(torch.tensor(value, device=device) for value in tensors))
    out = paged_attention_triton(q, k_pages, k_pages, table)
    assert_close(out, dense_attention(q, table, [k_pages[-1:].expand(2, -1, -1, -1).double().cpu()]), torch.float16)


def test_tilings_fill_the_gpu(monkeypatch):
    """Few segments are split, and a full batch or a short context is not."""
    monkeypatch.setattr("blockinfer.kernels.paged_attention.num_processors", lambda device: 132)
    block = torch.empty(32, 32, 128, dtype=torch.bfloat16)
    long, short = choose_tiling(block, 32, 1, 4096), choose_tiling(block, 32, 1, 160)
    assert long.splits > 1 and short.splits == 1
    assert choose_tiling(block.repeat(32, 1, 1), 32, 32, 4096).splits == 1
    assert choose_tiling(block[:1], 32, 64, 64).splits == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(3, 3, 8)), r"H a multiple of HK, got \(3, 3, 8\)"),
        (dict(k_pages=torch.zeros(2, 4, 2, 16)), r"\(2, 4, 2, 16\)"),
        (dict(v_pages=torch.zeros(2, 4, 2, 8, dtype=torch.float16)), "one dtype, got torch.float32, torch.float32 and"),
        (dict(q=torch.zeros(3, 4, 16)[:, :, ::2]), "contiguous"),
        (dict(v_pages=torch.zeros(2, 4, 8, 2).mT), "contiguous"),
    ],
)
def test_misfits_are_named(change, message):
    q, k_pages, v_pages = torch.zeros(3, 4, 8), torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8)
    table = SegmentTable(*map(torch.tensor, ([0, 3], [4], [[1]], [0, 1, 2])))
    with pytest.raises(ValueError, match=message):
        paged_attention_triton(**dict(q=q, k_pages=k_pages, v_pages=v_pages, table=table) | change)
