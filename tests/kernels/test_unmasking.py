"""The list of masked rows, and what the rules make of its predictions: kernel and twin, against plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.decoding.unmasking import RULES
from blockinfer.kernels.unmasking import (
    Blocks,
    SlotState,
    masked_rows,
    masked_rows_torch,
    masked_rows_triton,
    unmask,
    unmask_torch,
    unmask_triton,
)

SLOTS, LENGTH = 6, 40
SCORES = [0.0, 0.1, 0.25, 0.5, 0.5000001, 0.6, 0.75, 0.9, 1.0, -math.inf]
IMPLEMENTATIONS = {"kernel": (masked_rows_triton, unmask_triton), "twin": (masked_rows_torch, unmask_torch)}


def bits(value):
    return torch.tensor(value, dtype=torch.float64).view(torch.int64)


@st.composite
def steps(draw):
    """A state, blocks in some of its slots, the last perhaps padding, and what is predicted for the masked rows.

    Few different scores, so that ties are common. masked_counts is what is masked, but for broken sequences, of which
    the host counts less, and for those whose last step was cut short, of which it counts more.
    """
    number = draw(st.integers(1, 4))
    slots = draw(st.permutations(range(SLOTS - 1)))[:number]
    lengths = [draw(st.integers(1, 9) | st.sampled_from([16, 33])) for _ in slots]
    starts = [draw(st.integers(0, LENGTH - length)) for length in lengths]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    share = draw(st.sampled_from([0.2, 0.6, 1.0]))
    masked = torch.rand(SLOTS, LENGTH, generator=generator) < share
    broken = torch.rand(SLOTS, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
    counts = []
    for slot, start, length in zip(slots, starts, lengths, strict=True):
        left = int(masked[slot, start : start + length].sum())
        counts.append(draw(st.integers(0, left) if broken[slot] else st.sampled_from([left, length])))
    rules = [draw(st.sampled_from([*RULES])) for _ in range(SLOTS)]
    values = [draw(st.sampled_from([0.0, 0.1, 0.5, 0.92, 1.0, 2.0])) for _ in range(SLOTS)]
    # as the engine keeps them, two of the columns of a larger tensor
    options = torch.stack([torch.tensor([[*RULES].index(rule) for rule in rules]), bits(values)], dim=1)
    state = SlotState(
        tokens=torch.randint(100, (SLOTS, LENGTH), generator=generator),
        masked=masked,
        broken=broken,
        rules=options[:, 0],
        values=options[:, 1],
    )
    columns = [slots, starts, lengths, [3 + 7 * i for i in range(number)], [0] * number]
    columns += [[draw(st.integers(1, 4)) for _ in slots], [draw(st.integers(0, 3)) // 3 for _ in slots]]
    columns += [counts, [0] * number]
    padding = draw(st.integers(0, 2))
    columns = [column + [SLOTS - 1 if i == 0 else 0] * padding for i, column in enumerate(columns)]
    blocks = Blocks(*(torch.tensor(column) for column in columns))
    size = sum(counts) + draw(st.integers(0, 3)) or 1
    scores = torch.tensor([draw(st.sampled_from(SCORES)) for _ in range(size)])
    predicted = torch.randint(200, 300, (size,), generator=generator)
    finite = torch.rand(size, generator=generator) >= draw(st.sampled_from([0.0, 0.1]))
    return rules, state, blocks, size, scores, predicted, finite


def listed(state, blocks):
    """Block, place and row of what `masked_rows` lists, by its definition."""
    rows, first_row = [], int(blocks.first_rows[0])
    for i, (slot, start, length, first, count) in enumerate(
        zip(blocks.slots, blocks.starts, blocks.lengths, blocks.first_rows, blocks.masked_counts, strict=True)
    ):
        places = state.masked[slot, start : start + length].nonzero()[:, 0].tolist()[:count]
        rows += [(i, place, int(first) + place) for place in places]
        rows += [(0, 0, first_row)] * (int(count) - len(places))
    return rows


def on(device, group):
    """Its tensors on the device. rules and values stay the strided views that they are."""
    if not isinstance(group, SlotState):
        return type(group)(*(tensor.to(device) for tensor in group))
    options = torch.stack([group.rules, group.values], dim=1).to(device)
    return SlotState(*(tensor.clone().to(device) for tensor in group[:3]), *options.unbind(1))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(step=steps())
def test_the_list_of_masked_rows(device, guarded_empty, name, step):
    _, state, blocks, size, *_ = step
    expected = listed(state, blocks)
    expected += [(0, 0, int(blocks.first_rows[0]))] * (size - len(expected))
    rows = IMPLEMENTATIONS[name][0](on(device, state), on(device, blocks), int(blocks.lengths.max()), size)
    assert [*zip(*(column.tolist() for column in rows), strict=True)] == expected
    if name == "kernel":
        guarded_empty.check()


def expected_of(step, scores):
    """tokens, masked, broken of all slots and the blocks' results, one block after the other, without padding."""
    rules, state, blocks, _, _, predicted, finite = step
    tokens, masked, broken = (tensor.clone() for tensor in state[:3])
    results, first = {}, 0
    for i, (slot, start, length, count) in enumerate(
        zip(
            *(column.tolist() for column in (blocks.slots, blocks.starts, blocks.lengths, blocks.masked_counts)),
            strict=True,
        )
    ):
        if slot == SLOTS - 1:
            continue
        places = state.masked[slot, start : start + length].nonzero()[:, 0][:count]
        mine = slice(first, first + len(places))
        first += count
        broken[slot] |= bool((~finite[mine]).any())
        rule = RULES[rules[slot]]
        value = state.values[slot : slot + 1].view(torch.float64).float()
        all_masked = torch.ones(1, len(places), dtype=torch.bool)
        if len(places) and not broken[slot]:
            chosen = rule.select(scores[rules[slot]][None, mine], all_masked, blocks.counts[i : i + 1], value)[0]
            chosen |= bool(blocks.last_steps[i])
            tokens[slot, start + places[chosen]] = predicted[mine][chosen]
            masked[slot, start + places[chosen]] = False
        block = slice(start, start + length)
        results[i] = [int(broken[slot]), int(masked[slot, block].sum()), *tokens[slot, block].tolist()]
    return tokens, masked, broken, results


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(step=steps())
def test_what_each_rule_makes_of_its_blocks(device, name, step):
    """Several rules in one step, one after the other, each for its own sequences alone."""
    _, state, blocks, _, scores, predicted, finite = step
    ranked = {rule: scores - 1 if RULES[rule].score == "certainty" else scores for rule in RULES}
    tokens, masked, broken, results = expected_of(step, ranked)
    mine = on(device, state)
    result = torch.full((len(blocks.slots), 2 + int(blocks.lengths.max())), -7, device=device)
    for rule, values in ranked.items():
        tensors = (tensor.to(device) for tensor in (values, predicted, finite))
        IMPLEMENTATIONS[name][1](rule, *tensors, mine, on(device, blocks), result)
    assert torch.equal(mine.tokens[:-1].cpu(), tokens[:-1])
    assert torch.equal(mine.masked[:-1].cpu(), masked[:-1])
    assert torch.equal(mine.broken[:-1].cpu(), broken[:-1])
    assert {i: result[i, : len(row)].tolist() for i, row in results.items()} == results


