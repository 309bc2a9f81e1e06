"""How a step is packed."""

import pytest
import torch

from blockinfer import SamplingParams
from blockinfer.decoding.modes import MODES
from blockinfer.engine.batch import StepInputs, layout, pack, pack_steps, packed_size, step_columns
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.sequence import Sequence
from blockinfer.kernels.segments import Cutting
from tests.engine.blocks import finish_block

CUTTING = Cutting(4, 9)


@pytest.mark.parametrize("count, blocks_before", [(1, 0), (1, 1998), (5, 300), (32, 50)])
def test_the_room_for_a_packed_step_holds_the_largest(count, blocks_before):
    """Sequences that a preemption sent back have a segment for every block that they finished, each of one row here."""
    scheduled = []
    for slot in range(count):
        sequence = Sequence(slot, None, [1], SamplingParams(max_tokens=2048, block_length=1), 0, frozenset())
        sequence.slot = slot
        for _ in range(blocks_before):
            finish_block(sequence)
        sequence.restart_block()
        scheduled.append(ScheduledSequence(sequence, sequence.plan()))
    rows = sum(entry.plan.rows for entry in scheduled)
    assert rows == count * (blocks_before + 2)
    packed = torch.from_numpy(pack(scheduled, 32, 2048, 32, CUTTING))
    assert len(packed) <= packed_size(32, 2048, CUTTING)
    inputs = StepInputs.split(packed, 32, 2048)
    assert int(inputs.num_tiles[1]) == 0
    tiles = inputs.tiles[: int(inputs.num_tiles[0])]
    assert tiles[:, 0].tolist() == list(range(rows)) and (tiles[:, 1] == tiles[:, 0] + 1).all()
    assert inputs.slots[:rows].tolist() == [slot for slot in range(count) for _ in range(blocks_before + 2)]
    assert set(inputs.slots[rows:].tolist()) | set(inputs.blocks.slots[count:].tolist()) <= {32}


def request(number=0, prompt_len=5, max_tokens=8, mode="vanilla"):
    params = SamplingParams(max_tokens=max_tokens, block_length=4, mode=mode)
    sequence = Sequence(number, None, [1] * prompt_len, params, 0, frozenset())
    sequence.slot = number
    return sequence


def packed_and_layout(*sequences):
    scheduled = [ScheduledSequence(sequence, sequence.plan()) for sequence in sequences]
    return pack(scheduled, 10, 128, 9, CUTTING).tolist(), layout(scheduled), pack_steps(scheduled, 10).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_what_stays_from_step_to_step_need_not_be_packed_again(mode):
    """Whenever layouts are equal, so is what was packed; what changes then are the steps' columns, which are apart."""
    sequences = [request(number, prompt_len=1 + number, mode=mode) for number in range(3)]
    before, wanted, columns, kept = None, None, None, 0
    for _ in range(8):
        packed, new, steps = packed_and_layout(*sequences)
        assert not any(packed[step_columns(10)])
        if new == wanted:
            assert packed == before and steps != columns
            kept += 1
        before, wanted, columns = packed, new, steps
        for sequence in sequences:
            left = sequence.masked_after_step()
            if left:
                sequence.advance([left])
            else:
                finish_block(sequence)
    assert kept >= 4


def test_the_columns_of_a_step():
    """Of two blocks, the second after two of its steps; the third is padding."""
    first, second = request(0, max_tokens=7), request(1)
    second.advance([3])
    second.advance([2])
    finish_block(first)
    scheduled = [ScheduledSequence(sequence, sequence.plan()) for sequence in (first, second)]
    packed = torch.from_numpy(pack(scheduled, 4, 32, 9, CUTTING))
    packed[step_columns(4)] = torch.from_numpy(pack_steps(scheduled, 4))
    blocks = {name: column.tolist() for name, column in StepInputs.split(packed, 4, 32).blocks._asdict().items()}
    assert blocks == dict(
        steps=[0, 2, 0, 0],
        counts=[1, 1, 0, 0],
        last_steps=[0, 0, 0, 0],
        masked_counts=[3, 2, 0, 0],
        first_masked=[0, 3, 5, 5],
        slots=[0, 1, 9, 9],
        starts=[9, 5, 0, 0],
        lengths=[3, 4, 0, 0],
        first_rows=[9, 17, 0, 0],
        output_starts=[4, 0, 0, 0],
        result_starts=[0, 3, 7, 7],
        window_firsts=[0, 1, 2, 3],
        window_lasts=[0, 1, 2, 3],
    )


def other_slot(sequence):
    sequence.slot = 3
    return sequence


def next_block(sequence):
    finish_block(sequence)
    return sequence


def other_prompt(sequence):
    """Of another request, whose block and canvas are at the same places."""
    return next_block(request(1, prompt_len=1, max_tokens=12))


@pytest.mark.parametrize("change", [other_slot, next_block, other_prompt])
def test_what_changes_a_packed_tensor_changes_its_layout(change):
    packed, before, _ = packed_and_layout(request())
    changed = change(request())
    changed.slot = changed.slot if change is other_slot else 0
    other, after, _ = packed_and_layout(changed)
    assert packed != other and before != after
