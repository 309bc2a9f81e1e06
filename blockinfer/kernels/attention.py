"""A layer's attention between its products: RoPE, the store of K and V, and what each segment attends to."""

import torch

from blockinfer.kernels.kv_store import HeadNorms, rope_store_kv
from blockinfer.kernels.paged_attention import paged_attention
from blockinfer.kernels.segments import SegmentTable
from blockinfer.kernels.wide_attention import wide_attention


def attention(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    kv_pages: torch.Tensor,
    table: SegmentTable,
    out: torch.Tensor | None = None,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """qkv [T, H + 2 HK, D]: queries, keys, values -> the attention output, [T, H, D], in `out` if it is given.

    cos_sin [T, 2, R // 2], norms: as for `rope_store_kv`. kv_pages [2, pages, P, HK, D]: the layer's cache. All K and V
    are written before any attention reads them. Wide segments read those of their own rows from qkv, as they have just
    been computed; all others are read from the pages.
    """
    q = rope_store_kv(qkv, cos_sin, *kv_pages, table.kv_slots, norms, table.may_be_wide)
    return attend(q, qkv[:, -kv_pages.shape[3] :], kv_pages, table, out)


def attend(
    q: torch.Tensor, v: torch.Tensor, kv_pages: torch.Tensor, table: SegmentTable, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`attention` after K and V are stored. q [T, H, D], or queries and keys side by side, [T, H + HK, D], if segments
    may be wide; v [T, HK, D]."""
    if not table.may_be_wide:
        return paged_attention(q, *kv_pages, table, out)
    qk, q = q, q[:, : -v.shape[1]]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    wide_attention(qk, v, kv_pages, table, out)
    return paged_attention(q, *kv_pages, table, out)
