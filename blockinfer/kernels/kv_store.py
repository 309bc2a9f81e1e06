"""RoPE on queries and keys, and the store of K and V into pages. Keys are cached rotated: positions never move.

In some networks each head of a query and key first goes through an RMSNorm, and RoPE rotates only its first dimensions.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from blockinfer.kernels.backend import begin, launch_options, runs_triton


def rope_tables(head_dim: int, length: int, theta: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """cos and sin of every position's angles, [length, 2, head_dim // 2] (RoFormer, arXiv 2104.09864).

    The angles are computed in float32, as the published models were trained with, and in float64 for a float64 model.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = torch.arange(length, dtype=wide, device=device)[:, None] * rope_frequencies(head_dim, theta, wide, device)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def rope_frequencies(head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Radians a position by which each pair of dimensions is turned, [head_dim // 2]."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim)


class HeadNorms(NamedTuple):
    """Weights of the norms of a query's and of a key's head, [D] each, the same for all heads."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


def rope_store_kv(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_slots: torch.Tensor,
    norms: HeadNorms | None = None,
    with_keys: bool = False,
) -> torch.Tensor:
    """Rotates q and k, writes k and v to their pages, and returns the rotated q [T, H, D]; if with_keys, q and k side
    by side, [T, H + HK, D].

    qkv [T, H + 2 HK, D]: queries, keys, values. cos_sin [T, 2, R // 2]: the rows of `rope_tables` for these tokens, in
    at least float32 or in qkv's dtype; products and sums are rounded to its dtype. The first R <= D dimensions are
    rotated. k_pages, v_pages [pages, P, HK, D], written in place. kv_slots [T] int64: page * P + offset, all different.
    """
    implementation = rope_store_kv_triton if runs_triton(qkv) else rope_store_kv_torch
    return implementation(qkv, cos_sin, k_pages, v_pages, kv_slots, norms, with_keys)


def rope_store_kv_torch(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_slots: torch.Tensor,
    norms: HeadNorms | None = None,
    with_keys: bool = False,
) -> torch.Tensor:
    """The twin."""
    kv_heads = k_pages.shape[2]
    heads = qkv.shape[1] - 2 * kv_heads
    rotated = qkv[:, : heads + kv_heads]
    if norms is not None:
        weights = torch.cat([norms.q.expand(heads, -1), norms.k.expand(kv_heads, -1)])
        rotated = _normed(rotated, norms.eps) * weights
    rotated = _rotate(rotated, cos_sin)
    k_pages.view(-1, *k_pages.shape[2:]).index_copy_(0, kv_slots, rotated[:, heads:])
    v_pages.view(-1, *v_pages.shape[2:]).index_copy_(0, kv_slots, qkv[:, heads + kv_heads :])
    return rotated if with_keys else rotated[:, :heads]


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, D], the half-rotation form: (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of D."""
    cos, sin = cos_sin[:, 0, None], cos_sin[:, 1, None]
    half = cos.shape[-1]
    a, b, rest = x.to(cos.dtype).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def _normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rope_store_kv_triton(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_slots: torch.Tensor,
    norms: HeadNorms | None = None,
    with_keys: bool = False,
    block_h: int = 8,
) -> torch.Tensor:
    """The kernel: a program turns or copies `block_h` heads of a row. Raises ValueError as `paged_attention_triton`."""
    rows, all_heads, head_dim = qkv.shape
    kv_heads = k_pages.shape[2]
    heads = all_heads - 2 * kv_heads
    if k_pages.shape != v_pages.shape or k_pages.shape[3] != head_dim or heads < 1 or head_dim % 2:
        shapes = f"{tuple(qkv.shape)}, {tuple(k_pages.shape)} and {tuple(v_pages.shape)}"
        raise ValueError(f"qkv [T, H + 2 HK, D], D even, must fit k_pages and v_pages [pages, P, HK, D], got {shapes}")
    half = cos_sin.shape[-1]
    if cos_sin.shape != (rows, 2, half) or not 0 < half <= head_dim // 2 or kv_slots.shape != (rows,):
        shapes = f"{tuple(cos_sin.shape)} and {tuple(kv_slots.shape)}"
        raise ValueError(f"cos_sin must be [T, 2, R // 2], R <= D, and kv_slots [T], with T = {rows}, got {shapes}")
    weights = () if norms is None else (norms.q, norms.k)
    if any(weight.shape != (head_dim,) for weight in weights):
        shapes = " and ".join(str(tuple(weight.shape)) for weight in weights)
        raise ValueError(f"the weights of both norms must be [D], with D = {head_dim}, got {shapes}")
    if not all(tensor.is_contiguous() for tensor in (qkv, cos_sin, k_pages, v_pages, kv_slots, *weights)):
        raise ValueError("qkv, cos_sin, k_pages, v_pages, kv_slots and the norms' weights must be contiguous")
    kept = heads + with_keys * kv_heads
    out = torch.empty((rows, kept, head_dim), dtype=qkv.dtype, device=qkv.device)
    _rope_store_kv_kernel[(rows, triton.cdiv(all_heads, block_h))](
        qkv,
        cos_sin,
        out,
        k_pages,
        v_pages,
        kv_slots,
        *(weights or (None, None)),
        0.0 if norms is None else norms.eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        KEPT=kept,
        HALF=half,
        REST=head_dim - 2 * half,
        NORMED=norms is not None,
        BLOCK_H=block_h,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * half)),
        # a product and a difference in half precision would become one operation, which does not round the product
        enable_fp_fusion=cos_sin.dtype == torch.float32,
        **launch_options(qkv.device),
    )
    return out


@triton.jit
def _rope_store_kv_kernel(
    qkv_ptr,
    cos_sin_ptr,
    out_ptr,
    k_ptr,
    v_ptr,
    kv_slots_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KEPT: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)  # grid (T, tiles of heads)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_HALF)
    D: tl.constexpr = 2 * HALF + REST
    ALL_HEADS: tl.constexpr = HEADS + 2 * KV_HEADS
    inside = (head < ALL_HEADS)[:, None] & (d < HALF)[None, :]

    # a and b: the halves of what is turned of each head, [BLOCK_H, BLOCK_HALF]
    where = qkv_ptr + (row * ALL_HEADS + head)[:, None] * D + d[None, :]
    a = tl.load(where, mask=inside, other=0.0)
    b = tl.load(where + HALF, mask=inside, other=0.0)
    cos = tl.load(cos_sin_ptr + row * 2 * HALF + d, mask=d < HALF, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + row * 2 * HALF + HALF + d, mask=d < HALF, other=0.0)[None, :]
    if REST > 0:
        e = 2 * HALF + tl.arange(0, BLOCK_REST)
        rest_inside = (head < ALL_HEADS)[:, None] & (e < D)[None, :]
        rest = tl.load(qkv_ptr + (row * ALL_HEADS + head)[:, None] * D + e[None, :], mask=rest_inside, other=0.0)
        normed_rest = rest
    normed_a, normed_b = a, b
    if NORMED:
        squares = tl.sum(_square(a) + _square(b), axis=1)
        if REST > 0:
            squares += tl.sum(_square(rest), axis=1)
        root = tl.rsqrt(squares / D + eps)[:, None]
        of_q = (head < HEADS)[:, None]
        normed_a = _normed_part(a, root, of_q, q_norm_ptr, k_norm_ptr, d, d < HALF)
        normed_b = _normed_part(b, root, of_q, q_norm_ptr, k_norm_ptr, HALF + d, d < HALF)
        if REST > 0:
            normed_rest = _normed_part(rest, root, of_q, q_norm_ptr, k_norm_ptr, e, e < D)
    turned_a = (_product(normed_a, cos) - _product(normed_b, sin)).to(a.dtype)
    turned_b = (_product(normed_b, cos) + _product(normed_a, sin)).to(a.dtype)

    is_kept = inside & (head < KEPT)[:, None]
    out_at = out_ptr + (row * KEPT + head)[:, None] * D + d[None, :]
    tl.store(out_at, turned_a, mask=is_kept)
    tl.store(out_at + HALF, turned_b, mask=is_kept)

    slot = tl.load(kv_slots_ptr + row)
    is_k = inside & ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None]
    k_at = k_ptr + (slot * KV_HEADS + head - HEADS)[:, None] * D + d[None, :]
    tl.store(k_at, turned_a, mask=is_k)
    tl.store(k_at + HALF, turned_b, mask=is_k)

    is_v = inside & (head >= HEADS + KV_HEADS)[:, None]
    v_at = v_ptr + (slot * KV_HEADS + head - HEADS - KV_HEADS)[:, None] * D + d[None, :]
    tl.store(v_at, a, mask=is_v)
    tl.store(v_at + HALF, b, mask=is_v)

    if REST > 0:
        in_out, in_k = (head < KEPT)[:, None], ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None]
        in_v = (head >= HEADS + KV_HEADS)[:, None]
        out_at = out_ptr + (row * KEPT + head)[:, None] * D + e[None, :]
        tl.store(out_at, normed_rest, mask=rest_inside & in_out)
        k_at = k_ptr + (slot * KV_HEADS + head - HEADS)[:, None] * D + e[None, :]
        tl.store(k_at, normed_rest, mask=rest_inside & in_k)
        v_at = v_ptr + (slot * KV_HEADS + head - HEADS - KV_HEADS)[:, None] * D + e[None, :]
        tl.store(v_at, rest, mask=rest_inside & in_v)


@triton.jit
def _product(x, table):
    """Rounded to the table's dtype, as float32."""
    return (x.to(tl.float32) * table.to(tl.float32)).to(table.dtype).to(tl.float32)


@triton.jit
def _square(x):
    return x.to(tl.float32) * x.to(tl.float32)


@triton.jit
def _normed_part(x, root, of_q, q_norm_ptr, k_norm_ptr, d, inside):
    """Dimensions d of heads, normed: rounded before the weight and after it."""
    of_heads = tl.load(q_norm_ptr + d, mask=inside, other=0.0)[None, :]
    weight = tl.where(of_q, of_heads, tl.load(k_norm_ptr + d, mask=inside, other=0.0)[None, :])
    normed = (x.to(tl.float32) * root).to(x.dtype).to(tl.float32)
    return (normed * weight.to(tl.float32)).to(x.dtype)
