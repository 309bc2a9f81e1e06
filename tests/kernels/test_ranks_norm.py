"""The sum over ranks with its norm: on a GPU each rank is a stream, and with the interpreter a process."""

import random
import time
from typing import NamedTuple

import pytest
import torch
import torch.multiprocessing as multiprocessing

from blockinfer.kernels import ranks_norm
from blockinfer.kernels.norm import add_rms_norm_torch
from blockinfer.kernels.quantize import FP8, quantize_rows_torch
from blockinfer.kernels.ranks_norm import Layout, RankMemory, sum_rms_norm_triton
from tests.kernels.conftest import rounding_to_float8
from tests.kernels.test_norm import EPS, TOLERANCE

# fewer programs than groups of rows, so that some take several, and more than rows of a one-shot call
ROWS, WIDTH, PROGRAMS, FEW = 14, 40, 4, 3
POISON = 0xAA
LATE = 0.02  # seconds


class Call(NamedTuple):
    """parts: of each rank's share; 0 if it is written to the memory, as a product is."""

    seed: int
    rows: int
    parts: int
    quantized: bool
    whole: bool


class Case(NamedTuple):
    """Calls with one memory, one-shot up to few_rows rows."""

    dtype: torch.dtype
    few_rows: int
    calls: list[Call]

    def layout(self, ranks):
        return Layout.of(ROWS, WIDTH, self.dtype.itemsize, ranks, PROGRAMS, self.few_rows)


class Data(NamedTuple):
    """shares: of each rank; residual and weight: of all."""

    shares: list[torch.Tensor]
    residual: torch.Tensor
    weight: torch.Tensor


def draw_cases(ranks):
    """In pairs: one-shot for few rows, and the same calls two-shot for any."""
    draw = random.Random(ranks)
    for i, most in enumerate([1, FEW, FEW + 1, ROWS - 1, ROWS]):
        # one row after another: a rank can be ahead of the others by a call
        rows = [1, 1, most, 1, most, *(draw.randint(1, most) for _ in range(2)), min(FEW, most)]
        calls = [
            Call(seed, number, draw.choice([0, 1, 2, 3]), draw.random() < 0.4, draw.random() < 0.4)
            for seed, number in enumerate(rows)
        ]
        for few_rows in (FEW, 0):
            yield Case(list(TOLERANCE)[i % 3], few_rows, calls)


def data(case, call, ranks, device):
    g = torch.Generator().manual_seed(call.seed)
    shape = (call.parts, call.rows, WIDTH) if call.parts > 1 else (call.rows, WIDTH)
    dtype = torch.float32 if call.parts > 1 else case.dtype
    shares = [torch.randn(shape, generator=g).to(dtype).to(device) for _ in range(ranks)]
    residual = torch.randn(call.rows, WIDTH, generator=g).to(case.dtype).to(device)
    return Data(shares, residual, (1 + torch.randn(WIDTH, generator=g)).to(case.dtype).to(device))


def make_memory(case, ranks, device):
    """One rank's."""
    own = torch.full((case.layout(ranks).end,), POISON, dtype=torch.uint8, device=device)
    own[case.layout(ranks).signals :] = 0
    return own


def memory_of(case, rank, memories, device):
    addresses = torch.tensor([memory.data_ptr() for memory in memories], device=device)
    calls = torch.zeros(PROGRAMS, dtype=torch.int64, device=device)
    return RankMemory(memories[rank], addresses, calls, rank, case.layout(len(memories)))


def run(case, call, memory, data):
    """-> the normed rows and the residual of this rank."""
    share, residual = data.shares[memory.rank], data.residual.clone()
    if call.parts == 0:
        share = memory.sums(call.rows, case.dtype).copy_(share)
    normed = sum_rms_norm_triton(share, residual, data.weight, EPS, memory, call.quantized, call.whole)
    if call.quantized:
        assert normed.dtype == case.dtype and normed.values.dtype == FP8
        normed = normed.values.float() * normed.scale[:, None]
    return normed.to(torch.float32, copy=True), residual.float()


