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

# fewer programs than groups of rows, so that some take several
ROWS, WIDTH, PROGRAMS, ROUNDS = 12, 40, 3, 3
POISON = 0xAA


class Case(NamedTuple):
    """parts: of each rank's share; 0 if it is written to the memory, as a product is."""

    seed: int
    dtype: torch.dtype
    rows: int
    parts: int
    quantized: bool
    whole: bool


class Data(NamedTuple):
    """shares: of each rank; residual and weight: of all."""

    shares: list[torch.Tensor]
    residual: torch.Tensor
    weight: torch.Tensor


def draw_cases(ranks):
    draw = random.Random(ranks)
    rows = [1, max(1, ranks - 1), ranks, ROWS - 1, ROWS, *(draw.randint(1, ROWS) for _ in range(4))]
    for i, number in enumerate(rows):
        dtype = list(TOLERANCE)[i % 3]
        yield Case(i, dtype, number, draw.choice([0, 1, 2, 3]), draw.random() < 0.4, draw.random() < 0.4)


def data(case, ranks, device):
    g = torch.Generator().manual_seed(case.seed)
    shape = (case.parts, case.rows, WIDTH) if case.parts > 1 else (case.rows, WIDTH)
    dtype = torch.float32 if case.parts > 1 else case.dtype
    shares = [torch.randn(shape, generator=g).to(dtype).to(device) for _ in range(ranks)]
    residual = torch.randn(case.rows, WIDTH, generator=g).to(case.dtype).to(device)
    return Data(shares, residual, (1 + torch.randn(WIDTH, generator=g)).to(case.dtype).to(device))


def layout(case, ranks):
    return Layout.of(ROWS, WIDTH, case.dtype.itemsize, ranks, PROGRAMS)


def make_memory(case, ranks, device):
    """One rank's."""
    own = torch.full((layout(case, ranks).end,), POISON, dtype=torch.uint8, device=device)
    own[layout(case, ranks).signals :] = 0
    return own


def memory_of(case, rank, memories, device):
    addresses = torch.tensor([memory.data_ptr() for memory in memories], device=device)
    calls = torch.zeros(PROGRAMS, dtype=torch.int64, device=device)
    return RankMemory(memories[rank], addresses, calls, rank, layout(case, len(memories)))


def call(case, memory, data):
    """-> the normed rows and the residual of this rank."""
    share, residual = data.shares[memory.rank], data.residual.clone()
    if case.parts == 0:
        share = memory.sums(case.rows, case.dtype).copy_(share)
    normed = sum_rms_norm_triton(share, residual, data.weight, EPS, memory, case.quantized, case.whole)
    if case.quantized:
        assert normed.dtype == case.dtype and normed.values.dtype == FP8
        normed = normed.values.float() * normed.scale[:, None]
    return normed.float(), residual.float()


def process(rank, cases, memories, results):
    """A rank in the interpreter. At times it comes late, and the others must wait."""
    torch.set_num_threads(1)
    draw = random.Random(rank)
    with rounding_to_float8():
        for case, of_case, result in zip(cases, memories, results, strict=True):
            memory = memory_of(case, rank, of_case, "cpu")
            for i in range(ROUNDS):
                time.sleep(draw.choice([0, 0.02]))
                found = call(case, memory, data(case, len(of_case), "cpu"))
                for to, tensor in zip(result[rank], found, strict=True):
                    to[i].copy_(tensor)


@pytest.fixture(scope="module", params=[1, 2, 3])
def made(request, device):
    """The number of ranks, and for each case what each rank made, each [ROUNDS, T, d] twice, and its memory."""
    ranks = request.param
    cases = [*draw_cases(ranks)]
    memories = [[make_memory(case, ranks, device) for _ in range(ranks)] for case in cases]
    results = [[[torch.zeros(ROUNDS, case.rows, WIDTH) for _ in range(2)] for _ in range(ranks)] for case in cases]
    if device == "cpu":
        for tensor in [*sum(memories, []), *(tensor for result in results for pair in result for tensor in pair)]:
            tensor.share_memory_()
        multiprocessing.spawn(process, (cases, memories, results), nprocs=ranks)
    else:
        for case, of_case, result in zip(cases, memories, results, strict=True):
            on_streams(case, of_case, result, device)
    return ranks, list(zip(cases, results, memories, strict=True))


