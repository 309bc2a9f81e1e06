"""RoPE and the store of K and V, kernel and twin, against complex arithmetic in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels.kv_store import HeadNorms, rope_store_kv_torch, rope_store_kv_triton, rope_tables

TOLERANCE = {
    torch.float64: dict(rtol=1e-9, atol=1e-9),
    # an angle of up to LENGTH is rounded to 2 ** -24 of it, twice, and turns a pair of up to 4
    torch.float32: dict(rtol=1e-4, atol=1e-4),
    torch.float16: dict(rtol=2e-3, atol=2e-3),
    torch.bfloat16: dict(rtol=2e-2, atol=2e-2),
}
LENGTH, THETA = 128, 10_000.0


def turned(x, positions, dim=None):
    """The definition: each pair (x_j, x_{j + R/2}) is turned by position / theta^(2j / R). [T, H, D] -> float64."""
    x = x.double().cpu()
    dim = dim or x.shape[-1]
    x, rest = x[..., :dim], x[..., dim:]
    angles = positions.double().cpu()[:, None] * THETA ** (-torch.arange(0, dim, 2).double() / dim)
    pairs = torch.complex(*x.split(dim // 2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([pairs.real, pairs.imag, rest], dim=-1)


def check(
    implementation, device, seed, rows, heads, kv_heads, dim, page_size, with_keys, dtype, rotary=None, normed=False
):
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim, generator=g).to(dtype).to(device)
    before = qkv.clone()
    positions = torch.randint(LENGTH, (rows,), generator=g)
    pages = -(-rows // page_size) + 2
    slots = torch.randperm(pages * page_size, generator=g)[:rows].to(device)
    k_pages, v_pages = (torch.full((pages, page_size, kv_heads, dim), 7.0, dtype=dtype, device=device) for _ in "kv")
    cos_sin = rope_tables(rotary or dim, LENGTH, THETA, dtype, torch.device("cpu"))[positions].to(device)
    of_q, of_k = (1 + torch.rand(2, dim, generator=g)).to(dtype).to(device)
    norms = HeadNorms(of_q, of_k, 1e-3) if normed else None
    out = implementation(qkv, cos_sin, k_pages, v_pages, slots, norms, with_keys)
    assert out.dtype == dtype and torch.equal(qkv, before)
    x = before.double()
    if normed:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        x = torch.cat([x[:, :heads] * of_q.double(), x[:, heads : heads + kv_heads] * of_k.double()], dim=1)
    expected = turned(x, positions, rotary).to(dtype)
    torch.testing.assert_close(out.cpu(), expected[:, : heads + with_keys * kv_heads], **TOLERANCE[dtype])
    k_flat, v_flat = k_pages.view(-1, kv_heads, dim), v_pages.view(-1, kv_heads, dim)
    torch.testing.assert_close(k_flat[slots].cpu(), expected[:, heads : heads + kv_heads], **TOLERANCE[dtype])
    assert torch.equal(v_flat[slots], before[:, heads + kv_heads :])
    others = torch.ones(pages * page_size, dtype=torch.bool, device=device)
    others[slots] = False
    assert (k_flat[others] == 7).all() and (v_flat[others] == 7).all()


shapes = dict(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 9),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (9, 3)]),
    page_size=st.integers(1, 17),
    with_keys=st.booleans(),
)


@given(**shapes, dim=st.integers(1, 20).map(lambda half: 2 * half), dtype=st.sampled_from([*TOLERANCE]))
def test_twin(seed, rows, heads, dim, page_size, with_keys, dtype):
    check(rope_store_kv_torch, "cpu", seed, rows, *heads, dim, page_size, with_keys, dtype)


parts = st.sampled_from([(64, 32), (128, 64), (12, 2), (8, 8), (20, 14), (128, 128)])


@given(**shapes, dims=parts, normed=st.booleans(), dtype=st.sampled_from([*TOLERANCE]))
def test_norms_and_a_part_that_is_turned_twin(seed, rows, heads, dims, page_size, with_keys, dtype, normed):
    check(rope_store_kv_torch, "cpu", seed, rows, *heads, dims[0], page_size, with_keys, dtype, dims[1], normed)


@given(**shapes, dims=parts, normed=st.booleans(), dtype=st.sampled_from([*TOLERANCE][1:]))
def test_norms_and_a_part_that_is_turned(
    device, guarded_empty, seed, rows, heads, dims, page_size, with_keys, dtype, normed
):
    check(rope_store_kv_triton, device, seed, rows, *heads, dims[0], page_size, with_keys, dtype, dims[1], normed)
    guarded_empty.check()


@given(**shapes, dim=st.sampled_from([2, 8, 12, 64, 128]), dtype=st.sampled_from([*TOLERANCE][1:]))
def test_kernel(device, guarded_empty, seed, rows, heads, dim, page_size, with_keys, dtype):
    """A tile of eight heads is less than some shapes have, and not a divisor of others."""
    check(rope_store_kv_triton, device, seed, rows, *heads, dim, page_size, with_keys, dtype)
    guarded_empty.check()


@pytest.mark.parametrize("implementation", [rope_store_kv_torch, rope_store_kv_triton])
def test_tables_in_half_precision_round_each_product(device, implementation):
    """As Hugging Face's apply_rotary_pos_emb does in that dtype, to the bit; float16, which the interpreter rounds."""
    g = torch.Generator().manual_seed(3)
    qkv = torch.randn(50, 3, 64, generator=g).half().to(device)
    table = rope_tables(64, 50, THETA, torch.float16, torch.device("cpu")).to(device)
    pages = torch.zeros(2, 7, 8, 1, 64, dtype=torch.float16, device=device)
    slots = torch.arange(50, device=device)
    q = implementation(qkv, table.half(), pages[0], pages[1], slots)[:, 0]
    (a, b), (cos, sin) = qkv[:, 0].chunk(2, dim=-1), table.half().unbind(1)
    expected = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    assert torch.equal(q, expected)
    wide = implementation(qkv, table, pages[0], pages[1], slots)[:, 0]
    assert (wide != expected).float().mean() > 0.2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(qkv=torch.zeros(3, 4, 8)), r"H \+ 2 HK"),
        (dict(qkv=torch.zeros(3, 6, 16)[:, :, ::2]), "contiguous"),
        (dict(v_pages=torch.zeros(2, 4, 2, 10)), r"\(2, 4, 2, 10\)"),
        (dict(cos_sin=torch.zeros(2, 2, 4)), r"T = 3, got \(2, 2, 4\)"),
        (dict(cos_sin=torch.zeros(3, 2, 5)), r"R <= D, and kv_slots .T., with T = 3, got \(3, 2, 5\)"),
        (dict(norms=HeadNorms(torch.ones(8), torch.ones(4), 1e-6)), r"with D = 8, got \(8,\) and \(4,\)"),
        (dict(kv_slots=torch.zeros(4, dtype=torch.int64)), r"T = 3, got .* and \(4,\)"),
    ],
)
def test_misfits_are_named(change, message):
    right = dict(qkv=torch.zeros(3, 6, 8), cos_sin=torch.zeros(3, 2, 4), kv_slots=torch.arange(3))
    right |= dict(k_pages=torch.zeros(2, 4, 2, 8), v_pages=torch.zeros(2, 4, 2, 8))
    with pytest.raises(ValueError, match=message):
        rope_store_kv_triton(**right | change)
