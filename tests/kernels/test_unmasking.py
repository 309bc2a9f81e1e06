"""The list of masked rows, and what the rules make of its predictions: kernel and twin, against plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.decoding.unmasking import RULES
from blockinfer.kernels import philox
from blockinfer.kernels.confidence import Confidence
from blockinfer.kernels.masked_rows import masked_rows, masked_rows_torch, masked_rows_triton
from blockinfer.kernels.slots import Blocks, Choice, MaskedRows, Rank, SlotOptions, SlotState
from blockinfer.kernels.unmasking import CHOICES, unmask, unmask_torch, unmask_triton

SLOTS, LENGTH = 6, 40
# of all other tokens; infinite where a token has no share
OTHERS = [0.0, 1e-30, 1e-12, 0.1, 0.25, 0.4, 0.4999999, 0.5, 0.75, 0.9, 1.0, math.inf]
IMPLEMENTATIONS = {"kernel": (masked_rows_triton, unmask_triton), "twin": (masked_rows_torch, unmask_torch)}


def bits(value):
    return torch.tensor(value, dtype=torch.float64).view(torch.int64)


def options_of(rules, values, seeds, temperatures, flags):
    """SlotOptions' columns as the engine keeps them."""
    columns = SlotOptions(
        rank=torch.tensor([RULES[rule].rank for rule in rules]),
        choice=torch.tensor([RULES[rule].choice for rule in rules]),
        value=bits(values),
        temperature=bits(temperatures),
        seed=torch.tensor(seeds),
        forbid_eos=torch.tensor(flags),
        eos_last=1 - torch.tensor(flags),
    )
    return torch.stack(columns, dim=1)