def on_streams(case, memories, results, device):
    """The ranks are streams of one GPU, which run side by side."""
    inputs = data(case, len(memories), device)
    streams = [torch.cuda.Stream() for _ in memories]
    spare = [make_memory(case, len(memories), device) for _ in memories]
    for rank in range(len(memories)):
        # a GPU that waits for a signal may load no kernel: each is loaded now, with all signals there
        for memory in spare:
            memory[layout(case, len(memories)).signals :] = 0x7F
        call(case, memory_of(case, rank, spare, device), inputs)
    told = [memory_of(case, rank, memories, device) for rank in range(len(memories))]
    torch.cuda.synchronize()
    for i in range(ROUNDS):
        found = []
        for memory, stream in zip(told, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(call(case, memory, inputs))
        torch.cuda.synchronize()
        for to, pair in zip(results, found, strict=True):
            for tensor, value in zip(to, pair, strict=True):
                tensor[i].copy_(value)


def test_norm_of_the_sum_over_ranks(made):
    ranks, of_cases = made
    for case, results, _ in of_cases:
        shares, residual, weight = data(case, ranks, "cpu")
        rounded = [(share.sum(0) if case.parts > 1 else share).to(case.dtype).double() for share in shares]
        total = residual.double() + sum(rounded)
        tolerance = TOLERANCE[case.dtype]
        normed = [normed for normed, _ in results]
        # every rank has all rows, to the last bit, in every round
        assert all(torch.equal(other[i], normed[0][0]) for other in normed for i in range(ROUNDS)), case
        stored = torch.stack([results[row % ranks][1][0, row] for row in range(case.rows)])
        # the interpreter cuts a share off where a GPU rounds it
        torch.testing.assert_close(stored.double(), total, rtol=tolerance / 2, atol=tolerance * ranks)
        expected = add_rms_norm_torch(None, stored.to(case.dtype), weight, EPS)
        if case.quantized:
            expected = quantize_rows_torch(expected)
            expected = expected.values.float() * expected.scale[:, None]
            tolerance = max(tolerance, 0.13)  # a step of FP8, where rounding before it differs
        torch.testing.assert_close(normed[0][0], expected.float(), rtol=tolerance, atol=tolerance / 4)
        for rank, (_, left) in enumerate(results):
            for row in range(case.rows):
                wanted = stored[row] if case.whole or row % ranks == rank else residual[row].float()
                assert all(torch.equal(left[i, row], wanted) for i in range(ROUNDS)), (case, rank, row)


def test_nothing_else_is_written(made):
    """Rows past the last stay as they were; each program that took rows met the others twice in each round."""
    ranks, of_cases = made
    for case, _, memories in of_cases:
        for memory in memories:
            told = RankMemory(memory.cpu(), torch.zeros(ranks), torch.zeros(PROGRAMS), 0, layout(case, ranks))
            itemsize = 1 if case.quantized else case.dtype.itemsize
            for start, used in ((0, case.dtype.itemsize), (told.layout.normed, itemsize)):
                part = told.own[start : start + told.layout.normed]
                assert (part[case.rows * WIDTH * used :] == POISON).all(), case
            scales = told.own[told.layout.scales : told.layout.signals]
            assert (scales[4 * case.rows * case.quantized :] == POISON).all(), case
            met = told.signals.view(PROGRAMS, ranks)
            programs = min(-(-case.rows // ranks), PROGRAMS)
            assert (met.amax(1)[:programs] == (2 * ROUNDS if ranks > 1 else 0)).all() and (met[programs:] == 0).all()


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
    case = Case(0, torch.float32, 2, 1, False, False)
    memory = memory_of(case, 0, [make_memory(case, 1, "cpu")], "cpu")
    rows, width = change.get("rows", 2), change.get("width", WIDTH)
    x, weight = change.get("x", torch.ones(rows, width)), change.get("weight", torch.ones(width))
    with pytest.raises(ValueError, match=message):
        sum_rms_norm_triton(x, torch.ones(rows, width), weight, EPS, memory)


def test_as_many_programs_as_run_at_once(monkeypatch):
    monkeypatch.setattr(ranks_norm, "num_processors", lambda device: 7)
    assert ranks_norm.num_programs(torch.device("cpu")) == 7
