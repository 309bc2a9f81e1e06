"""Guided sequences: each has a shadow, which does not see the prompt, with its own slot and pages, in the same
forwards."""

import numpy as np
import torch

from blockinfer.engine.batch import lane_rows
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.sequence import Sequence
from blockinfer.engine.transfer import on_device
from blockinfer.kernels.guidance import Guidance
from blockinfer.kernels.slots import SlotState


def guidance_of_blocks(scheduled: list[ScheduledSequence], size: int, device: torch.device) -> Guidance:
    """Guidance for a step's predicted rows, in order, padded to `size`."""
    shifts, scales = np.zeros(size, dtype=np.int64), np.zeros(size)
    number = 0
    for (sequence, _), rows in zip(scheduled, lane_rows(scheduled), strict=True):
        if isinstance(sequence, Sequence):
            part = slice(number, number + sequence.num_predicted)
            if sequence.guided:
                shifts[part], scales[part] = len(rows), sequence.params.cfg_scale
            number += sequence.num_predicted
    return Guidance(on_device(shifts, device), on_device(scales, device))


def show_shadows(state: SlotState, guided: list[Sequence]) -> None:
    """Copies the revealed tokens of open blocks to the shadows, but not the given ones."""
    for sequence in guided:
        length = sequence.block_end - sequence.block_start
        given = sequence.given_after()[:length] or [None] * length
        masked = [False, *(token is None for token in given), False]
        edges = [i for i in range(length + 1) if masked[i] != masked[i + 1]]
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            part = slice(sequence.block_start + start, sequence.block_start + stop)
            state.tokens[sequence.shadow_slot, part] = state.tokens[sequence.slot, part]
