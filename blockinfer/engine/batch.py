"""The index tensors of one forward, made from what the scheduler chose."""

from dataclasses import dataclass

import torch

from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.kernels.paged_attention import SegmentTable


@dataclass(frozen=True)
class ForwardBatch:
    """T rows in S segments of B sequences, on the model's device; all index tensors are int64.

    slots [T]: each row's sequence slot. positions [T]: its position there. segments: for the attention.
    block_slots, block_starts, block_lengths, block_rows [B]: each sequence's slot, its block's first position and
    length, and the row of that position; a block's rows follow each other.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    segments: SegmentTable
    block_slots: torch.Tensor
    block_starts: torch.Tensor
    block_lengths: torch.Tensor
    block_rows: torch.Tensor


def build_batch(scheduled: list[ScheduledSequence], page_size: int, device: torch.device) -> ForwardBatch:
    """Lays the segments' rows one after the other and finds every row's page slot."""
    pairs = [(sequence, segment) for sequence, segments in scheduled for segment in segments]
    starts = torch.tensor([segment.start for _, segment in pairs])
    lengths = torch.tensor([segment.stop - segment.start for _, segment in pairs])
    query_starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    width = max(len(sequence.pages) for sequence, _ in pairs)
    page_table = torch.tensor([sequence.pages + [0] * (width - len(sequence.pages)) for sequence, _ in pairs])

    owner = torch.repeat_interleave(torch.arange(len(pairs)), lengths)
    positions = torch.arange(len(owner)) - (query_starts[:-1] - starts)[owner]
    kv_slots = page_table[owner, positions // page_size] * page_size + positions % page_size

    last_segments = torch.tensor([len(segments) for _, segments in scheduled]).cumsum(0) - 1
    block_starts = torch.tensor([sequence.block_start for sequence, _ in scheduled])
    block_ends = torch.tensor([sequence.block_end for sequence, _ in scheduled])
    tensors = {
        "slots": torch.tensor([sequence.slot for sequence, _ in pairs])[owner],
        "positions": positions,
        "block_slots": torch.tensor([sequence.slot for sequence, _ in scheduled]),
        "block_starts": block_starts,
        "block_lengths": block_ends - block_starts,
        "block_rows": query_starts[last_segments] + block_starts - starts[last_segments],
    }
    kv_lens = torch.tensor([segment.kv_len for _, segment in pairs])
    table = SegmentTable(query_starts, kv_lens, page_table, kv_slots)
    return ForwardBatch(
        segments=SegmentTable(*(tensor.to(device) for tensor in table)),
        **{name: tensor.to(device) for name, tensor in tensors.items()},
    )
