"""The router, kernel and twin, against the definition: one row at a time, sorted by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels import linear
from blockinfer.kernels.router import RouterRule, route, route_torch, route_triton


def by_hand(logits, bias, rule):
    """One row, float64: the chosen experts in order, and their weights."""
    logits = logits.double().tolist()
    if rule.sigmoid:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        powers = [math.exp(x - max(logits)) for x in logits]
        scores = [power / sum(powers) for power in powers]
    ranked = [score + b for score, b in zip(scores, bias, strict=True)]
    per = len(ranked) // rule.groups
    groups = list(range(rule.groups))
    if rule.groups > 1:
        total = [sum(sorted(ranked[g * per : g * per + per])[-2:]) for g in groups]
        groups = sorted(groups, key=lambda g: (-total[g], g))[: rule.groups_kept]
    allowed = [e for e in range(len(ranked)) if e // per in groups]
    chosen = sorted(allowed, key=lambda e: (-ranked[e], e))[: rule.top_k]
    weights = [scores[e] for e in chosen]
    whole = sum(weights) + 1e-20 if rule.normalized else 1
    shared = range(len(ranked), len(ranked) + rule.shared)
    return [*chosen, *shared], [*(w / whole * rule.scale for w in weights), *(1.0 for _ in shared)]


@st.composite
def cases(draw):
    groups = draw(st.sampled_from([1, 1, 2, 4, 8]))
    per = draw(st.integers(2, 9))
    kept = draw(st.integers(1, groups))
    rule = RouterRule(
        top_k=draw(st.integers(1, min(8, kept * per))),
        sigmoid=draw(st.booleans()),
        groups=groups,
        groups_kept=kept,
        normalized=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        shared=draw(st.integers(0, 2)),
    )
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, experts = draw(st.integers(0, 5)), groups * per
    # few values, so that there are ties
    logits = torch.randint(-4, 5, (rows, experts), generator=g) / draw(st.sampled_from([1.0, 2.0, 0.125]))
    bias = torch.randint(0, 3, (experts,), generator=g) / 4 if draw(st.booleans()) else None
    return logits, bias, rule


def check(found, logits, bias, rule):
    assert found.experts.dtype == torch.int32 and found.experts.shape == (len(logits), rule.top_k + rule.shared)
    for row, experts, weights in zip(logits, found.experts.tolist(), found.weights.tolist(), strict=True):
        expected = by_hand(row, [0.0] * len(row) if bias is None else bias.tolist(), rule)
        assert experts == expected[0]
        assert weights == pytest.approx(expected[1], rel=1e-5)


@given(case=cases())
def test_twin(case):
    logits, bias, rule = case
    # at float64, equal sums are equal
    check(route_torch(logits.double(), None if bias is None else bias.double(), rule, torch.float64), *case)


@given(case=cases(), parts=st.integers(1, 3))
def test_kernel(device, guarded_empty, case, parts):
    """Against the twin at float32: where it decides by a rounding, the definition in float64 may tip otherwise."""
    logits, bias, rule = case
    split = torch.stack([logits / 2**i for i in range(1, parts)] + [logits / 2 ** (parts - 1)])
    on_device = None if bias is None else bias.float().to(device)
    found = route_triton(split.float().to(device), on_device, rule, torch.float32)
    guarded_empty.check()
    expected = route_torch(logits.float(), None if bias is None else bias.float(), rule, torch.float32)
    near = [_near_tie(row, bias, rule) for row in logits]
    same = (found.experts.cpu() == expected.experts).all(-1)
    assert all(tie or equal for tie, equal in zip(near, same.tolist(), strict=True))
    torch.testing.assert_close(found.weights.cpu()[same], expected.weights[same], rtol=1e-5, atol=1e-7)


def _near_tie(row, bias, rule):
    """Whether two different values that are compared differ by a rounding alone."""
    scores = row.double().sigmoid() if rule.sigmoid else row.double().softmax(-1)
    ranked = scores if bias is None else scores + bias.double()
    sums = ranked.unflatten(-1, (rule.groups, -1)).topk(2, dim=-1).values.sum(-1)

    def close(values):
        ordered = values.sort().values.diff()
        return bool(((ordered > 0) & (ordered < 1e-6)).any())

    # equal logits with unequal biases, or equal sums of unequal scores, round either way
    return close(ranked) or (rule.groups > 1 and close(sums)) or _tied_by_sum(ranked, sums, row, bias, rule)


def _tied_by_sum(ranked, sums, row, bias, rule):
    tied = len(set(ranked.tolist())) < len(
        {(float(a), float(b)) for a, b in zip(row, _or_zero(bias, row), strict=True)}
    )
    return tied or (rule.groups > 1 and len(set(sums.tolist())) < rule.groups)


def _or_zero(bias, row):
    return torch.zeros_like(row) if bias is None else bias


def test_ties_go_to_the_lower_expert_and_the_lower_group(device):
    rule = RouterRule(top_k=3, sigmoid=True, groups=4, groups_kept=2)
    logits = torch.zeros(2, 12, device=device)
    logits[1, 11] = 1.0
    for found in (route_triton(logits, None, rule, torch.float32), route_torch(logits, None, rule, torch.float32)):
        assert found.experts.tolist() == [[0, 1, 2], [11, 0, 1]]


@pytest.mark.parametrize("implementation", [route_triton, route_torch])
@pytest.mark.parametrize("sigmoid", [True, False])
def test_logits_that_are_not_finite(device, implementation, sigmoid):
    """Valid experts, each once; the weights show what was wrong."""
    rule = RouterRule(top_k=4, sigmoid=sigmoid, groups=2, groups_kept=1, normalized=True)
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(device)
    logits[0] = torch.nan
    logits[1, 3] = torch.nan
    logits[2, 5] = torch.inf
    logits[3] = -torch.inf
    found = implementation(logits, None, rule, torch.float32)
    for experts in found.experts.tolist():
        assert len(set(experts)) == 4 and all(0 <= e < 8 for e in experts)
    assert found.weights[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_logits_and_weights(device, dtype):
    """As a network that computes its router in half precision has them; the interpreter rounds float16 right."""
    logits = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).to(device)
    rule = RouterRule(top_k=4, sigmoid=False, rounded=True)
    expected = route_torch(logits.cpu(), None, rule, dtype)
    exact = route_torch(logits.cpu(), None, rule._replace(rounded=False), dtype)
    assert torch.equal(expected.weights, expected.weights.to(dtype).float())
    assert not torch.equal(exact.weights, expected.weights)
    if dtype == torch.float16 or logits.is_cuda:
        found = route_triton(logits, None, rule, dtype)
        assert (found.experts.cpu() == expected.experts).float().mean() > 0.95
        same = (found.experts.cpu() == expected.experts).all(-1)
        torch.testing.assert_close(found.weights.cpu()[same], expected.weights[same], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_s_own_product(device, monkeypatch, rows, dtype):
    """From x on, by the skinny kernel's parts or torch's product; logits of half-precision inputs are not rounded."""
    g = torch.Generator().manual_seed(2)
    x, weight = torch.randn(rows, 256, generator=g).to(dtype), torch.randn(24, 256, generator=g).to(dtype) / 16
    rule = RouterRule(top_k=3, sigmoid=True, normalized=True)
    expected = route_torch(x.double() @ weight.double().T, None, rule, torch.float64)
    monkeypatch.setattr(linear, "_is_skinny", lambda x: rows <= 64 and x.dtype != torch.float32)
    if device == "cpu":
        monkeypatch.setattr("blockinfer.kernels.router.runs_triton", lambda x: True)
        monkeypatch.setattr(linear, "num_processors", lambda device: 8)
    found = route(x.to(device), weight.to(device), None, rule)
    same = (found.experts.cpu() == expected.experts).all(-1)
    assert same.float().mean() > 0.97
    torch.testing.assert_close(found.weights.cpu()[same].double(), expected.weights[same], rtol=1e-4, atol=1e-5)


def test_misfits_are_named():
    rule = RouterRule(top_k=2, sigmoid=True, groups=4)
    with pytest.raises(ValueError, match="E of 4 groups: "):
        route_triton(torch.zeros(2, 6), None, rule, torch.float32)
    with pytest.raises(ValueError, match="float32, contiguous"):
        route_triton(torch.zeros(2, 8, dtype=torch.float16), None, rule, torch.float16)
    with pytest.raises(ValueError, match="the bias must be float32"):
        route_triton(torch.zeros(2, 8), torch.zeros(4), rule, torch.float32)