@st.composite
def steps(draw):
    """A state, in some of its slots a block or several in a row, perhaps padding at the end, and what is predicted for
    the masked rows.

    Few different numbers, so that ties are common. masked_counts is what is masked, but for broken sequences, of which
    the host counts less, and for those whose last step was cut short, of which it counts more.
    """
    number = draw(st.integers(1, 4))
    slots, lengths, starts, firsts, lasts = [], [], [], [], []
    for slot in draw(st.permutations(range(SLOTS - 1)))[:number]:
        window = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4) | st.sampled_from([[16], [33], [16, 16, 3]]))
        start, first = draw(st.integers(0, LENGTH - sum(window))), len(slots)
        slots += [slot] * len(window)
        firsts += [first] * len(window)
        lasts += [first + len(window) - 1] * len(window)
        starts += [start + sum(window[:i]) for i in range(len(window))]
        lengths += window
    number = len(slots)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    share = draw(st.sampled_from([0.2, 0.6, 1.0]))
    masked = torch.rand(SLOTS, LENGTH, generator=generator) < share
    broken = torch.rand(SLOTS, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
    counts = []
    for slot, start, length in zip(slots, starts, lengths, strict=True):
        left = int(masked[slot, start : start + length].sum())
        counts.append(draw(st.integers(0, left) if broken[slot] else st.sampled_from([left, length])))
    rules = [draw(st.sampled_from([*RULES])) for _ in range(SLOTS)]
    values = [RULES[rule].choice_option(draw(st.sampled_from([0.0, 0.1, 0.5, 0.92, 1.0, 2.0]))) for rule in rules]
    seeds = [draw(st.integers(-(2**63), 2**63 - 1)) for _ in range(SLOTS)]
    flags = [draw(st.integers(0, 1)) for _ in range(SLOTS)]
    state = SlotState(
        tokens=torch.randint(100, (SLOTS, LENGTH), generator=generator),
        masked=masked,
        broken=broken,
        options=options_of(rules, values, seeds, [0.5 * flag for flag in flags], flags),
    )
    most = [4 if RULES[rule].has_schedule else 1 for rule in rules]
    padding = draw(st.integers(0, 2))
    columns = Blocks(
        steps=[draw(st.integers(0, 5)) for _ in slots],
        counts=[draw(st.integers(firsts[i] == i, most[slots[i]])) for i in range(number)],
        last_steps=[draw(st.integers(0, 3)) // 3 for _ in slots],
        masked_counts=counts,
        first_masked=[sum(counts[:i]) for i in range(number + padding)],
        slots=slots + [SLOTS - 1] * padding,
        starts=starts,
        lengths=lengths,
        first_rows=[3 + 7 * i for i in range(number)],
        output_starts=[11 * i for i in range(number)],
        result_starts=[sum(lengths[:i]) for i in range(number + padding)],
        window_firsts=[*firsts, *range(number, number + padding)],
        window_lasts=[*lasts, *range(number, number + padding)],
    )
    blocks = Blocks(*(torch.tensor([*column, *[0] * padding][: number + padding]) for column in columns))
    size = sum(counts) + draw(st.integers(0, 3)) or 1
    predicted = Confidence(
        token_ids=torch.randint(200, 300, (size,), generator=generator),
        others=torch.tensor([draw(st.sampled_from(OTHERS)) for _ in range(size)]),
        entropy=torch.tensor([draw(st.sampled_from(OTHERS)) for _ in range(size)]),
        finite=torch.rand(size, generator=generator) >= draw(st.sampled_from([0.0, 0.1])),
    )
    # of a token without a share both are infinite
    predicted.entropy[predicted.others.isinf()] = math.inf
    return rules, state, blocks, size, predicted


def listed(state, blocks):
    """Block, place and row of what `masked_rows` lists, by its definition; None where fewer are masked."""
    rows = []
    for i, (slot, start, length, first, count) in enumerate(
        zip(blocks.slots, blocks.starts, blocks.lengths, blocks.first_rows, blocks.masked_counts, strict=True)
    ):
        places = state.masked[slot, start : start + length].nonzero()[:, 0].tolist()[:count]
        rows += [(i, place, int(first) + place) for place in places]
        rows += [None] * (int(count) - len(places))
    return rows


def on(device, group):
    return type(group)(*(tensor.clone().to(device) for tensor in group))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(step=steps())
def test_the_list_of_masked_rows(device, guarded_empty, name, step):
    _, state, blocks, size, _ = step
    expected = listed(state, blocks)
    expected += [None] * (size - len(expected))
    options = SlotOptions(*state.options.unbind(1))
    rows, of_rows = IMPLEMENTATIONS[name][0](on(device, state), on(device, blocks), size)
    assert rows.row.tolist() == [0 if one is None else one[2] for one in expected]
    assert rows.place.tolist() == [-1 if one is None else one[1] for one in expected]
    for i, one in enumerate(expected):
        wanted = (0.0, 0, 0, 0, False, False)
        if one is not None:
            block, place, _ = one
            slot = blocks.slots[block]
            temperature, seed = options.temperature[slot].view(torch.float64).item(), int(options.seed[slot])
            flags = bool(options.forbid_eos[slot]), bool(options.eos_last[slot])
            position, number = int(blocks.output_starts[block]) + place, int(blocks.steps[block])
            wanted = (temperature, seed, position, number, *flags)
        assert tuple(column[i].item() for column in of_rows) == wanted
    if name == "kernel":
        guarded_empty.check()


def expected_of(step):
    """tokens, masked, broken of all slots and the result, without padding."""
    rules, state, blocks, _, predicted = step
    tokens, masked, broken = (tensor.clone() for tensor in state[:3])
    number = int((blocks.slots < SLOTS - 1).sum())
    # of each block its masked rows: the places, and the numbers of the rows
    places, mine = [], []
    for i in range(number):
        part = slice(blocks.starts[i], blocks.starts[i] + blocks.lengths[i])
        places.append(state.masked[blocks.slots[i], part].nonzero()[:, 0][: blocks.masked_counts[i]])
        mine.append(blocks.first_masked[i] + torch.arange(len(places[i])))
        broken[blocks.slots[i]] |= bool((~predicted.finite[mine[i]]).any())
    for i in range(number):
        slot, window = int(blocks.slots[i]), range(blocks.window_firsts[i], blocks.window_lasts[i] + 1)
        if broken[slot] or not len(places[i]):
            continue
        rule, options = RULES[rules[slot]], SlotOptions(*state.options[slot : slot + 1].unbind(1))
        value, count = options.value.contiguous().view(torch.float64), blocks.counts[i : i + 1]

        def choose(rows, choice, i=i, rule=rule, options=options, value=value, count=count):
            position = blocks.output_starts[i] + places[i]
            drawn = philox.uniform(options.seed, philox.RULE_NOISE, position, blocks.steps[i : i + 1], places[i] * 0)
            scores = {
                Rank.CONFIDENCE: lambda: -predicted.others[rows],
                Rank.CERTAINTY: lambda: -predicted.entropy[rows],
                Rank.RANDOM: lambda: torch.where(predicted.others[rows].isinf(), -math.inf, drawn.float()),
                Rank.POSITION: lambda: -places[i].float(),
            }[rule.rank]()
            every = torch.ones(1, len(rows), dtype=torch.bool)
            return rows[CHOICES[choice](scores[None], every, count, value)[0]]

        scheduled = rule.has_schedule
        chosen = choose(mine[i] if scheduled else torch.cat([mine[j] for j in window]), rule.choice)
        is_chosen = torch.isin(mine[i], chosen)
        if not is_chosen.any():
            is_chosen = torch.isin(mine[i], choose(mine[i], Choice.TOP))
        is_chosen |= bool(blocks.last_steps[i])
        position = blocks.starts[i] + places[i][is_chosen]
        tokens[slot, position], masked[slot, position] = predicted.token_ids[mine[i]][is_chosen], False
    heads, results = [], []
    for i in range(number):
        slot, part = blocks.slots[i], slice(blocks.starts[i], blocks.starts[i] + blocks.lengths[i])
        heads.append([int(broken[slot]), int(masked[slot, part].sum())])
        results += tokens[slot, part].tolist()
    return tokens, masked, broken, heads, results


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(step=steps())
def test_what_each_rule_makes_of_its_blocks(device, guarded_empty, name, step):
    _, state, blocks, size, predicted = step
    tokens, masked, broken, heads, results = expected_of(step)
    mine, number = on(device, state), len(blocks.slots)
    rows, _ = IMPLEMENTATIONS["twin"][0](mine, on(device, blocks), size)
    result = torch.full((2 * number + len(results) + 3,), -7, device=device)
    IMPLEMENTATIONS[name][1](on(device, predicted), rows, mine, on(device, blocks), result)
    assert torch.equal(mine.tokens[:-1].cpu(), tokens[:-1])
    assert torch.equal(mine.masked[:-1].cpu(), masked[:-1])
    assert torch.equal(mine.broken[:-1].cpu(), broken[:-1])
    assert result[: 2 * len(heads)].view(-1, 2).tolist() == heads
    assert result[2 * number :].tolist() == results + [-7] * 3
    if name == "kernel":
        guarded_empty.check()


WIDE = 300
EQUAL = (torch.arange(WIDE) * 7 % 3) / 4
# on both sides of what the factor rule asks of each, wherever the others put it
CLOSE = 1 / (torch.arange(WIDE) * 7 % WIDE / 2 + 1.5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("others", [EQUAL, CLOSE, torch.tensor([0.7, 0.0])], ids=["equal", "close", "two"])
@pytest.mark.parametrize("rule", RULES)
def test_one_block_of_any_width(device, name, others, rule):
    """With more positions than the kernel takes at a time, and with two."""
    width = len(others)
    value = RULES[rule].choice_option(0.5 if "threshold" in rule else 2.0)
    masked = torch.ones(2, width, dtype=torch.bool, device=device)
    state = SlotState(
        tokens=torch.zeros(2, width, dtype=torch.int64, device=device),
        masked=masked,
        broken=masked[:, 0] & False,
        options=options_of([rule] * 2, [value] * 2, [3] * 2, [0.0] * 2, [0] * 2).to(device),
    )
    columns = dict.fromkeys(Blocks._fields, 0) | dict(counts=100, masked_counts=width, lengths=width)
    blocks = Blocks(*(torch.tensor([columns[field]], device=device) for field in Blocks._fields))
    places = torch.arange(width, device=device)
    predicted = Confidence(places + 1, others.to(device), others.to(device), masked[0])
    result = torch.zeros(2 + width, dtype=torch.int64, device=device)
    scores = {Rank.RANDOM: None, Rank.POSITION: -places.cpu().float()}.get(RULES[rule].rank, -others)
    if scores is None:
        seed, step = torch.tensor([3]), torch.tensor([0])
        scores = philox.uniform(seed, philox.RULE_NOISE, places.cpu(), step, places.cpu() * 0).float()
    every, count = torch.ones(1, width, dtype=torch.bool), torch.tensor([100])
    expected = CHOICES[RULES[rule].choice](scores[None], every, count, torch.tensor([value], dtype=torch.float64))[0]
    IMPLEMENTATIONS[name][1](predicted, MaskedRows(places, places), state, blocks, result)
    assert torch.equal(state.tokens[0].cpu(), torch.where(expected, places.cpu() + 1, 0))
    assert torch.equal(state.masked[0].cpu(), ~expected)
    assert result[:2].tolist() == [0, int((~expected).sum())]
    assert torch.equal(result[2:], state.tokens[0])


def test_a_state_of_other_strides_is_refused():
    tokens, masked = torch.zeros(4, 3, dtype=torch.int64).T, torch.zeros(3, 4, dtype=torch.bool)
    zero = torch.zeros(3, dtype=torch.int64)
    state = SlotState(tokens, masked, masked[:, 0].clone(), torch.zeros(3, len(SlotOptions._fields)).long())
    blocks = Blocks(*[zero[:1]] * len(Blocks._fields))
    with pytest.raises(ValueError, match="the state of the slots"):
        masked_rows_triton(state, blocks, 1)
    state = state._replace(tokens=tokens.contiguous())
    predicted = Confidence(zero[:2], torch.zeros(4)[::2], torch.zeros(2), masked[0, :2])
    with pytest.raises(ValueError, match="what is predicted, the rows and result must be contiguous"):
        unmask_triton(predicted, MaskedRows(zero[:2], zero[:2]), state, blocks, zero)


def test_on_a_cpu_the_twins_run(monkeypatch):
    called = []
    monkeypatch.setattr("blockinfer.kernels.masked_rows.masked_rows_torch", lambda *args: called.append("rows"))
    monkeypatch.setattr("blockinfer.kernels.unmasking.unmask_torch", lambda *args: called.append("unmask"))
    state = SlotState(*torch.zeros(4, 1, 1, dtype=torch.int64))
    masked_rows(state, None, 1)
    unmask(None, None, state, None, None)
    assert called == ["rows", "unmask"]
