"""RoPE on the queries and keys, and the store of K and V into pages. Keys are cached rotated: positions never move."""

import torch


def rope_tables(head_dim: int, length: int, theta: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """cos and sin of every position's angles, [length, 2, head_dim // 2] (RoFormer, arXiv 2104.09864).

    The angles are computed in float32, as the published models were trained with, and in float64 for a float64 model.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=wide, device=device) / head_dim)
    angles = torch.arange(length, dtype=wide, device=device)[:, None] * inverse
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def rope_store_kv(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_slots: torch.Tensor,
) -> torch.Tensor:
    """Rotates q and k, writes k and v to their pages, and returns the rotated q [T, H, D].

    qkv [T, H + 2 HK, D]: queries, keys, values. cos_sin [T, 2, D // 2]: the rows of `rope_tables` for these tokens.
    k_pages, v_pages [pages, P, HK, D], written in place. kv_slots [T] int64: page * P + offset, all different.
    """
    kv_heads = k_pages.shape[2]
    heads = qkv.shape[1] - 2 * kv_heads
    rotated = _rotate(qkv[:, : heads + kv_heads], cos_sin)
    k_pages.view(-1, *k_pages.shape[2:]).index_copy_(0, kv_slots, rotated[:, heads:])
    v_pages.view(-1, *v_pages.shape[2:]).index_copy_(0, kv_slots, qkv[:, heads + kv_heads :])
    return rotated[:, :heads]


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, D], the half-rotation form: (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of D."""
    cos, sin = cos_sin[:, 0, None], cos_sin[:, 1, None]
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
