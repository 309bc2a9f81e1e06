"""How a step is packed."""

import pytest

from blockinfer import SamplingParams
from blockinfer.decoding.modes import MODES
from blockinfer.engine.batch import StepInputs, layout, pack, pack_steps, step_shape
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.sequence import Sequence


@pytest.mark.parametrize("count, blocks_before", [(1, 0), (1, 1998), (5, 300), (32, 50)])
def test_the_room_for_a_packed_step_holds_the_largest(count, blocks_before):
    """Sequences that a preemption sent back have a segment for every block that they finished, each of one row here."""
    scheduled = []
    for slot in range(count):
        sequence = Sequence(slot, None, [1], SamplingParams(max_tokens=2048, block_length=1), 0, frozenset())
        sequence.slot = slot
        sequence.finish_block([2] * blocks_before)
        scheduled.append(ScheduledSequence(sequence, sequence.segments()))
    exact = step_shape(scheduled)
    assert exact.segments == exact.rows == count * (blocks_before + 2)
    shape = exact.padded(max_model_len=4096)
    packed = pack(scheduled, shape, scrap_slot=count)
    assert shape.rows <= 2048 and len(packed) <= StepInputs.largest(2048, count)
    inputs = StepInputs.split(packed, shape)
    assert inputs.query_starts.tolist()[: exact.segments + 1] == list(range(exact.segments + 1))
    assert set(inputs.query_starts[exact.segments :].tolist()) == {exact.rows}
    assert set(inputs.slots[exact.rows :].tolist()) <= {count}


def request(number=0, prompt_len=5, max_tokens=8, mode="vanilla"):
    params = SamplingParams(max_tokens=max_tokens, block_length=4, mode=mode)
    sequence = Sequence(number, None, [1] * prompt_len, params, 0, frozenset())
    sequence.slot = number
    return sequence


def packed_and_layout(*sequences):
    scheduled = [ScheduledSequence(sequence, sequence.segments()) for sequence in sequences]
    shape = step_shape(scheduled).padded(max_model_len=64)
    return pack(scheduled, shape, scrap_slot=9), layout(scheduled, shape), shape, scheduled


@pytest.mark.parametrize("mode", MODES)
def test_what_stays_from_step_to_step_need_not_be_packed_again(mode):
    """Whenever layouts are equal, the step's columns make one step's packed tensor the next one's."""
    sequences = [request(number, prompt_len=1 + number, mode=mode) for number in range(3)]
    before, wanted, kept = None, None, 0
    for _ in range(8):
        packed, new, shape, scheduled = packed_and_layout(*sequences)
        if new == wanted:
            assert not before.equal(packed)
            before[StepInputs.step_columns(shape)] = pack_steps(scheduled, shape)
            assert before.equal(packed)
            kept += 1
        before, wanted = packed, new
        for sequence in sequences:
            sequence.advance(sequence.masked_after_step())
            if not sequence.num_masked:
                sequence.finish_block([2] * 4)
    assert kept >= 4


def other_slot(sequence):
    sequence.slot = 3
    return sequence


def next_block(sequence):
    sequence.finish_block([2] * 4)
    return sequence


def other_prompt(sequence):
    """Of another request, whose block and canvas are at the same places."""
    return next_block(request(1, prompt_len=1, max_tokens=12))


@pytest.mark.parametrize("change", [other_slot, next_block, other_prompt])
def test_what_changes_a_packed_tensor_changes_its_layout(change):
    packed, before, *_ = packed_and_layout(request())
    changed = change(request())
    changed.slot = changed.slot if change is other_slot else 0
    other, after, *_ = packed_and_layout(changed)
    assert not packed.equal(other) and before != after
