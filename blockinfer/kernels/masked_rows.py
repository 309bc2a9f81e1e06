"""The masked positions of a step's blocks, listed: the rows that the LM head needs, and what each asks for.

One kernel; PyTorch would need about forty, each of which takes longer to launch than to run.
"""

import torch
import triton
import triton.language as tl

from blockinfer.kernels.backend import begin, launch_options, runs_triton
from blockinfer.kernels.confidence import RowOptions
from blockinfer.kernels.slots import (
    Blocks,
    MaskedRows,
    SlotOptions,
    SlotState,
    check_contiguous,
    places_of,
    without_padding,
)


def masked_rows(state: SlotState, blocks: Blocks, size: int) -> tuple[MaskedRows, RowOptions]:
    """size: N, at least the sum of blocks.masked_counts. The options are those of each row, 0 for rows without a
    place."""
    implementation = masked_rows_triton if runs_triton(state.tokens) else masked_rows_torch
    return implementation(state, blocks, size)


def masked_rows_torch(state: SlotState, blocks: Blocks, size: int) -> tuple[MaskedRows, RowOptions]:
    """The twin."""
    blocks = without_padding(blocks)
    where = places_of(state, blocks)
    listed, at = where.listed, where.row[where.listed]
    block, offset = listed.nonzero().unbind(1)
    rows = MaskedRows(*torch.tensor([[0], [-1]], device=at.device).repeat(1, size))
    rows.place[at] = offset
    rows.row[at] = blocks.first_rows[block] + offset
    options = SlotOptions(*state.options.unbind(1))
    slot = blocks.slots[block]

    def of_rows(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(size, dtype=values.dtype, device=at.device).index_copy_(0, at, values)

    return rows, RowOptions(
        temperature=of_rows(options.temperature[slot]).view(torch.float64),
        seed=of_rows(options.seed[slot]),
        position=of_rows(blocks.output_starts[block] + offset),
        step=of_rows(blocks.steps[block]),
        forbid_eos=of_rows(options.forbid_eos[slot] > 0),
        eos_last=of_rows(options.eos_last[slot] > 0),
    )


def masked_rows_triton(state: SlotState, blocks: Blocks, size: int, block: int = 128) -> tuple[MaskedRows, RowOptions]:
    """The kernel: a program per block, which walks its places `block` at a time, and one for the rows at the end.

    Raises ValueError where the state or the blocks are not contiguous.
    """
    check_contiguous(state, blocks)
    new = dict(device=state.tokens.device)
    rows = MaskedRows(*(torch.empty(size, dtype=torch.int64, **new) for _ in range(2)))
    wide, narrow = [torch.float64, *[torch.int64] * 3], [torch.bool] * 2
    options = RowOptions(*(torch.empty(size, dtype=dtype, **new) for dtype in wide + narrow))
    number = len(blocks.slots)
    _masked_rows_kernel[(number + 1,)](
        state.masked,
        state.masked.stride(0),
        state.options,
        *blocks,
        *rows,
        *options,
        number,
        size,
        OPTIONS=_OPTIONS,
        BLOCK=block,
        **launch_options(state.tokens.device),
    )
    return rows, options


# The columns of SlotOptions.
_OPTIONS = tl.constexpr(len(SlotOptions._fields))
_TEMPERATURE, _SEED, _FORBID_EOS, _EOS_LAST = (
    tl.constexpr(SlotOptions._fields.index(name)) for name in ("temperature", "seed", "forbid_eos", "eos_last")
)


@triton.jit
def _masked_rows_kernel(
    masked_ptr,
    stride,
    options_ptr,
    steps_ptr,
    counts_ptr,
    last_steps_ptr,
    masked_counts_ptr,
    first_masked_ptr,
    slots_ptr,
    starts_ptr,
    lengths_ptr,
    first_rows_ptr,
    output_starts_ptr,
    result_starts_ptr,
    window_firsts_ptr,
    window_lasts_ptr,
    row_ptr,
    place_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    step_ptr,
    forbid_eos_ptr,
    eos_last_ptr,
    number,
    size,
    OPTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    block = tl.program_id(0)  # grid (B + 1,)
    n = tl.arange(0, BLOCK)
    if block == number:
        # the remaining rows at the end
        next_row = tl.load(first_masked_ptr + number - 1) + tl.load(masked_counts_ptr + number - 1)
        end = next_row * 0 + size
    else:
        slot = tl.load(slots_ptr + block)
        start = tl.load(starts_ptr + block)
        length = tl.load(lengths_ptr + block)
        first_row = tl.load(first_rows_ptr + block)
        position = tl.load(output_starts_ptr + block)
        step = tl.load(steps_ptr + block)
        option = options_ptr + slot * OPTIONS
        temperature = tl.load(option + _TEMPERATURE).to(tl.float64, bitcast=True)
        seed = tl.load(option + _SEED)
        forbid_eos = tl.load(option + _FORBID_EOS) != 0
        eos_last = tl.load(option + _EOS_LAST) != 0
        next_row = tl.load(first_masked_ptr + block)
        end = next_row + tl.load(masked_counts_ptr + block)
        zero = tl.zeros([BLOCK], tl.int64)
        for first in tl.range(0, length, BLOCK):
            place = first + n
            masked = tl.load(masked_ptr + slot * stride + start + place, mask=place < length, other=0) != 0
            at = next_row + tl.cumsum(masked.to(tl.int32), axis=0) - 1
            listed = masked & (at < end)
            tl.store(row_ptr + at, first_row + place, mask=listed)
            tl.store(place_ptr + at, zero + place, mask=listed)
            tl.store(temperature_ptr + at, zero.to(tl.float64) + temperature, mask=listed)
            tl.store(seed_ptr + at, zero + seed, mask=listed)
            tl.store(position_ptr + at, position + place, mask=listed)
            tl.store(step_ptr + at, zero + step, mask=listed)
            tl.store(forbid_eos_ptr + at, (zero == 0) & forbid_eos, mask=listed)
            tl.store(eos_last_ptr + at, (zero == 0) & eos_last, mask=listed)
            next_row += tl.sum(listed.to(tl.int64), axis=0)
    nothing = tl.zeros([BLOCK], tl.int64)
    for first in tl.range(next_row, end, BLOCK):
        at = first + n
        left = at < end
        tl.store(row_ptr + at, nothing, mask=left)
        tl.store(place_ptr + at, nothing - 1, mask=left)
        tl.store(temperature_ptr + at, nothing.to(tl.float64), mask=left)
        tl.store(seed_ptr + at, nothing, mask=left)
        tl.store(position_ptr + at, nothing, mask=left)
        tl.store(step_ptr + at, nothing, mask=left)
        tl.store(forbid_eos_ptr + at, nothing != 0, mask=left)
        tl.store(eos_last_ptr + at, nothing != 0, mask=left)
