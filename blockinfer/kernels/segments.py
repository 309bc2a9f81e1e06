"""The attention work of a step, as data: a batch of segments, cut into tiles.

The kernels of `paged_attention` and `wide_attention` walk the list of tiles with a grid of fixed size. So one CUDA
graph serves all batches with the same number of rows, whatever their segments are.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from blockinfer.kernels.backend import num_processors

# Query rows of a tile, times the heads that share a KV head: as tall as the matrix units take.
BLOCK_M = 64
# Up to this many keys, splitting costs as much as it saves (measured on an H100).
_UNSPLIT_KEYS, _LEAST_KEYS, MOST_PARTS = 256, 64, 16

# A tile's columns: its first row and the one past its last; the row of its sequence in the page tables; its keys; the
# index of its part, and the number of parts; where the first part's output is kept. A tile of a wide segment has no
# parts: PART is the number of keys before the segment's rows, PARTS is 0, and PLACE is the first of these rows.
FIRST, STOP, SLOT, KV_LEN, PART, PARTS, PLACE, TILE_COLUMNS = (tl.constexpr(i) for i in range(8))


def softmax_scale(head_dim: int) -> float:
    """1 / sqrt(D) times log2(e): the kernels' exponentials are powers of two."""
    return math.log2(math.e) / head_dim**0.5


class Scratch(NamedTuple):
    """Buffers for the parts of tiles until they are combined, float32: their outputs [parts, HK, M, D], and the base-2
    logarithms of their softmax's denominators [parts, HK, M], M query rows and heads."""

    outputs: torch.Tensor
    log_sums: torch.Tensor


class SegmentTable(NamedTuple):
    """Segments over T query rows, as tensors on the model's device.

    tiles [I, TILE_COLUMNS] int64: from `cut`. num_tiles [2] int64: how many are for `paged_attention` and, after these,
    for `wide_attention`; the rest of tiles may hold anything.
    page_tables [slots, N] int64: the pages of every slot's sequence in order; entries past ceil(kv_len / P) may hold
    anything. kv_slots [T] int64: where each row's own K and V go, page * P + offset. scratch: from `make_scratch`; None
    where no tile is in parts. may_be_wide: whether there may be tiles of `wide_attention`.
    """

    tiles: torch.Tensor
    num_tiles: torch.Tensor
    page_tables: torch.Tensor
    kv_slots: torch.Tensor
    scratch: Scratch | None = None
    may_be_wide: bool = False


class Cutting(NamedTuple):
    """How segments are cut: query rows of a tile, and how many tiles keep all processors busy.

    A segment is wide, and left to `wide_attention` in tiles of wide_rows, if it has at least least_wide rows and these
    are all keys that it attends to, or the last of them and too many for `may_split`. If wide_rows is 0, none is.
    """

    rows: int
    enough: int
    wide_rows: int = 0
    least_wide: int = 1

    @classmethod
    def of(cls, heads: int, kv_heads: int, device: torch.device) -> "Cutting":
        """What the kernel works best with."""
        return cls(max(1, BLOCK_M // (heads // kv_heads)), max(1, num_processors(device) // kv_heads))

    def may_split(self, rows: int | np.ndarray) -> bool | np.ndarray:
        """Whether a step of this many rows, padding included, may have tiles in parts; of each number in an array."""
        return 2 * rows <= self.rows * self.enough


def cut(
    slots: np.ndarray, starts: np.ndarray, rows: np.ndarray, kv_lens: np.ndarray, cutting: Cutting, padded_rows: int
) -> np.ndarray:
    """S segments, one after the other, each [S] int64 -> their tiles, [I, TILE_COLUMNS] int64, those of wide segments
    last. starts: the position of a segment's first row.

    A tile belongs to one segment. If there are at most half as many tiles as processors, and padded_rows (the rows of
    the step after padding) allows it, tiles with many keys are split into parts.
    """
    segments = np.stack([rows.cumsum() - rows, rows, slots, kv_lens], axis=1)
    many = (rows >= cutting.least_wide) & ((starts == 0) | ~cutting.may_split(rows))
    is_wide = (starts + rows == kv_lens) & many & (cutting.wide_rows > 0)
    tiles = _split(_tiles(segments[~is_wide], cutting.rows), cutting, padded_rows)
    if not is_wide.any():
        return tiles
    wide = _tiles(segments[is_wide], cutting.wide_rows)
    return np.concatenate([tiles, wide])


def count_tiles(tiles: np.ndarray) -> list[int]:
    """How many of the tiles from `cut` are for `paged_attention`, and how many for `wide_attention`."""
    wide = int((tiles[:, PARTS.value] == 0).sum())
    return [len(tiles) - wide, wide]


def _tiles(segments: np.ndarray, rows_of_tile: int) -> np.ndarray:
    """segments [S, 4] int64: first row, rows, slot, keys -> their tiles, with PART and PLACE as for wide segments."""
    first, rows, slots, kv_lens = segments.T
    counts = -(-rows // rows_of_tile)
    segment = np.repeat(np.arange(len(rows)), counts)
    index = np.arange(len(segment)) - np.repeat(counts.cumsum() - counts, counts)
    tiles = np.zeros((len(segment), TILE_COLUMNS.value), dtype=np.int64)
    tiles[:, FIRST.value] = first[segment] + index * rows_of_tile
    tiles[:, STOP.value] = np.minimum(tiles[:, FIRST.value] + rows_of_tile, (first + rows)[segment])
    tiles[:, SLOT.value] = slots[segment]
    tiles[:, KV_LEN.value] = kv_lens[segment]
    tiles[:, PART.value] = (kv_lens - rows)[segment]
    tiles[:, PLACE.value] = first[segment]
    return tiles


def _split(tiles: np.ndarray, cutting: Cutting, padded_rows: int) -> np.ndarray:
    """Tiles of `paged_attention`, in parts where that helps."""
    most = min(cutting.enough // max(1, len(tiles)), MOST_PARTS) if cutting.may_split(padded_rows) else 1
    if most < 2:
        tiles[:, PART.value], tiles[:, PARTS.value] = 0, 1
        return tiles
    kv_len = tiles[:, KV_LEN.value]
    parts = np.where(kv_len > _UNSPLIT_KEYS, np.minimum(kv_len // _LEAST_KEYS, most), 1).clip(1)
    tiles[:, PARTS.value] = parts
    tiles[:, PLACE.value] = place = parts.cumsum() - parts
    tiles = tiles.repeat(parts, axis=0)
    tiles[:, PART.value] = np.arange(len(tiles)) - place.repeat(parts)
    return tiles


def make_scratch(cutting: Cutting, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> Scratch:
    """Buffers for the parts of all tiles that `cut` splits."""
    shape = cutting.enough, kv_heads, triton.next_power_of_2(cutting.rows * (heads // kv_heads))
    outputs = torch.empty((*shape, head_dim), dtype=torch.float32, device=device)
    return Scratch(outputs, torch.empty(shape, dtype=torch.float32, device=device))
