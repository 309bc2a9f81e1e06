"""The router of a mixture of experts: which experts a row goes to, and with which weights.

Scores are the sigmoid of the logits, and the best experts of the best groups by score plus bias are chosen
(DeepSeek-V3, arXiv 2412.19437, section 2.1.2); or scores are their softmax (Switch Transformer, arXiv 2101.03961).
Experts that all rows share follow the chosen ones, each with weight 1.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from blockinfer.kernels.backend import begin, launch_options, runs_triton
from blockinfer.kernels.linear import wide_linear


class RouterRule(NamedTuple):
    """top_k: experts per row, from the best `groups_kept` of `groups` groups, ranked by their two best experts.
    sigmoid: else softmax. normalized: the weights are divided by their sum. scale: multiplies the weights. rounded:
    logits and weights are rounded to the network's dtype; else they are at least float32. shared: the number of experts
    after the others that every row uses."""

    top_k: int
    sigmoid: bool
    groups: int = 1
    groups_kept: int = 1
    normalized: bool = False
    scale: float = 1.0
    rounded: bool = False
    shared: int = 0


class Routing(NamedTuple):
    """Each [T, K], K = top_k + shared: a row's experts int32, and their weights, float32 at least."""

    experts: torch.Tensor
    weights: torch.Tensor


def route(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rule: RouterRule) -> Routing:
    """x [T, d], weight [E, d], of one dtype; bias [E] affects the choice of experts, but not their weights.

    Of equal scores the lower expert comes first. A NaN score counts as the lowest, and its weight is NaN.
    """
    logits = wide_linear(x, weight)
    if runs_triton(x):
        return route_triton(logits, bias, rule, x.dtype)
    return route_torch(logits, bias, rule, x.dtype)


def route_torch(logits: torch.Tensor, bias: torch.Tensor | None, rule: RouterRule, dtype: torch.dtype) -> Routing:
    """The twin, of logits [T, E]; dtype: the network's."""
    rows, experts = logits.shape
    if rule.rounded:
        logits = logits.to(dtype).to(logits.dtype)
    scores = logits.sigmoid() if rule.sigmoid else logits.softmax(-1)
    ranked = scores if bias is None else scores + bias
    ranked = ranked.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if rule.groups > 1:
        grouped = ranked.unflatten(-1, (rule.groups, -1))
        best = _first_largest(grouped.topk(2, dim=-1).values.sum(-1), rule.groups_kept)
        kept = torch.zeros(rows, rule.groups, dtype=torch.bool, device=logits.device).scatter_(1, best, True)
        ranked = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    chosen = _first_largest(ranked, rule.top_k)
    weights = scores.gather(1, chosen)
    if rule.normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * rule.scale
    if rule.rounded:
        weights = weights.to(dtype).to(logits.dtype)
    shared = torch.arange(experts, experts + rule.shared, device=logits.device).expand(rows, -1)
    ones = torch.ones(rows, rule.shared, dtype=weights.dtype, device=logits.device)
    return Routing(torch.cat([chosen, shared], dim=1).int(), torch.cat([weights, ones], dim=1))


