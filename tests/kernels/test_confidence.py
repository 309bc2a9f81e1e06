"""The predicted token and its confidence, kernel and twin, against float64, and at the edges of floating point."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels import philox
from blockinfer.kernels.confidence import RowOptions, Vocabulary, token_confidence_torch, token_confidence_triton

# What numpy says of the interpreter's infinities and NaN: a maximum passes over NaN, also where there is nothing else,
# and 0 times -inf shows the kernel that a logit is -inf.
IN_NUMPY = [
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning"),
]
pytestmark = IN_NUMPY

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SPECIAL = torch.tensor([0.0, 1.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)


class Case(NamedTuple):
    """matrix [N, more than V]: its columns from 3 on are the logits, whose first vocab_size ones are read."""

    matrix: torch.Tensor
    vocab_size: int
    mask_token_id: int
    seed: int
    block: int
    # what the flags of the rows mean
    eos_ids: tuple[int, ...] = ()
    last_ids: tuple[int, ...] = ()

    @property
    def logits(self):
        return self.matrix[:, 3:-2]

    @property
    def vocabulary(self):
        ids = (torch.tensor(ids, dtype=torch.int64, device=self.matrix.device) for ids in self[-2:])
        return Vocabulary(self.vocab_size, self.mask_token_id, *ids)


def draw_row(kind, g, width):
    row = torch.randn(width, generator=g, dtype=torch.float64)
    special = SPECIAL[torch.randint(len(SPECIAL), (width,), generator=g)]
    return {
        "flat": row * 0.01,
        "peaked": row * 30,
        "ties": row.round(),
        "huge": row.sign() * 65504,
        "special": special,
        "few special": torch.where(torch.rand(width, generator=g) < 0.05, special, row),
        "-inf": torch.full_like(row, -torch.inf),
        "+inf": torch.full_like(row, torch.inf),
        "nan": torch.full_like(row, torch.nan),
    }[kind]


KINDS = ["flat", "peaked", "ties", "huge", "special", "few special", "-inf", "+inf", "nan"]

BLOCKS = st.sampled_from([16, 32, 128])


@st.composite
def cases(draw, kinds=KINDS, dtypes=FLOATS):
    vocab_size = draw(st.integers(1, 70) | st.sampled_from([1, 2, 16, 17, 64, 129]))
    width = vocab_size + draw(st.integers(0, 20))
    anywhere = st.integers(0, width - 1) | st.sampled_from([0, vocab_size - 1, width])
    mask_token_id = draw(anywhere.filter(lambda i: vocab_size > 1 or i > 0))  # which leaves a candidate
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    rows = [draw_row(kind, g, width + 5) for kind in draw(st.lists(st.sampled_from(kinds), max_size=4))]
    matrix = torch.stack(rows) if rows else torch.zeros(0, width + 5)
    matrix[:, 3 + vocab_size :] = torch.nan
    matrix[:, :3] = torch.inf
    ids = st.lists(st.integers(0, vocab_size - 1), unique=True, max_size=3)
    eos_ids, last_ids = draw(ids), draw(ids)
    return Case(
        matrix.to(draw(st.sampled_from(dtypes))), vocab_size, mask_token_id, seed, draw(BLOCKS), eos_ids, last_ids
    )


class Exact(NamedTuple):
    """Of each row, float64: probabilities [N, V], what has a share in them [N, V], whether it is finite, and the logits
    with their noise, NaN where there is no candidate."""

    probabilities: torch.Tensor
    share: torch.Tensor
    finite: torch.Tensor
    noisy: torch.Tensor


def exact(case, options, noise=0.0):
    """The definition."""
    x = case.logits.double().cpu()[:, : case.vocab_size]
    ids = torch.arange(case.vocab_size)
    candidate = ids != case.mask_token_id
    eos, last = (torch.isin(ids, torch.tensor(values, dtype=torch.int64)) for values in case[-2:])
    forbidden = options.forbid_eos.cpu()[:, None] & eos
    x = torch.where(forbidden & (x < torch.inf), -torch.inf, torch.where(forbidden, torch.nan, x))
    finite = x[:, candidate].amax(dim=1).isfinite()  # the maximum of a row with NaN is NaN
    x = torch.where(candidate & ~x.isnan(), x, -torch.inf)
    noisy = torch.where(candidate, x + noise, torch.nan)
    share = candidate & ~(options.eos_last.cpu()[:, None] & last)
    x = torch.where(share, x, -torch.inf)
    top = x.amax(dim=1, keepdim=True)
    weight = torch.where(x == top, 1.0, (x - top).exp()) * share
    return Exact(weight / weight.sum(dim=1, keepdim=True), share, finite, noisy)


def check(result, expected):
    assert [tensor.dtype for tensor in result] == [torch.int64, torch.float32, torch.float32, torch.bool]
    token_ids, others, entropy = (tensor.cpu() for tensor in result[:3])
    # that a flagged row is not finite is all that is promised of it
    sound = expected.finite | expected.share.any(dim=1)
    without = ~expected.share.gather(1, token_ids[:, None])[:, 0]
    assert (others[without].isposinf() & entropy[without].isposinf()).all()
    with_share = sound & ~without
    rest = expected.probabilities.scatter(1, token_ids[:, None], 0.0).sum(dim=1)
    certainty = torch.special.entr(expected.probabilities).sum(dim=1)
    # relative to what the others have, however little that is
    torch.testing.assert_close(others.double()[with_share], rest[with_share], rtol=3e-5, atol=1e-36)
    torch.testing.assert_close(entropy.double()[with_share], certainty[with_share], rtol=2e-5, atol=1e-6)
    assert result.finite.tolist() == expected.finite.tolist()


def plain_options(rows, device):
    """Of rows that ask for nothing."""
    wide = [torch.zeros(rows, dtype=torch.float64, device=device)]
    narrow = [torch.zeros(rows, dtype=torch.bool, device=device)] * 2
    return RowOptions(*wide, *[torch.zeros(rows, dtype=torch.int64, device=device)] * 3, *narrow)


def flagged(case, options):
    """With flags on some of the rows."""
    g = torch.Generator().manual_seed(case.seed + 1)
    flags = (torch.rand(2, len(case.matrix), generator=g) < 0.4).to(case.matrix.device)
    return options._replace(forbid_eos=flags[0].contiguous(), eos_last=flags[1].contiguous())


def implementations(case, device, options=None):
    case = case._replace(matrix=case.matrix.to(device))
    options = plain_options(len(case.matrix), device) if options is None else options
    before = case.logits.clone()
    if case.matrix.dtype != torch.float64:
        yield token_confidence_triton(case.logits, case.vocabulary, options, block=case.block)
    yield token_confidence_torch(case.logits, case.vocabulary, options)
    torch.testing.assert_close(case.logits, before, rtol=0, atol=0, equal_nan=True)


@given(case=cases(dtypes=[torch.float64, *FLOATS]))
def test_equals_its_definition(device, guarded_empty, case):
    options = flagged(case, plain_options(len(case.matrix), "cpu"))
    expected = exact(case, options)
    best = expected.noisy.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(dim=1, keepdim=True)
    for result in implementations(case, device, RowOptions(*(tensor.to(device) for tensor in options))):
        assert (
            result.token_ids.tolist() == (expected.noisy == best).int().argmax(dim=1).tolist()
        )  # the lowest of equals
        check(result, expected)
    if case.matrix.dtype != torch.float64:
        guarded_empty.check()


def draw_noise(seed, rows, temperatures, device):
    g = torch.Generator().manual_seed(seed)
    temperature = torch.tensor(temperatures, dtype=torch.float64)[
        torch.randint(len(temperatures), (rows,), generator=g)
    ]
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g)
    position, step = torch.randint(0, 4096, (2, rows), generator=g)
    noise = (tensor.to(device) for tensor in (temperature, seeds, position.clone(), step.clone()))
    return RowOptions(*noise, *plain_options(rows, device)[4:])


@given(case=cases())
def test_noise(device, guarded_empty, case):
    """The token is the best of the noisy logits, but for a difference in the last bits of a logarithm."""
    rows = len(case.matrix)
    plain = flagged(case._replace(matrix=case.matrix.to(device)), plain_options(rows, device))
    options = draw_noise(case.seed, rows, [0.0, 0.3, 1.0, 5.0], device)._replace(
        forbid_eos=plain.forbid_eos, eos_last=plain.eos_last
    )
    draws = philox.gumbel(options.seed.cpu(), options.position.cpu(), options.step.cpu(), case.vocab_size)
    expected = exact(case, options, noise=options.temperature.cpu()[:, None] * draws)
    noisy = expected.noisy
    best = noisy.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(dim=1)
    for result, greedy in zip(
        implementations(case, device, options), implementations(case, device, plain), strict=True
    ):
        check(result, expected)
        chosen = noisy.gather(1, result.token_ids.cpu()[:, None])[:, 0]
        assert (chosen >= best - 1e-9).all()
        # the lowest of equals
        assert ((noisy == best[:, None]).int().argmax(dim=1) == result.token_ids.cpu())[best.isinf()].all()
        for with_noise, without in zip(result, greedy, strict=True):
            cold = options.temperature == 0
            assert torch.equal(with_noise[cold], without[cold])
    guarded_empty.check()


def test_noisy_logits_are_compared_in_float64(device):
    """Logits that cancel their noise, as far as float32 can: what decides is below its precision."""
    options = draw_noise(0, 5, [1.0], device)
    draws = philox.gumbel(options.seed, options.position, options.step, 200)
    logits = -draws.float()
    best = (logits.double() + draws).argmax(dim=1)
    vocabulary = words(200, 200, device)
    for implementation in (token_confidence_triton, token_confidence_torch):
        assert torch.equal(implementation(logits, vocabulary, options).token_ids, best)


def words(vocab_size, mask_token_id, device):
    return Vocabulary(vocab_size, mask_token_id, *[torch.zeros(0, dtype=torch.int64, device=device)] * 2)


def test_sampled_tokens_follow_the_softmax_at_that_temperature(device):
    rows, temperature = 20_000, 0.7
    logits = torch.tensor([[2.0, 1.0, 0.0, 5.0]], device=device)  # 5.0 is the mask token's
    index = torch.arange(rows, device=device)
    noise = torch.full_like(index, temperature, dtype=torch.float64), index * 0 + 11, index, index * 0
    options, vocabulary = RowOptions(*noise, *plain_options(rows, device)[4:]), words(4, 3, device)
    token_ids, others, _, _ = token_confidence_torch(logits.repeat(rows, 1), vocabulary, options)
    # Gumbel noise times T added to the logits samples softmax(logits / T)
    expected = (logits[0, :3].double() / temperature).softmax(-1)
    frequency = token_ids.bincount(minlength=3).double() / rows
    torch.testing.assert_close(frequency, expected, rtol=0, atol=4 * (0.25 / rows) ** 0.5)
    torch.testing.assert_close(1 - others, logits[0, :3].softmax(-1)[token_ids])
    rows = rows if device == "cuda" else 100  # the interpreter runs one program after the other
    some = RowOptions(*(tensor[:rows] for tensor in options))
    drawn = token_confidence_triton(logits.repeat(rows, 1), vocabulary, some, block=16)
    assert torch.equal(drawn.token_ids, token_ids[:rows])


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize(("mask_token_id", "token", "candidates"), [(0, 1, 40), (39, 0, 40), (41, 0, 41)])
def test_a_row_without_any_preference(device, value, mask_token_id, token, candidates):
    """All candidates at -inf, or all at +inf: the lowest id but for the mask, each as likely as the others."""
    case = Case(torch.full((1, 47), value), 41, mask_token_id, 0, 16)
    for token_ids, others, entropy, finite in implementations(case, device):
        assert token_ids.tolist() == [token] and finite.tolist() == [False]
        torch.testing.assert_close(others.cpu(), torch.tensor([1 - 1 / candidates]))
        torch.testing.assert_close(entropy.cpu(), torch.tensor([math.log(candidates)]))


@pytest.mark.parametrize("scale", [1e3, 3e9, 2e15, 3e29, 2e30])
def test_logits_of_any_size(device, scale):
    """Four of thirty are the largest; of the others, one is next to them and one the mask token."""
    matrix = torch.full((1, 38), -scale)
    matrix[0, [5, 9, 20, 31]] = scale
    matrix[0, [12, 3 + 17]] = torch.tensor([0.9999, 1.5]) * scale
    matrix[0, 20 + 1] = scale
    for token_ids, others, entropy, _ in implementations(Case(matrix, 30, 17, 0, 16), device):
        assert token_ids.tolist() == [2]
        expected = 1 / (4 + math.exp(-0.1)) if scale == 1e3 else 0.25
        torch.testing.assert_close(others.cpu(), torch.tensor([1 - expected]), rtol=1e-4, atol=0)
        assert scale == 1e3 or entropy.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("mask_token_id", [0, 15, 16, 31, 32])
def test_the_mask_token_is_no_candidate_wherever_in_a_tile(device, mask_token_id):
    """Its logit is the largest; of the others the last one is."""
    matrix = torch.zeros(1, 38)
    matrix[0, [3 + mask_token_id, 34]] = torch.tensor([9.0, 1.0])
    for result in implementations(Case(matrix, 33, mask_token_id, 0, 16), device):
        assert result.token_ids.tolist() == [31 if mask_token_id != 31 else 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_finite_speaks_of_the_candidates_alone(device, value):
    """One logit of a row: a candidate's in the first tile or the last, the mask token's, one past the vocabulary."""
    matrix = torch.zeros(5, 47)
    matrix[range(4), [3, 43, 3 + 21, 44]] = value
    for result in implementations(Case(matrix, 41, 21, 0, 16), device):
        assert result.finite.tolist() == [value == -torch.inf] * 2 + [True] * 3


def test_differences_that_overflow_float32(device):
    largest = torch.finfo(torch.float32).max
    case = Case(torch.tensor([[0.0] * 3 + [-largest] * 20 + [largest, -largest, largest] + [0.0] * 2]), 23, 23, 0, 16)
    for result in implementations(case, device):
        assert [tensor.tolist() for tensor in result[:2]] == [[20], [0.5]] and result.finite.all()
        torch.testing.assert_close(result.entropy.cpu(), torch.tensor([math.log(2)]))


@given(case=cases(kinds=["flat", "peaked", "ties"], dtypes=[torch.float32]), constant=st.integers(-4096, 4096))
def test_a_constant_added_to_a_row_changes_nothing(device, case, constant):
    eighths = (case.matrix * 8).round() / 8  # to which an integer is added exactly
    before = implementations(case._replace(matrix=eighths), device)
    after = implementations(case._replace(matrix=eighths + constant), device)
    for results in zip(before, after, strict=True):
        assert all(torch.equal(*tensors) for tensors in zip(*results, strict=True))


@given(case=cases(), other_block=BLOCKS)
def test_a_row_depends_on_no_other_row_and_not_on_the_tiles(device, case, other_block):
    case = case._replace(matrix=case.matrix.to(device))
    options = flagged(case, draw_noise(case.seed, len(case.matrix), [0.0, 1.0], device))
    whole = token_confidence_triton(case.logits, case.vocabulary, options, block=case.block)
    order = torch.randperm(len(case.matrix), generator=torch.Generator().manual_seed(case.seed)).to(device)
    order = order[: max(1, len(order) // 2)]
    # sliced as the whole is: where a row begins decides how a GPU loads it, and so the order of its sums
    some, of_some = case._replace(matrix=case.matrix[order]), RowOptions(*(t[order] for t in options))
    moved = token_confidence_triton(some.logits, case.vocabulary, of_some, block=case.block)
    assert all(torch.equal(a[order], b) for a, b in zip(whole, moved, strict=True))
    tiled = token_confidence_triton(case.logits, case.vocabulary, options, block=other_block)
    torch.testing.assert_close(tuple(tiled), tuple(whole), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("gap", [5.0, 18.0, 25.0, 60.0])
def test_what_is_nearly_certain_keeps_an_order(device, gap):
    """Two rows whose float32 probabilities are equal, 1 from a gap of 17 on, but not what they leave to others."""
    matrix = torch.zeros(2, 47)
    matrix[:, 3 + 33] = torch.tensor([gap, gap + 0.01])
    for result in implementations(Case(matrix, 41, 41, 0, 16), device):
        assert result.token_ids.tolist() == [33, 33]
        expected = 40 * torch.exp(-matrix[:, 36].double()) / (1 + 40 * torch.exp(-matrix[:, 36].double()))
        torch.testing.assert_close(result.others.double().cpu(), expected, rtol=1e-5, atol=0)
        assert result.others[0] > result.others[1] > 0


def test_eos_that_is_last_has_no_share_in_the_others_softmax(device):
    """LLaDA's confidence_eos_eot_inf: the token may still be EOS, which then goes last; the rest is surer without."""
    matrix = torch.zeros(3, 12)
    matrix[:, [3 + 2, 3 + 5]] = torch.tensor([[4.0, 3.0], [3.0, 4.0], [3.0, 4.0]])
    options = plain_options(3, device)._replace(eos_last=torch.tensor([True, True, False], device=device))
    rest = 4 * math.exp(-4), 4 * math.exp(-4) + math.exp(-1)
    for result in implementations(Case(matrix, 7, 0, 0, 16, (), (5,)), device, options):
        assert result.token_ids.tolist() == [2, 5, 5]
        expected = torch.tensor([rest[0] / (1 + rest[0]), math.inf, rest[1] / (1 + rest[1])])
        torch.testing.assert_close(result.others.cpu(), expected, rtol=1e-5, atol=0)
        assert result.entropy.isposinf().tolist() == [False, True, False] and result.finite.all()


