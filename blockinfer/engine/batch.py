"""The indices that a step's forward needs, packed into one tensor so that one copy transfers them to the device."""

import struct
from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
import torch

from blockinfer.decoding.unmasking import RULES
from blockinfer.decoding.windows import OpenBlock
from blockinfer.engine.resident import Plan
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.sequence import Sequence
from blockinfer.kernels.segments import TILE_COLUMNS, Cutting, count_tiles, cut
from blockinfer.kernels.slots import Blocks, SlotOptions

_FIELDS, _STEP_FIELDS = len(Blocks._fields), Blocks._fields.index("slots")


class StepInputs(NamedTuple):
    """A step's indices, int64, on the model's device: views of the tensor that `pack` made.

    num_tiles [2], tiles [I, TILE_COLUMNS]: the attention tiles (kernels.segments) and how many of each kind are valid.
    blocks: the fields of each open block, each [B], B at least the number of open blocks. slots, positions [T]: those
    of each row, T at least the number of rows; padding rows use the scrap slot.
    """

    num_tiles: torch.Tensor
    blocks: Blocks
    slots: torch.Tensor
    positions: torch.Tensor
    tiles: torch.Tensor

    @classmethod
    def split(cls, packed: torch.Tensor, blocks: int, rows: int) -> "StepInputs":
        """packed: the result of `pack` for these numbers of blocks and rows; it may be longer."""
        start = _header(blocks)
        tiles = packed[start + 2 * rows :]
        return cls(
            num_tiles=packed[:2],
            blocks=Blocks(*packed[2:start].view(_FIELDS, blocks)),
            slots=packed[start : start + rows],
            positions=packed[start + rows : start + 2 * rows],
            tiles=tiles[: len(tiles) // TILE_COLUMNS.value * TILE_COLUMNS.value].view(-1, TILE_COLUMNS.value),
        )


def _header(blocks: int) -> int:
    # starts with an even count, like all parts, so every view has the same alignment
    return 2 + _FIELDS * blocks


def packed_size(blocks: int, rows: int, cutting: Cutting) -> int:
    """The most numbers that a step of these blocks and rows packs: each row may be a tile, and a few may be split."""
    return _header(blocks) + 2 * rows + TILE_COLUMNS.value * (rows + cutting.enough)


def step_columns(blocks: int) -> slice:
    """The part of a packed tensor that changes from step to step of a block: what `pack_steps` makes."""
    return slice(2, 2 + _STEP_FIELDS * blocks)


def pack_steps(scheduled: Items[ScheduledSequence], blocks: int) -> np.ndarray:
    """The columns of Blocks that change from step to step of a block, concatenated, int64."""
    columns = np.zeros((_STEP_FIELDS, blocks), dtype=np.int64)
    steps = [block for sequence, _ in denoised(scheduled) for block in sequence.next_step()]
    columns[:4, : len(steps)] = np.array(steps, dtype=np.int64).reshape(-1, 4).T
    columns[4] = columns[3].cumsum() - columns[3]
    return columns.ravel()


def denoised(scheduled: Items[ScheduledSequence]) -> Items[ScheduledSequence]:
    """The entries that have blocks; scoring rows have none."""
    return [entry for entry in scheduled if isinstance(entry.sequence, Sequence)]


def lane_rows(scheduled: Items[ScheduledSequence]) -> list[range]:
    """Each sequence's own rows in the forward; if it has a shadow, as many rows of the shadow follow."""
    rows, number = [], 0
    for sequence, plan in scheduled:
        rows.append(range(number, number + plan.rows // sequence.lanes))
        number += plan.rows
    return rows


def open_blocks(scheduled: Items[ScheduledSequence]) -> list[tuple[Sequence, Plan, OpenBlock, int]]:
    """Each open block with its sequence, its plan, and the row of its first position. A plan's last segment contains
    these blocks."""
    return [
        (sequence, plan, block, rows.stop - (plan.segments[-1].stop - block.start))
        for (sequence, plan), rows in zip(scheduled, lane_rows(scheduled), strict=True)
        for block in sequence.window
    ]


def pack(scheduled: Items[ScheduledSequence], blocks: int, rows: int, scrap_slot: int, cutting: Cutting) -> np.ndarray:
    """StepInputs for B = blocks and T = rows, which may exceed what is scheduled, concatenated, int64.

    `step_columns` stay 0.
    """
    spans = [
        (slot, start, stop - start, kv_len)
        for sequence, plan in scheduled
        for slot in (sequence.slot, sequence.shadow_slot)[: sequence.lanes]
        for start, stop, kv_len in plan.segments
    ]
    fixed, first_rows = [], (row for *_, row in open_blocks(scheduled))
    for sequence, plan in scheduled:
        window = len(fixed), len(fixed) + plan.blocks - 1
        for block in sequence.window:
            place = block.start - sequence.prompt_len
            fixed.append((sequence.slot, block.start, block.stop - block.start, next(first_rows), place, 0, *window))
    slots, starts, lengths, kv_lens = np.array(spans, dtype=np.int64).T
    tiles = cut(slots, starts, lengths, kv_lens, cutting, rows)
    start = _header(blocks)
    packed = np.zeros(start + 2 * rows + tiles.size, dtype=np.int64)
    packed[:2] = count_tiles(tiles)
    columns = packed[step_columns(blocks).stop : start].reshape(-1, blocks)
    columns[0] = scrap_slot
    columns[6:] = np.arange(blocks)
    columns[:, : len(fixed)] = np.array(fixed, dtype=np.int64).reshape(-1, 8).T
    columns[5] = columns[2].cumsum() - columns[2]
    row_slots, positions = packed[start : start + 2 * rows].reshape(2, rows)
    number = int(lengths.sum())
    row_slots[:number], row_slots[number:] = slots.repeat(lengths), scrap_slot
    positions[:number] = (starts - lengths.cumsum() + lengths).repeat(lengths) + np.arange(number)
    packed[start + 2 * rows :] = tiles.ravel()
    return packed


def layout(scheduled: Items[ScheduledSequence]) -> list:
    """What a packed tensor depends on besides its sizes."""
    return [(s.request_id, s.slot, plan) for s, plan in scheduled]


def slot_options(sequence: Sequence) -> list[int]:
    """A sequence's SamplingParams as `SlotOptions` stores them."""
    params = sequence.params
    rule = RULES[params.unmasking]
    options = SlotOptions(
        rank=rule.rank,
        choice=rule.choice,
        value=_float_bits(rule.choice_option(params.rule_value)),
        temperature=_float_bits(params.temperature),
        seed=sequence.seed - 2**64 if sequence.seed >= 2**63 else sequence.seed,
        forbid_eos=params.logits_eos_inf,
        eos_last=params.confidence_eos_eot_inf,
    )
    return [int(option) for option in options]


def _float_bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]
