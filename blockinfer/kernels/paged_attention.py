"""Attention of segments over paged K and V: the one attention that every decoding mode uses.

Paging follows vLLM's PagedAttention (arXiv 2309.06180). There is no mask: a query sees all keys below its segment's
kv_len.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class SegmentTable(NamedTuple):
    """S segments over T query rows, as tensors on the model's device.

    query_starts [S + 1] int64: segment i owns rows query_starts[i] .. query_starts[i + 1] - 1.
    kv_lens [S] int64. page_table [S, N] int64: the pages of the segment's sequence in order; entries past
    ceil(kv_len / P) are not read. kv_slots [T] int64: where each row's own K and V go, page * P + offset.
    """

    query_starts: torch.Tensor
    kv_lens: torch.Tensor
    page_table: torch.Tensor
    kv_slots: torch.Tensor


def paged_attention(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, table: SegmentTable) -> torch.Tensor:
    """q [T, H, D]; k_pages, v_pages [pages, P, HK, D], H a multiple of HK -> [T, H, D]. Scale 1 / sqrt(D).

    Slots at or past kv_len are never read, so they may hold anything.
    """
    out = torch.empty_like(q)
    starts, kv_lens = table.query_starts.tolist(), table.kv_lens.tolist()
    page_size = k_pages.shape[1]
    grouped = q.shape[1] != k_pages.shape[2]
    for i, kv_len in enumerate(kv_lens):
        rows = slice(starts[i], starts[i + 1])
        pages = table.page_table[i, : -(-kv_len // page_size)]
        k = k_pages[pages].flatten(0, 1)[:kv_len]
        v = v_pages[pages].flatten(0, 1)[:kv_len]
        out[rows] = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], enable_gqa=grouped
        )[0].transpose(0, 1)
    return out
