"""The engine's networks on one sequence, without the engine."""

import numpy as np
import torch

from blockinfer.kernels.segments import Cutting, SegmentTable, cut
from blockinfer.models.transformer import Transformer


@torch.inference_mode()
def logits_of(model: Transformer, tokens: list[int], lengths: list[int] | None = None) -> torch.Tensor:
    """[T, columns]. lengths: of segments, one after the other, each of which sees all up to its own end; by default one
    of all tokens. On the model's device."""
    lengths = lengths or [len(tokens)]
    config, T, page_size = model.config, len(tokens), 8
    device = model.wte.device
    pages = torch.arange(-(-T // page_size), device=device).flip(0)
    ends = np.cumsum(lengths)
    columns = np.zeros(len(ends), dtype=np.int64), ends - lengths, np.array(lengths), ends
    tiles = torch.from_numpy(cut(*columns, Cutting(T, 1), T)).to(device)
    positions = torch.arange(T, device=device)
    table = SegmentTable(
        tiles=tiles,
        num_tiles=torch.tensor([len(tiles)], device=device),
        page_tables=pages[None],
        kv_slots=pages[positions // page_size] * page_size + positions % page_size,
    )
    shape = config.n_layers, 2, len(pages), page_size, config.n_kv_heads, config.head_dim
    kv_pages = torch.full(shape, torch.nan, dtype=model.wte.dtype, device=device)
    attended, residual = torch.empty(2, T, config.d_model, dtype=model.wte.dtype, device=device)
    model(torch.tensor(tokens, device=device), positions, kv_pages, table, attended, residual)
    return model.logits(attended, residual, positions)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of logits: the norm of what they differ by, over that of the expected ones."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