def test_a_tile_with_what_is_rare_is_read_in_chunks(device):
    """Of sixteen columns: logits that rise, fall and do both, with tokens left out in every tile, and a NaN."""
    columns = torch.arange(265.0)
    matrix = torch.stack([columns / 9, -columns / 9, columns % 37 / 2, columns % 37 / 2])
    matrix[3, 60] = torch.nan
    case = Case(matrix, 260, 130, 0, 128, (5, 250), (40, 200, 259))
    flags = torch.tensor([False, True, True, True]), torch.tensor([True, True, False, True])
    options = RowOptions(*plain_options(4, "cpu")[:4], *flags)
    expected = exact(case, options)
    tokens = expected.noisy.nan_to_num(nan=-torch.inf).argmax(dim=1)
    for result in implementations(case, device, RowOptions(*(tensor.to(device) for tensor in options))):
        check(result, expected)
        assert result.token_ids.tolist() == tokens.tolist()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_whole_vocabulary_in_the_tiles_of_an_engine(device, guarded_empty, dtype):
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 126_464 + 5, generator=g) * 4).to(dtype)
    case = Case(logits, 126_464, 126_336, 0, 4096)
    expected = exact(case, plain_options(2, "cpu"))
    result = next(implementations(case, device))
    check(result, expected)
    assert result.token_ids.tolist() == expected.noisy.nan_to_num(nan=-torch.inf).argmax(dim=1).tolist()
    guarded_empty.check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_more_than_2_31_elements_apart(device, guarded_empty):
    storage = guarded_empty.empty(2**31 + 64, dtype=torch.float16, device=device)
    logits = storage.as_strided((3, 64), (2**30, 1))
    logits.copy_(torch.arange(64).flip(0).expand(3, 64))
    logits[2, 40] = 100
    result = token_confidence_triton(logits, words(64, 7, device), plain_options(3, device))
    assert result.token_ids.tolist() == [0, 0, 40]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=torch.zeros(8)), r"logits must be \[N, V\], .* got \(8,\)"),
        (dict(logits=torch.zeros(3, 7)), r"V at least 8 .* got \(3, 7\)"),
        (dict(logits=torch.zeros(8, 3).mT), r"its stride 1, got \(3, 8\) with strides \(1, 3\)"),
        (dict(vocabulary=words(1, 0, "cpu")), "vocab_size 1 has no candidate but the mask token 0"),
        (dict(vocabulary=words(0, 7, "cpu")), "vocab_size 0 has no candidate"),
        (dict(options=plain_options(2, "cpu")), r"contiguous tensors \[3\], got \[\(2,\), "),
        (dict(options=RowOptions(*[torch.zeros(1).expand(3)] * 6)), "contiguous tensors"),
    ],
)
def test_misfits_are_named(change, message):
    right = dict(logits=torch.zeros(3, 8), vocabulary=words(8, 7, "cpu"), options=plain_options(3, "cpu"))
    with pytest.raises(ValueError, match=message):
        token_confidence_triton(**right | change)
