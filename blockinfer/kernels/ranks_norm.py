"""The sum over ranks, the addition to the residual and the RMSNorm that follows it, in one kernel.

The ranks of one host reach each other's memory. There are two forms, as there are of an all-reduce:

- One-shot, for few rows: each rank reads the shares of all ranks, and adds and norms all rows. The ranks meet once.
- Two-shot: each rank adds and norms its share of the rows, and writes the result to all ranks. The data goes over
  NVLink as often as in an all-reduce of two shots, and a rank norms 1 / size of the rows. The ranks meet twice. A
  residual then is up to date only in the rank's own rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from blockinfer.kernels.backend import begin, launch_next, launch_options, num_processors, wait_for_last
from blockinfer.kernels.norm import check_normed, rms_normed
from blockinfer.kernels.parts import add_parts
from blockinfer.kernels.quantize import FP8, QuantizedRows, quantized_row, scale_of, store_quantized

# The most rows of a one-shot call: two blocks of 32. It sends ranks / 2 times as much data as a two-shot one.
FEW_ROWS = 64


class Layout(NamedTuple):
    """Bytes of each rank's memory: sums [rows, width] of the dtype, to which each rank writes its share of a product;
    at `normed`, as many bytes for the result, which may be FP8; at `scales`, float32 for each row; at `slots`, of
    the dtype, [2, few_rows, width] for the shares of one-shot calls, which have at most few_rows rows; at `signals`,
    int64 for each program and rank."""

    rows: int
    width: int
    normed: int
    scales: int
    slots: int
    signals: int
    end: int
    few_rows: int

    @classmethod
    def of(cls, rows: int, width: int, itemsize: int, ranks: int, programs: int, few_rows: int = FEW_ROWS) -> "Layout":
        few_rows = min(few_rows, rows, programs)
        normed = _aligned(rows * width * itemsize)
        scales = 2 * normed
        slots = scales + _aligned(4 * rows)
        signals = slots + _aligned(2 * few_rows * width * itemsize)
        return cls(rows, width, normed, scales, slots, signals, signals + 8 * programs * ranks, few_rows)


class RankMemory(NamedTuple):
    """What the kernel is told of all ranks' memory. addresses [ranks] int64: of each rank's, for this rank's device.
    own: this rank's, uint8. calls [programs] int64: signals that each of this rank's programs has sent, at first 0, as
    all of the memory's signals are."""

    own: torch.Tensor
    addresses: torch.Tensor
    calls: torch.Tensor
    rank: int
    layout: Layout

    def sums(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        return self._part(0, rows, dtype)

    def normed(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        return self._part(self.layout.normed, rows, dtype)

    def _part(self, start: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
        width = self.layout.width
        return self.own[start : start + rows * width * dtype.itemsize].view(dtype).view(rows, width)

    def scales(self, rows: int) -> torch.Tensor:
        start = self.layout.scales
        return self.own[start : start + 4 * rows].view(torch.float32)

    @property
    def signals(self) -> torch.Tensor:
        return self.own[self.layout.signals : self.layout.end].view(torch.int64)


def num_programs(device: torch.device) -> int:
    """The most programs of a kernel: all run at the same time, so none waits for one that has not begun."""
    return num_processors(device)


def sum_rms_norm_triton(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    memory: RankMemory,
    quantized: bool = False,
    whole: bool = False,
) -> torch.Tensor | QuantizedRows:
    """x [T, d], or parts of it [S, T, d], of which the sum over parts and ranks is wanted; residual [T, d], weight [d]
    -> rms_norm(sum + residual), in this rank's memory until the next call. All ranks call it together.

    x may be the memory's `sums` itself. residual is overwritten with the sum: in all rows, if they are few or
    `whole`, and else in rows r with r % ranks == rank. Every rank's share is rounded to residual's dtype; they are
    added in the ranks' order, in float32. So the two forms compute the same.

    Raises ValueError where a shape differs, a tensor is not contiguous, or T exceeds the memory's rows.
    """
    layout, ranks = memory.layout, len(memory.addresses)
    check_normed(x, residual, weight)
    rows, columns = residual.shape
    if columns != layout.width or not 0 < rows <= layout.rows:
        raise ValueError(f"the ranks' memory is for 1 to {layout.rows} rows of {layout.width}, got {rows} of {columns}")
    sums, normed = memory.sums(rows, residual.dtype), memory.normed(rows, FP8 if quantized else residual.dtype)
    scales = memory.scales(rows)
    parts = 1 if x.ndim == 2 else x.shape[0]
    block = triton.next_power_of_2(columns)
    options = dict(
        RANK=memory.rank,
        RANKS=ranks,
        LANES=triton.next_power_of_2(ranks),
        SIGNALS=layout.signals,
        QUANTIZED=quantized,
        BLOCK=block,
        num_warps=min(8, max(1, block // 256)),
        **launch_options(residual.device),
    )
    if rows <= layout.few_rows:
        _one_shot_sum_rms_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            normed,
            scales,
            memory.addresses,
            memory.calls,
            columns,
            eps,
            PARTS=parts,
            FEW_ROWS=layout.few_rows,
            SLOTS=layout.slots,
            **options,
        )
    else:
        _two_shot_sum_rms_norm_kernel[(min(triton.cdiv(rows, ranks), len(memory.calls)),)](
            x,
            residual,
            weight,
            memory.addresses,
            memory.calls,
            rows,
            columns,
            eps,
            PARTS=0 if x.data_ptr() == sums.data_ptr() else parts,
            NORMED=layout.normed,
            SCALES=layout.scales,
            WHOLE=whole,
            **options,
        )
        if whole:
            residual.copy_(sums)
    return QuantizedRows(normed, scales, residual.dtype) if quantized else normed


@triton.jit
def _one_shot_sum_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    scales_ptr,
    addresses_ptr,
    calls_ptr,
    columns,
    eps,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    SIGNALS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    row = tl.program_id(0).to(tl.int64)  # grid (T,): the programs of a row wait for each other
    column = tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_last(PDL)
    # In eights: a thread that stores 16 neighbours in FP8 would also read 16 of each share, 32 bytes in two loads, each
    # of every second 16 bytes.
    where = tl.max_contiguous(row * columns + column, 8)
    plane = tl.num_programs(0).to(tl.int64) * columns
    dtype: tl.constexpr = residual_ptr.dtype
    calls = tl.load(calls_ptr + row)
    # The row's two slots take turns. Between two uses of one lies a call with the other, in which this program met the
    # others. They began it after they had read the first.
    slot = ((calls & 1) * FEW_ROWS + row) * columns + column
    share = add_parts(tl.zeros([BLOCK], tl.float32), x_ptr, where, plane, inside, PARTS)
    slots = ()
    for k in tl.static_range(RANKS):
        slots = slots + (_at(addresses_ptr, k, SLOTS, dtype) + slot,)
    tl.store(slots[RANK], share.to(dtype.element_ty), mask=inside)
    total = tl.load(residual_ptr + where, mask=inside, other=0.0).to(tl.float32)
    _meet(addresses_ptr, row, calls + 1, SIGNALS, RANK, RANKS, LANES)
    for k in tl.static_range(RANKS):
        total += tl.load(slots[k], mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    # normalise the stored value: the rounded sum
    x = total.to(dtype.element_ty)
    tl.store(residual_ptr + where, x, mask=inside)
    out = (rms_normed(x, columns, eps) * weight).to(x.dtype)
    if QUANTIZED:
        store_quantized(out.to(tl.float32), inside, normed_ptr + where, scales_ptr + row)
    else:
        tl.store(normed_ptr + where, out, mask=inside)
    tl.store(calls_ptr + row, calls + 1)


@triton.jit
def _two_shot_sum_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    addresses_ptr,
    calls_ptr,
    rows,
    columns,
    eps,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    NORMED: tl.constexpr,
    SCALES: tl.constexpr,
    SIGNALS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    # grid (programs,): each takes groups of as many rows as there are ranks; those programs of all ranks that take the
    # same groups wait for each other
    program = tl.program_id(0)
    groups = tl.cdiv(rows, RANKS)
    column = tl.arange(0, BLOCK)
    valid = column < columns
    plane = tl.cast(rows, tl.int64) * columns
    dtype: tl.constexpr = residual_ptr.dtype
    calls = tl.load(calls_ptr + program)
    if PARTS > 0:
        sums = _at(addresses_ptr, RANK, 0, dtype)
        for group in range(program, groups, tl.num_programs(0)):
            for k in tl.static_range(RANKS):
                row = group * RANKS + k
                where = row.to(tl.int64) * columns + column
                inside = valid & (row < rows)
                total = add_parts(tl.zeros([BLOCK], tl.float32), x_ptr, where, plane, inside, PARTS)
                tl.store(sums + where, total.to(dtype.element_ty), mask=inside)
    _meet(addresses_ptr, program, calls + 1, SIGNALS, RANK, RANKS, LANES)
    weight = tl.load(weight_ptr + column, mask=valid, other=0.0).to(tl.float32)
    for group in range(program, groups, tl.num_programs(0)):
        row = group * RANKS + RANK
        where = tl.max_contiguous(row.to(tl.int64) * columns + column, 8)  # as above
        inside = valid & (row < rows)
        total = tl.load(residual_ptr + where, mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(RANKS):
            share = _at(addresses_ptr, k, 0, dtype)
            total += tl.load(share + where, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        # normalise the stored value: the rounded sum
        x = total.to(dtype.element_ty)
        tl.store(residual_ptr + where, x, mask=inside)
        out = (rms_normed(x, columns, eps) * weight).to(x.dtype)
        if QUANTIZED:
            out, largest = quantized_row(out.to(tl.float32))
            scale = scale_of(largest)
        for k in tl.static_range(RANKS):
            if WHOLE:
                # no other rank reads this row there
                tl.store(_at(addresses_ptr, k, 0, dtype) + where, x, mask=inside)
            if QUANTIZED:
                scales = _at(addresses_ptr, k, SCALES, tl.pointer_type(tl.float32))
                tl.store(scales + row, scale, mask=row < rows)
            tl.store(_at(addresses_ptr, k, NORMED, tl.pointer_type(out.dtype)) + where, out, mask=inside)
    _meet(addresses_ptr, program, calls + 2, SIGNALS, RANK, RANKS, LANES)
    tl.store(calls_ptr + program, calls + 2)


@triton.jit
def _at(addresses_ptr, k, OFFSET: tl.constexpr, TYPE: tl.constexpr):
    """A pointer of this type, so many bytes into rank k's memory."""
    return tl.multiple_of((tl.load(addresses_ptr + k) + OFFSET).to(TYPE), 16)


@triton.jit
def _meet(
    addresses_ptr,
    program,
    call,
    SIGNALS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Waits until this program has come here for the `call`-th time on every rank; what they wrote before is seen after
    it. LANES: the next power of two of RANKS."""
    # all at once: each signal has to wait until what was written before it is seen
    k = tl.arange(0, LANES)
    others = (k < RANKS) & (k != RANK)
    zeros = tl.zeros([LANES], tl.int64)
    at = tl.load(addresses_ptr + k, mask=others, other=0) + SIGNALS
    theirs = at.to(tl.pointer_type(tl.int64)) + program * RANKS + RANK
    mine = _at(addresses_ptr, RANK, SIGNALS, tl.pointer_type(tl.int64)) + program * RANKS + k
    tl.debug_barrier()
    tl.atomic_xchg(theirs, zeros + call, mask=others, sem="release", scope="sys")
    least = call - 1
    while least < call:
        seen = tl.atomic_add(mine, zeros, mask=others, sem="acquire", scope="sys")
        least = tl.min(tl.where(others, seen, call))
    tl.debug_barrier()


def _aligned(number: int) -> int:
    return -(-number // 128) * 128
