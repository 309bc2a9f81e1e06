"""How a step is packed."""

import pytest

from blockinfer import SamplingParams
from blockinfer.engine.batch import StepInputs, pack, step_shape
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
