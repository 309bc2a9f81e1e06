"""Editing (LLaDA2.1): revealed tokens of a block are replaced if the network is confident of another one.

Rows of revealed positions go through the LM head separately from those of masked ones, so that a step without such
requests launches nothing more. Their tokens are written before the masked positions' are: neither sees the other.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from blockinfer.engine.batch import open_blocks
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.transfer import on_device
from blockinfer.kernels.confidence import Confidence, RowOptions
from blockinfer.kernels.guidance import Guidance
from blockinfer.kernels.slots import SlotOptions, SlotState

Predict = Callable[[torch.Tensor, RowOptions, Guidance | None], Confidence]


class EditedRow(NamedTuple):
    """A revealed position of a step: its row in the forward, slot, position, place in the output, the block's step;
    the confidence above which it is replaced; and its guidance: the shadow row's distance, and the scale."""

    row: int
    slot: int
    position: int
    output_position: int
    step: int
    above: float
    shift: int
    scale: float


def edited_rows(scheduled: list[ScheduledSequence]) -> list[EditedRow]:
    """Every position of a block that is neither masked nor given, in the sequences that edit."""
    rows = []
    for sequence, plan, block, first_row in open_blocks(scheduled):
        if sequence.edits is None:
            continue
        shift, scale = (plan.rows // sequence.lanes, sequence.params.cfg_scale) if sequence.guided else (0, 0.0)
        for place in sequence.edits.revealed:
            position = block.start + place
            at = sequence.slot, position, position - sequence.prompt_len, block.step
            rows.append(EditedRow(first_row + place, *at, sequence.params.editing_threshold, shift, scale))
    return rows


def edit(rows: list[EditedRow], size: int, state: SlotState, predict: Predict) -> None:
    """Writes the replacing tokens. size: the number of rows to predict, padding included; at least len(rows)."""
    device = state.tokens.device
    padded = rows + rows[:1] * (size - len(rows))
    columns = np.array(padded).T
    integers = on_device(columns[[0, 1, 2, 3, 4, 6]].astype(np.int64), device)
    row, slot, position, output_position, step, shift = integers.unbind(0)
    above, scale = on_device(np.ascontiguousarray(columns[[5, 7]]), device).unbind(0)
    options = SlotOptions(*state.options[slot].unbind(1))
    asked = RowOptions(
        temperature=options.temperature.contiguous().view(torch.float64),
        seed=options.seed.contiguous(),
        position=output_position,
        step=step,
        forbid_eos=options.forbid_eos > 0,
        eos_last=options.eos_last > 0,
    )
    predicted = predict(row, asked, Guidance(shift, scale) if any(row.shift for row in rows) else None)
    # minus the probability of all other tokens, as the rules compare
    is_sure = predicted.finite & (-predicted.others > (above - 1).float())
    state.tokens[slot, position] = torch.where(is_sure, predicted.token_ids, state.tokens[slot, position])
    broken = torch.zeros_like(state.broken).index_put_((slot,), ~predicted.finite, accumulate=True)
    state.broken.logical_or_(broken)