def process(rank, cases, memories, results):
    """A rank in the interpreter. At times it comes late, and the others must wait; at times it is slow to go on when it
    has met them, and they run ahead."""
    torch.set_num_threads(1)
    draw = random.Random(rank)
    meet = ranks_norm._meet

    def meet_and_rest(*rest):
        meet(*rest)
        time.sleep(draw.choice(late))

    ranks_norm._meet = meet_and_rest
    with rounding_to_float8():
        for case, of_case, result in zip(cases, memories, results, strict=True):
            late = [0, 0, LATE] if case.few_rows and len(of_case) > 1 else [0]
            inputs = [data(case, call, len(of_case), "cpu") for call in case.calls]
            memory = memory_of(case, rank, of_case, "cpu")
            for call, of_call, to in zip(case.calls, inputs, result[rank], strict=True):
                time.sleep(draw.choice(late))
                for tensor, found in zip(to, run(case, call, memory, of_call), strict=True):
                    tensor.copy_(found)


@pytest.fixture(scope="module", params=[1, 2, 3])
def made(request, device):
    """The number of ranks, and for each case what each rank made in each call, [T, d] twice, and its memory."""
    ranks = request.param
    # on a GPU each variant of a kernel takes a second to compile
    cases = [case for case in draw_cases(ranks) if device == "cpu" or case.dtype == torch.bfloat16]
    memories = [[make_memory(case, ranks, device) for _ in range(ranks)] for case in cases]
    results = [
        [[[torch.zeros(call.rows, WIDTH) for _ in range(2)] for call in case.calls] for _ in range(ranks)]
        for case in cases
    ]
    if device == "cpu":
        of_ranks = sum(results, [])
        for tensor in [*sum(memories, []), *(tensor for calls in of_ranks for pair in calls for tensor in pair)]:
            tensor.share_memory_()
        multiprocessing.spawn(process, (cases, memories, results), nprocs=ranks)
    else:
        for case, of_case, result in zip(cases, memories, results, strict=True):
            on_streams(case, of_case, result, device)
    return ranks, list(zip(cases, results, memories, strict=True))


def on_streams(case, memories, results, device):
    """The ranks are streams of one GPU, which run side by side."""
    ranks = len(memories)
    inputs = [data(case, call, ranks, device) for call in case.calls]
    spare = [make_memory(case, ranks, device) for _ in memories]
    streams = [torch.cuda.Stream() for _ in memories]

    def run_all(memory):
        with torch.cuda.stream(streams[memory.rank]):
            return [run(case, call, memory, one) for call, one in zip(case.calls, inputs, strict=True)]

    # a GPU that waits for a signal may load no kernel and allocate nothing: first each rank runs with all signals there
    for rank in range(ranks):
        memory = memory_of(case, rank, spare, device)
        memory.signals.fill_(2**40)
        torch.cuda.synchronize()
        run_all(memory)
        torch.cuda.synchronize()
    told = [memory_of(case, rank, memories, device) for rank in range(ranks)]
    torch.cuda.synchronize()
    found = [run_all(memory) for memory in told]
    torch.cuda.synchronize()
    for to, of_rank in zip(results, found, strict=True):
        for pair, made_pair in zip(to, of_rank, strict=True):
            for tensor, value in zip(pair, made_pair, strict=True):
                tensor.copy_(value)


def each_call(made):
    """Of each call: its case, what each rank normed and what it left in the residual, and the sum."""
    ranks, of_cases = made
    for case, results, _ in of_cases:
        for call, *pairs in zip(case.calls, *results, strict=True):
            normed, left = zip(*pairs, strict=True)
            stored = torch.stack([left[row % ranks][row] for row in range(call.rows)])
            yield case, call, normed, left, stored


def test_norm_of_the_sum_over_ranks(made):
    ranks = made[0]
    for case, call, normed, left, stored in each_call(made):
        shares, residual, weight = data(case, call, ranks, "cpu")
        rounded = [(share.sum(0) if call.parts > 1 else share).to(case.dtype).double() for share in shares]
        total = residual.double() + sum(rounded)
        tolerance = TOLERANCE[case.dtype]
        # every rank has all rows, to the last bit
        assert all(torch.equal(other, normed[0]) for other in normed), (case, call)
        # the interpreter cuts a share off where a GPU rounds it
        torch.testing.assert_close(stored.double(), total, rtol=tolerance / 2, atol=tolerance * ranks)
        expected = add_rms_norm_torch(None, stored.to(case.dtype), weight, EPS)
        if call.quantized:
            expected = quantize_rows_torch(expected)
            expected = expected.values.float() * expected.scale[:, None]
            tolerance = max(tolerance, 0.13)  # a step of FP8, where rounding before it differs
        torch.testing.assert_close(normed[0], expected.float(), rtol=tolerance, atol=tolerance / 4)
        everywhere = call.whole or call.rows <= case.few_rows
        for rank in range(ranks):
            for row in range(call.rows):
                wanted = stored[row] if everywhere or row % ranks == rank else residual[row].float()
                assert torch.equal(left[rank][row], wanted), (case, call, rank, row)


