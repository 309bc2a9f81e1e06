"""Attention over pages, against dense attention, and the laws that do not need a reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels.kv_store import rope_store_kv, rope_tables
from blockinfer.kernels.paged_attention import SegmentTable, paged_attention


def ragged(seed, lengths, kv_lens, heads, kv_heads, dim, page_size, dtype=torch.float64):
    """q, pages with NaN in every slot that no segment may read, the table, and each segment's dense K and V."""
    g = torch.Generator().manual_seed(seed)
    pages_of = [-(-kv_len // page_size) for kv_len in kv_lens]
    order = torch.randperm(sum(pages_of) + 2, generator=g)
    shape = (len(order), page_size, kv_heads, dim)
    k_pages, v_pages = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    table = torch.zeros(len(lengths), max(pages_of), dtype=torch.int64)
    dense, taken = [], 0
    for i, kv_len in enumerate(kv_lens):
        mine = order[taken : taken + pages_of[i]]
        taken += pages_of[i]
        table[i, : len(mine)] = mine
        kv = torch.randn(2, kv_len, kv_heads, dim, generator=g, dtype=torch.float64).to(dtype)
        slots = (mine[:, None] * page_size + torch.arange(page_size)).flatten()[:kv_len]
        k_pages.view(-1, kv_heads, dim)[slots], v_pages.view(-1, kv_heads, dim)[slots] = kv[0], kv[1]
        dense.append(kv)
    q = torch.randn(sum(lengths), heads, dim, generator=g, dtype=torch.float64).to(dtype)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return q, k_pages, v_pages, SegmentTable(starts, torch.tensor(kv_lens), table, torch.empty(0)), dense


def dense_attention(q, k, v):
    """[T, H, D], [S, HK, D] -> [T, H, D], one query and head at a time."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for h in range(q.shape[1]):
        weights = (q[:, h] @ k[:, h // group].T / q.shape[-1] ** 0.5).softmax(dim=-1)
        out[:, h] = weights @ v[:, h // group]
    return out


segments = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=4)


@given(
    seed=st.integers(0, 2**31),
    sizes=segments,
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    page_size=st.integers(1, 17),
)
def test_equals_dense_attention(seed, sizes, heads, page_size):
    lengths, kv_lens = zip(*sizes, strict=True)
    q, k_pages, v_pages, table, dense = ragged(seed, lengths, kv_lens, *heads, 8, page_size)
    out = paged_attention(q, k_pages, v_pages, table)
    for i, (k, v) in enumerate(dense):
        rows = slice(table.query_starts[i], table.query_starts[i + 1])
        torch.testing.assert_close(out[rows], dense_attention(q[rows], k, v))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("dim", [64, 128])
def test_low_precision_stays_close(dtype, bound, dim):
    args = (3, [33, 1, 7], [65, 1, 200], 4, 2, dim, 16)
    exact = paged_attention(*ragged(*args)[:4])
    out = paged_attention(*ragged(*args, dtype=dtype)[:4])
    assert (out.double() - exact).norm() / exact.norm() < bound


def test_permuting_physical_pages_changes_nothing():
    q, k_pages, v_pages, table, _ = ragged(1, [5, 2], [30, 17], 4, 2, 8, 4)
    new_place = torch.randperm(len(k_pages))
    moved = SegmentTable(table.query_starts, table.kv_lens, new_place[table.page_table], table.kv_slots)
    old_place = new_place.argsort()
    before = paged_attention(q, k_pages, v_pages, table)
    assert torch.equal(before, paged_attention(q, k_pages[old_place], v_pages[old_place], moved))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rope_and_store_write_their_slots_and_no_other(dtype):
    g = torch.Generator().manual_seed(0)
    heads, kv_heads, dim, page_size = 4, 2, 8, 4
    qkv = torch.randn(5, heads + 2 * kv_heads, dim, generator=g).to(dtype)
    positions = torch.tensor([3, 0, 7, 100, 1])
    slots = torch.tensor([9, 0, 5, 22, 14])
    k_pages = torch.full((6, page_size, kv_heads, dim), 7.0, dtype=dtype)
    v_pages = k_pages.clone()
    cos_sin = rope_tables(dim, 128, 10_000.0, dtype, torch.device("cpu"))[positions]
    q = rope_store_kv(qkv.clone(), cos_sin, k_pages, v_pages, slots)
    # the definition: each pair (x_j, x_{j + D/2}) is turned by position / theta^(2j / D)
    angles = positions.double()[:, None] * 10_000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    pairs = torch.complex(*qkv.double().split(dim // 2, dim=-1)) * torch.polar(angles.cos() * 0 + 1, angles)[:, None]
    turned = torch.cat([pairs.real, pairs.imag], dim=-1).to(dtype)
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q, turned[:, :heads], **tolerance)
    k_flat, v_flat = k_pages.view(-1, kv_heads, dim), v_pages.view(-1, kv_heads, dim)
    torch.testing.assert_close(k_flat[slots], turned[:, heads : heads + kv_heads], **tolerance)
    assert torch.equal(v_flat[slots], qkv[:, heads + kv_heads :])
    others = torch.ones(24, dtype=torch.bool)
    others[slots] = False
    assert (k_flat[others] == 7).all() and (v_flat[others] == 7).all()
