"""What a step's forward needs to know: its sizes, and its indices as one tensor, which a single copy brings over."""

import struct
from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
import torch

from blockinfer.decoding.unmasking import RULES
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.sequence import Sequence
from blockinfer.kernels.unmasking import Blocks


class StepShape(NamedTuple):
    """The sizes of a step, which with its features decide which kernels it launches, and on what.

    rows T and segments S of the forward; blocks B, one a sequence, padded to block_length L; masked_rows N, which go
    through the LM head; max_kv_len: no segment's kv_len is larger. rules: the unmasking rules that some sequence uses;
    features: what else only some sequences ask for, of "noise", "eos_inf" and "eos_eot_last".
    """

    rows: int
    segments: int
    blocks: int
    block_length: int
    masked_rows: int
    max_kv_len: int
    rules: frozenset[str]
    features: frozenset[str]

    def padded(self, max_model_len: int) -> "StepShape":
        """The next larger shape of those that a CUDA graph is captured for."""
        return self._replace(
            rows=_bucket(self.rows),
            segments=_power_of_two(self.segments),
            blocks=_power_of_two(self.blocks),
            masked_rows=_bucket(self.masked_rows),
            max_kv_len=min(_power_of_two(max(self.max_kv_len, 256)), max_model_len),
        )


class StepInputs(NamedTuple):
    """A step's indices, int64, on the model's device. Slots are rows of the device's state, one a running sequence.

    slots, positions [T]: each row's. query_starts [S + 1], segment_slots, kv_lens [S]: segment i has the rows from
    query_starts[i] to query_starts[i + 1]. blocks: what is known of each sequence's block.

    What pads a tensor belongs to the scrap slot, and to no segment.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    query_starts: torch.Tensor
    segment_slots: torch.Tensor
    kv_lens: torch.Tensor
    blocks: Blocks

    @staticmethod
    def sizes(shape: StepShape) -> list[int]:
        """The lengths of the tensors, in their order."""
        blocks = [shape.blocks] * len(Blocks._fields)
        return [shape.rows] * 2 + [shape.segments + 1] + [shape.segments] * 2 + blocks

    @staticmethod
    def largest(rows: int, blocks: int) -> int:
        """The most numbers that a padded step of at most so many rows and blocks packs: each row may be a segment."""
        segments, blocks = _power_of_two(rows), _power_of_two(blocks)
        return 2 * rows + 3 * segments + 1 + len(Blocks._fields) * blocks

    @classmethod
    def step_columns(cls, shape: StepShape) -> slice:
        """Where in a packed tensor the columns of `_StepColumns` are, all that changes from step to step of a block."""
        first = len(cls._fields) - 1 + Blocks._fields.index(_StepColumns._fields[0])
        start = sum(cls.sizes(shape)[:first])
        return slice(start, start + len(_StepColumns._fields) * shape.blocks)

    @classmethod
    def split(cls, packed: torch.Tensor, shape: StepShape) -> "StepInputs":
        """The views of what `pack` made."""
        tensors = packed.split(cls.sizes(shape))
        first = len(cls._fields) - 1
        return cls(*tensors[:first], blocks=Blocks(*tensors[first:]))


class _StepColumns(NamedTuple):
    """What of Blocks changes from step to step, in its order, one after the other there."""

    steps: int
    counts: int
    last_steps: bool
    masked_counts: int

    @classmethod
    def of(cls, sequence: Sequence) -> "_StepColumns":
        return cls(sequence.step, sequence.reveal_count(), sequence.is_last_step(), sequence.num_masked)


def step_shape(scheduled: Items[ScheduledSequence]) -> StepShape:
    """The exact sizes of a step of these sequences."""
    sequences = [sequence for sequence, _ in scheduled]
    params = [sequence.params for sequence in sequences]
    features = {
        "noise": any(p.temperature > 0 for p in params),
        "eos_inf": any(p.logits_eos_inf for p in params),
        "eos_eot_last": any(p.confidence_eos_eot_inf for p in params),
    }
    return StepShape(
        rows=sum(entry.rows for entry in scheduled),
        segments=sum(len(segments) for _, segments in scheduled),
        blocks=len(scheduled),
        block_length=max(sequence.block_end - sequence.block_start for sequence in sequences),
        masked_rows=sum(sequence.num_masked for sequence in sequences),
        max_kv_len=max(segment.kv_len for _, segments in scheduled for segment in segments),
        rules=frozenset(p.unmasking for p in params),
        features=frozenset(name for name, used in features.items() if used),
    )


def pack(scheduled: Items[ScheduledSequence], shape: StepShape, scrap_slot: int) -> torch.Tensor:
    """StepInputs of this shape, which may be larger than the sequences need, one after the other in a CPU tensor."""
    rows, spans, blocks = 0, [], []
    for sequence, segments in scheduled:
        for start, stop, kv_len in segments:
            spans.append((sequence.slot, stop - start, start - rows, kv_len))
            rows += stop - start
        start = sequence.block_start
        # the last segment holds the block
        first_row = rows - (segments[-1].stop - start)
        fixed = dict(slots=sequence.slot, starts=start, lengths=sequence.block_end - start, first_rows=first_row)
        steps = _StepColumns.of(sequence)._asdict()
        blocks.append(Blocks(**fixed, **steps, output_starts=start - sequence.prompt_len))
    segment_slots, lengths, shifts, kv_lens = np.array(spans).T
    columns = [
        (segment_slots.repeat(lengths), scrap_slot),
        (shifts.repeat(lengths) + np.arange(rows), 0),
        (np.append(0, lengths.cumsum()), rows),
        (segment_slots, scrap_slot),
        (kv_lens, 1),
        *zip(np.array(blocks).T, (scrap_slot, *[0] * (len(Blocks._fields) - 1)), strict=True),
    ]
    sizes = StepInputs.sizes(shape)
    packed = np.empty(sum(sizes), dtype=np.int64)
    end = 0
    for (values, padding), size in zip(columns, sizes, strict=True):
        start, end = end, end + size
        packed[start : start + len(values)] = values
        packed[start + len(values) : end] = padding
    return torch.from_numpy(packed)


def layout(scheduled: Items[ScheduledSequence], shape: StepShape) -> tuple:
    """What a packed tensor depends on: those of equal layouts differ in `StepInputs.step_columns` at most."""
    sequences = [(s.request_id, s.slot, s.block_start, segments) for s, segments in scheduled]
    return shape.rows, shape.segments, shape.blocks, sequences


def pack_steps(scheduled: Items[ScheduledSequence], shape: StepShape) -> torch.Tensor:
    """`StepInputs.step_columns` of what `pack` makes."""
    steps = [_StepColumns.of(sequence) for sequence, _ in scheduled]
    steps += [_StepColumns(0, 0, False, 0)] * (shape.blocks - len(steps))
    return torch.tensor([*zip(*steps, strict=True)], dtype=torch.int64).flatten()


class SlotOptions(NamedTuple):
    """A sequence's SamplingParams as the device keeps them: int64, floats as the bits of a float64."""

    rule: int | torch.Tensor
    value: int | torch.Tensor
    temperature: int | torch.Tensor
    seed: int | torch.Tensor
    eos_inf: int | torch.Tensor
    eos_eot_last: int | torch.Tensor

    @classmethod
    def of(cls, sequence: Sequence) -> "SlotOptions":
        params = sequence.params
        return cls(
            rule=list(RULES).index(params.unmasking),
            value=_float_bits(params.rule_value),
            temperature=_float_bits(params.temperature),
            seed=sequence.seed - 2**64 if sequence.seed >= 2**63 else sequence.seed,
            eos_inf=int(params.logits_eos_inf),
            eos_eot_last=int(params.confidence_eos_eot_inf),
        )


def _float_bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def as_float(bits: torch.Tensor) -> torch.Tensor:
    """What `SlotOptions` keeps of a float -> float64."""
    return bits.contiguous().view(torch.float64)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _bucket(n: int) -> int:
    """At most a quarter more, in steps of 8 and wider ones: 8, 16, ..., 64, 80, 96, 112, 128, 160, ..., 512, 640, ...

    Steps of 128 are the widest: so many rows are a tile of large matrix products, whose time is a step's from there on.
    """
    step = min(128, max(8, _power_of_two(n + 1) // 8))
    return -(-n // step) * step