WIDE = 700
EQUAL = (torch.arange(WIDE) * 7 % 3) / 4
# on both sides of what the factor rule asks of each, wherever the others put it
CLOSE = 1 - 1 / (torch.arange(WIDE) * 7 % WIDE / 2 + 1.5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("scores", [EQUAL, CLOSE, torch.tensor([0.3, 1.0])], ids=["equal", "close", "two"])
@pytest.mark.parametrize("rule", RULES)
def test_one_block_of_any_width(device, name, scores, rule):
    """With more positions than the kernel's tile of those that they are compared with, and with two."""
    width = len(scores)
    scores = scores - float(RULES[rule].score == "certainty")
    value = torch.tensor([0.5 if rule == "threshold" else 2.0])
    options = torch.stack([torch.tensor([[*RULES].index(rule)] * 2), bits([value.item()] * 2)], dim=1).to(device)
    masked = torch.ones(2, width, dtype=torch.bool, device=device)
    state = SlotState(torch.zeros(2, width, dtype=torch.int64, device=device), masked, masked[:, 0] & False, *options.T)
    blocks = Blocks(*torch.tensor([0, 0, width, 0, 0, 300, 0, width, 0], device=device)[:, None].unbind(0))
    result = torch.zeros(1, 2 + width, dtype=torch.int64, device=device)
    predicted, everything = torch.arange(1, width + 1), torch.ones(1, width, dtype=torch.bool)
    expected = RULES[rule].select(scores[None], everything, torch.tensor([300]), value)[0]
    tensors = (tensor.to(device) for tensor in (scores, predicted, everything[0]))
    IMPLEMENTATIONS[name][1](rule, *tensors, state, blocks, result)
    assert torch.equal(state.tokens[0].cpu(), torch.where(expected, predicted, 0))
    assert torch.equal(state.masked[0].cpu(), ~expected)
    assert result[0, :2].tolist() == [0, int((~expected).sum())]


def test_a_state_of_other_strides_is_refused():
    tokens, masked = torch.zeros(4, 3, dtype=torch.int64).T, torch.zeros(3, 4, dtype=torch.bool)
    zero = torch.zeros(3, dtype=torch.int64)
    state = SlotState(tokens, masked, masked[:, 0].clone(), zero, zero)
    blocks = Blocks(*[zero[:1]] * len(Blocks._fields))
    with pytest.raises(ValueError, match="tokens, masked, broken"):
        masked_rows_triton(state, blocks, 1, 1)
    state = state._replace(tokens=tokens.contiguous())
    with pytest.raises(ValueError, match="scores, token_ids, finite and result"):
        unmask_triton("random", torch.zeros(4)[::2], zero[:2], masked[0, :2], state, blocks, zero[None])


def test_on_a_cpu_the_twins_run(monkeypatch):
    called = []
    monkeypatch.setattr("blockinfer.kernels.unmasking.masked_rows_torch", lambda *args: called.append("rows"))
    monkeypatch.setattr("blockinfer.kernels.unmasking.unmask_torch", lambda *args: called.append("unmask"))
    state = SlotState(*torch.zeros(5, 1, 1, dtype=torch.int64))
    masked_rows(state, None, 1, 1)
    unmask("random", None, None, None, state, None, None)
    assert called == ["rows", "unmask"]
