"""The confidence over shards of the vocabulary, kernels and twin, against the definition over all of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels import philox
from blockinfer.kernels.confidence import RowOptions, token_confidence_torch
from blockinfer.kernels.sharded_confidence import (
    Shard,
    merge_torch,
    merge_triton,
    summary,
    summary_torch,
    summary_triton,
)
from tests.kernels.test_confidence import (
    FLOATS,
    IN_NUMPY,
    Case,
    cases,
    check,
    draw_noise,
    exact,
    flagged,
    plain_options,
    words,
)

pytestmark = IN_NUMPY


def sharded(case, options, ranks, in_triton):
    """As `ranks` ranks would find it, each with its columns; NaN stands past the vocabulary."""
    columns = -(-case.logits.shape[1] // ranks)
    padded = torch.nn.functional.pad(case.logits, (0, ranks * columns - case.logits.shape[1]), value=torch.nan)
    found = []
    for rank, logits in enumerate(padded.split(columns, dim=1)):
        shard = Shard.of(case.vocabulary, columns, rank)
        if not shard.has_candidates:
            found.append(summary(logits, shard, options))
        elif in_triton:
            found.append(summary_triton(logits, shard, options, block=case.block))
        else:
            found.append(summary_torch(logits, shard, options))
    return (merge_triton if in_triton else merge_torch)(torch.stack(found), columns)


def implementations(case, device, options, ranks):
    case = case._replace(matrix=case.matrix.to(device))
    options = RowOptions(*(tensor.to(device) for tensor in options))
    if case.matrix.dtype != torch.float64:
        yield sharded(case, options, ranks, in_triton=True)
    yield sharded(case, options, ranks, in_triton=False)


@given(case=cases(dtypes=[torch.float64, *FLOATS]), ranks=st.integers(1, 4))
def test_equals_the_definition(device, guarded_empty, case, ranks):
    options = flagged(case, plain_options(len(case.matrix), "cpu"))
    expected = exact(case, options)
    best = expected.noisy.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(dim=1, keepdim=True)
    # a tie between ranks has the lowest id too
    tokens = (expected.noisy == best).int().argmax(dim=1).tolist()
    for result in implementations(case, device, options, ranks):
        assert result.token_ids.tolist() == tokens
        check(result, expected)
    if case.matrix.dtype != torch.float64:
        guarded_empty.check()


@given(case=cases(dtypes=[torch.float64, torch.float32]), ranks=st.integers(2, 3))
def test_noise_is_that_of_the_whole_vocabulary(device, case, ranks):
    rows = len(case.matrix)
    plain = flagged(case, plain_options(rows, "cpu"))
    options = draw_noise(case.seed, rows, [0.0, 0.3, 5.0], "cpu")
    options = options._replace(forbid_eos=plain.forbid_eos, eos_last=plain.eos_last)
    draws = philox.gumbel(options.seed, options.position, options.step, case.vocab_size)
    expected = exact(case, options, noise=options.temperature[:, None] * draws)
    best = expected.noisy.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(dim=1)
    for result in implementations(case, device, options, ranks):
        check(result, expected)
        chosen = expected.noisy.gather(1, result.token_ids.cpu()[:, None])[:, 0]
        assert (chosen >= best - 1e-9).all()


def test_shards_in_the_tiles_of_an_engine(device):
    """Each has two, which noise halves; some rows have what is rare, which is read in chunks."""
    g = torch.Generator().manual_seed(0)
    case = Case(torch.randn(6, 13_010, generator=g) * 4, 13_000, 12_900, 0, 4096, (5, 7000), (6400, 12_999))
    case.logits[5, 9000] = torch.nan
    plain = flagged(case, plain_options(6, "cpu"))
    assert plain.forbid_eos.any() and plain.eos_last.any() and not (plain.forbid_eos | plain.eos_last).all()
    options = draw_noise(0, 6, [0.0, 0.7, 3.0], "cpu")._replace(forbid_eos=plain.forbid_eos, eos_last=plain.eos_last)
    draws = philox.gumbel(options.seed, options.position, options.step, case.vocab_size)
    expected = exact(case, options, noise=options.temperature[:, None] * draws)
    tokens = expected.noisy.nan_to_num(nan=-torch.inf).argmax(dim=1).tolist()
    assert min(tokens) < 6504 < max(tokens)
    for result in implementations(case, device, options, ranks=2):
        check(result, expected)
        assert result.token_ids.tolist() == tokens


@pytest.mark.parametrize("gap", [5.0, 25.0, 60.0])
def test_what_is_nearly_certain_keeps_an_order(device, gap):
    """The others' sum is one of sums, in which what is small is not lost, wherever the token is."""
    matrix = torch.zeros(2, 12)
    matrix[:, 7] = torch.tensor([gap, gap + 0.01])
    options = plain_options(2, device)
    for columns in (3, 4, 6):
        found = [
            summary_torch(part, Shard.of(words(12, 12, device), columns, rank), options)
            for rank, part in enumerate(matrix.to(device).split(columns, dim=1))
        ]
        others = merge_torch(torch.stack(found), columns).others
        whole = token_confidence_torch(matrix.to(device), words(12, 12, device), options).others
        torch.testing.assert_close(others, whole, rtol=1e-5, atol=0)
        assert others[0] > others[1] > 0