def test_both_forms_compute_the_same(made):
    ranks, of_cases = made
    forms = (each_call((ranks, of_cases[i::2])) for i in range(2))
    for (_, call, normed, _, stored), (*_, other_normed, _, other_stored) in zip(*forms, strict=True):
        assert torch.equal(normed[0], other_normed[0]) and torch.equal(stored, other_stored), call


def test_rows_past_the_last_stay_as_they_were(made):
    ranks, of_cases = made
    for case, _, memories in of_cases:
        layout, size = case.layout(ranks), case.dtype.itemsize
        sums = [call.rows for call in case.calls if call.parts == 0 or call.rows > case.few_rows]
        normed = [call.rows * (1 if call.quantized else size) for call in case.calls]
        scales = [call.rows for call in case.calls if call.quantized]
        for own in memories:
            assert (own[max(sums, default=0) * WIDTH * size : layout.normed] == POISON).all(), case
            assert (own[layout.normed + max(normed) * WIDTH : layout.scales] == POISON).all(), case
            assert (own[layout.scales + 4 * max(scales, default=0) : layout.slots] == POISON).all(), case
            slots_end = layout.slots + 2 * layout.few_rows * WIDTH * size
            assert (own[slots_end : layout.signals] == POISON).all(), case


def test_programs_meet_and_their_slots_take_turns(made):
    """A program that has rows meets the others once in a one-shot call, and twice in a two-shot call."""
    ranks, of_cases = made
    for case, _, memories in of_cases:
        layout, met, slots = case.layout(ranks), [0] * PROGRAMS, set()
        for call in case.calls:
            one_shot = call.rows <= case.few_rows
            for program in range(call.rows if one_shot else min(-(-call.rows // ranks), PROGRAMS)):
                if one_shot:
                    slots.add((met[program] % 2, program))
                met[program] += 1 if one_shot else 2
        for own in memories:
            shares = own[layout.slots :][: 2 * layout.few_rows * WIDTH * case.dtype.itemsize]
            written = (shares != POISON).view(2, layout.few_rows, WIDTH * case.dtype.itemsize).any(2)
            assert {tuple(slot) for slot in written.nonzero().tolist()} == slots, case
            signals = own[layout.signals :].view(torch.int64).view(PROGRAMS, ranks)
            assert signals.amax(1).tolist() == (met if ranks > 1 else [0] * PROGRAMS), case


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rows=ROWS + 1), f"for 1 to {ROWS} rows of {WIDTH}, got {ROWS + 1}"),
        (dict(rows=0), "got 0 of"),
        (dict(width=WIDTH + 1), f"got 2 of {WIDTH + 1}"),
        (dict(weight=torch.ones(3)), r"weight \[d\], got .*\(3,\)"),
        (dict(x=torch.ones(3, WIDTH)), r"x must be \[T, d\]"),
        (dict(x=torch.ones(WIDTH, 2).T), "must be contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = Case(torch.float32, FEW, [])
    memory = memory_of(case, 0, [make_memory(case, 1, "cpu")], "cpu")
    rows, width = change.get("rows", 2), change.get("width", WIDTH)
    x, weight = change.get("x", torch.ones(rows, width)), change.get("weight", torch.ones(width))
    with pytest.raises(ValueError, match=message):
        sum_rms_norm_triton(x, torch.ones(rows, width), weight, EPS, memory)


def test_as_many_programs_as_run_at_once(monkeypatch):
    monkeypatch.setattr(ranks_norm, "num_processors", lambda device: 7)
    assert ranks_norm.num_programs(torch.device("cpu")) == 7


@pytest.mark.parametrize("rows, programs, expected", [(1000, 132, ranks_norm.FEW_ROWS), (1000, 3, 3), (2, 132, 2)])
def test_few_rows_are_at_most_as_many_as_rows_and_programs(rows, programs, expected):
    """A one-shot call has a program for each row: all must run at once."""
    assert Layout.of(rows, WIDTH, 2, 2, programs).few_rows == expected