def _first_largest(x: torch.Tensor, number: int) -> torch.Tensor:
    """torch.topk's indices, except that the lowest of equal ones comes first."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :number]


def route_triton(logits: torch.Tensor, bias: torch.Tensor | None, rule: RouterRule, dtype: torch.dtype) -> Routing:
    """The kernel, of float32 logits [T, E] or parts of them [S, T, E]: a program a row.

    Raises ValueError where a shape or a stride does not fit.
    """
    parts = logits if logits.ndim == 3 else logits[None]
    splits, rows, experts = parts.shape
    if experts % rule.groups or not (logits.is_contiguous() and logits.dtype == torch.float32):
        shape = f"{tuple(logits.shape)} {logits.dtype}"
        raise ValueError(f"logits must be float32, contiguous, [T, E] or [S, T, E], E of {rule.groups} groups: {shape}")
    if bias is not None and (bias.shape != (experts,) or bias.dtype != torch.float32 or not bias.is_contiguous()):
        raise ValueError(f"the bias must be float32, [{experts}], got {bias.dtype}, {tuple(bias.shape)}")
    columns = rule.top_k + rule.shared
    chosen = torch.empty((rows, columns), dtype=torch.int32, device=logits.device)
    weights = torch.empty((rows, columns), dtype=torch.float32, device=logits.device)
    half = dtype if rule.rounded and dtype in (torch.bfloat16, torch.float16) else torch.float32
    _route_kernel[(rows,)](
        parts,
        bias,
        chosen,
        weights,
        rule.scale,
        PARTS=splits,
        EXPERTS=experts,
        TOP_K=rule.top_k,
        GROUPS=rule.groups,
        KEPT=rule.groups_kept,
        SHARED=rule.shared,
        SIGMOID=rule.sigmoid,
        NORMALIZED=rule.normalized,
        BIASED=bias is not None,
        HALF={torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[half],
        BLOCK_G=triton.next_power_of_2(rule.groups),
        BLOCK_E=triton.next_power_of_2(experts // rule.groups),
        BLOCK_K=triton.next_power_of_2(columns),
        num_warps=1,
        **launch_options(logits.device),
    )
    return Routing(chosen, weights)


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    scale,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    SHARED: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BIASED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)  # grid (T,)
    PER: tl.constexpr = EXPERTS // GROUPS
    NONE: tl.constexpr = EXPERTS
    group = tl.arange(0, BLOCK_G)
    place = tl.arange(0, BLOCK_E)
    index = group[:, None] * PER + place[None, :]  # [BLOCK_G, BLOCK_E]
    inside = (group < GROUPS)[:, None] & (place < PER)[None, :]
    plane = tl.num_programs(0).to(tl.int64) * EXPERTS
    logits = tl.zeros([BLOCK_G, BLOCK_E], tl.float32)
    for part in tl.static_range(PARTS):
        logits += tl.load(logits_ptr + part * plane + row * EXPERTS + index, mask=inside, other=0.0)
    logits = logits.to(HALF).to(tl.float32)
    if SIGMOID:
        small = tl.exp(-tl.abs(logits))
        scores = tl.where(logits >= 0, 1.0, small) / (1.0 + small)
        # comparisons with NaN are false
        scores = tl.where(logits == logits, scores, logits)
    else:
        most = tl.max(tl.max(tl.where(inside & (logits == logits), logits, -float("inf")), axis=1), axis=0)
        # of infinite logits the softmax is NaN
        most = tl.where(tl.abs(most) < float("inf"), most, float("nan"))
        scores = tl.where(inside, tl.exp(logits - most), 0.0)
        scores = scores / tl.sum(tl.sum(scores, axis=1), axis=0)
    ranked = scores
    if BIASED:
        ranked += tl.load(bias_ptr + index, mask=inside, other=0.0)
    ranked = tl.where(ranked == ranked, ranked, -float("inf"))
    free = inside
    if GROUPS > 1:
        masked = tl.where(inside, ranked, -float("inf"))
        first = tl.max(masked, axis=1)
        where_first = tl.min(tl.where((masked == first[:, None]) & inside, index, NONE), axis=1)
        second = tl.max(tl.where(index == where_first[:, None], -float("inf"), masked), axis=1)
        total = first + second
        total = tl.where(total == total, total, -float("inf"))
        open_groups = group < GROUPS
        kept = group < 0
        for _ in tl.static_range(KEPT):
            best = tl.max(tl.where(open_groups, total, -float("inf")), axis=0)
            which = tl.min(tl.where(open_groups & (total == best), group, GROUPS), axis=0)
            kept = kept | (group == which)
            open_groups = open_groups & (group != which)
        ranked = tl.where(kept[:, None], ranked, -float("inf"))
    k = tl.arange(0, BLOCK_K)
    chosen = tl.where(k < TOP_K, 0, EXPERTS + k - TOP_K)
    weights = tl.where(k < TOP_K, 0.0, 1.0)
    for i in tl.static_range(TOP_K):
        best = tl.max(tl.max(tl.where(free, ranked, -float("inf")), axis=1), axis=0)
        which = tl.min(tl.min(tl.where(free & (ranked == best), index, NONE), axis=1), axis=0)
        weight = tl.sum(tl.sum(tl.where((index == which) & inside, scores, 0.0), axis=1), axis=0)
        chosen = tl.where(k == i, which, chosen)
        weights = tl.where(k == i, weight, weights)
        free = free & (index != which)
    routed = k < TOP_K
    if NORMALIZED:
        weights = tl.where(routed, weights / (tl.sum(tl.where(routed, weights, 0.0), axis=0) + 1e-20), weights)
    weights = tl.where(routed, (weights * scale).to(HALF).to(tl.float32), weights)
    where = row * (TOP_K + SHARED) + k
    tl.store(experts_ptr + where, chosen, mask=k < TOP_K + SHARED)
    tl.store(weights_ptr + where, weights, mask=k < TOP_K + SHARED)
