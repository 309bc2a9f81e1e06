"""Several blocks open at once: the engine against the reference, and what must not change a request's tokens.

As in `tests.test_equivalence`, whose requests run beside these in mixed batches, all settings are drawn once.
"""

import dataclasses
import random

import pytest

from blockinfer import LLM, SamplingParams
from blockinfer.decoding import modes
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.comparison import NEAR_TIE, assert_equivalent
from tests.reference import STATIC
from tests.test_equivalence import DEVICES, MODES, SHAPES, VOCAB, Case, assert_same, engines, expect, run  # noqa: F401
from tests.test_equivalence import draw_cell as draw_ordinary_cell

RULES = [*STATIC, "threshold", "factor", "entropy", "entropy_threshold", "scheduled_threshold"]
OPTION = {rule: rule for rule in RULES[3:]} | {"entropy": "entropy_bound", "scheduled_threshold": "threshold"}
VALUES = {
    "threshold": [0.3, 0.5, 0.8, 1.0],
    "factor": [0.5, 1.0, 2.0],
    "entropy": [0.0, 0.5, 2.0],
    "entropy_threshold": [0.0, 0.5, 1.0, 1.6, 3.0],
    "scheduled_threshold": [0.3, 0.5, 0.8, 1.0],
}
THRESHOLDS = [0, 0.1, 0.3, 0.5, 0.95, 1]
PER_CELL = 8  # sequences per mode and rule
LONGEST = 100  # a prompt and its answer


def draw_case(draw: random.Random, shape: str, mode: str, rule: str, index: int) -> Case:
    block_length = [1, 3, 8, 16, 8, 3, 16, 8][index]
    blocks = draw.uniform(1.1, 4.5) + (2 if block_length < 8 else 0)
    options = dict(
        mode=mode,
        unmasking=rule,
        block_length=block_length,
        max_tokens=min(56, int(blocks * block_length) + draw.randint(0, 2)),
        denoising_steps=draw.choice([None, None, None, 1, 2, 5, block_length // 2 + 1, block_length + 3]),
        block_add_threshold=draw.choice([0, 0, *THRESHOLDS][: 7 if index else 8]),
        decoded_token_threshold=draw.choice(THRESHOLDS),
        temperature=draw.choice([0.0, 0.0, 0.5, 1.0]),
        seed=draw.choice([0, 1, 2**31, 2**40 + 17, 2**63 - 1]),
        cfg_scale=draw.choice([0.0] * 6 + [0.7]),
        ignore_eos=draw.random() < 0.8,
        stop_token_ids=tuple(draw.sample(range(50), 4)) if draw.random() < 0.5 else (),
        logits_eos_inf=draw.random() < 0.1,
        confidence_eos_eot_inf=rule != "sequential" and draw.random() < 0.2,
    )
    if mode in ("block", "block_refresh"):
        options["suffix_window"] = draw.choice([0, 0, 1, 5, 100])
    if mode == "block":
        options["commit_delay"] = draw.choice([0, 0, 1, 3])
    if rule in VALUES:
        options[OPTION[rule]] = draw.choice(VALUES[rule])
    prompt = tuple(draw.randrange(VOCAB) for _ in range(draw.choice([1, 2, draw.randint(3, 40)])))
    return Case(shape, prompt, tuple(sorted(options.items())))


def draw_cell(mode: str, rule: str) -> list[Case]:
    draw = random.Random(f"{mode} {rule}")
    shape = ["dense", "gqa"][(MODES.index(mode) + RULES.index(rule)) % 2]
    return [draw_case(draw, shape, mode, rule, index) for index in range(PER_CELL)]


def all_cases(shape: str | None = None) -> list[Case]:
    cases = [case for mode in MODES for rule in RULES for case in draw_cell(mode, rule)]
    return [case for case in cases if shape in (None, case.shape)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("windows")
    found = {name: write_checkpoint(root / name, **SHAPES[name]) for name in ("dense", "gqa")}
    write_tokenizer(found["dense"])
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
def test_float64_tokens_are_equal(engines, expect, mode, rule):  # noqa: F811
    """Each request alone; and what is told of finished blocks, before the first open one, never changes."""
    told = 0
    for case in draw_cell(mode, rule):
        *partial, last = engines[case.shape].stream(list(case.prompt), case.params)
        assert_same([case], [last], expect)
        whole, length = last.outputs[0].token_ids, dict(case.options)["block_length"]
        counts = [len(output.outputs[0].token_ids) for output in partial]
        assert counts == sorted(set(counts)) and all(count % length == 0 for count in counts)
        assert all(o.outputs[0].token_ids == whole[:count] for o, count in zip(partial, counts, strict=True))
        told += len(partial)
    assert told >= 5


@pytest.mark.parametrize("shape", ["dense", "gqa"])
def test_a_mixed_batch_changes_nothing(engines, expect, shape):  # noqa: F811
    """All modes, rules and thresholds at once, eight at a time, and requests of one block at a time among them."""
    cases = all_cases(shape)
    cases += [
        case for mode in MODES for rule in STATIC + ("threshold",) for case in draw_ordinary_cell(shape, mode, rule)
    ]
    random.Random(shape).shuffle(cases)
    assert_same(cases, run(engines[shape], cases), expect)


@pytest.mark.parametrize("shape, page_size", [("dense", 16), ("gqa", 3)])
def test_preemption_and_sitting_out_change_nothing(folders, expect, shape, page_size):  # noqa: F811
    """Pages for 230 tokens, where eight sequences want up to 100 each; rows for two of the longest."""
    cases = all_cases(shape)
    random.Random(page_size).shuffle(cases)
    token_bytes = 2 * 2 * 32 * 8 // (1 if shape == "dense" else 2)  # layers, K and V, d_model, float64
    options = dict(max_model_len=LONGEST, max_num_batched_tokens=2 * LONGEST, max_num_seqs=8, page_size=page_size)
    with LLM(folders[shape], device="cpu", dtype="float64", kv_cache_memory=230 * token_bytes, **options) as llm:
        params = [dataclasses.replace(case.params, logprobs=0) for case in cases]
        outputs = llm.generate([list(case.prompt) for case in cases], params, use_tqdm=False)
        assert llm.engine.pool.num_free == llm.engine.pool.num_pages
    results = [expect(case) for case in cases]
    assert_equivalent((r, o.outputs[0]) for r, o in zip(results, outputs, strict=True))
    assert [o.metrics.denoising_steps for o in outputs] == [r.steps for r in results]
    preempted = [(r, o) for r, o in zip(results, outputs, strict=True) if o.metrics.preemptions]
    assert all(o.metrics.nfe == r.nfe for r, o in zip(results, outputs, strict=True) if not o.metrics.preemptions)
    assert all(o.metrics.nfe >= r.nfe for r, o in preempted) and any(o.metrics.nfe > r.nfe for r, o in preempted)
    assert sum(any(len(s.open) > 1 for s in windows_of(r)) for r, _ in preempted) >= 5
    for result, output in zip(results, outputs, strict=True):
        assert_logprobs(result, output.outputs[0])


def assert_logprobs(result, answer) -> None:
    """Of each token that of the step that revealed it, also where a preemption repeats steps after it."""
    steps = sum(result.blocks, [])
    expected = {i: p for step in steps for i, p in zip(step.revealed, step.logprobs, strict=True)}
    for i, (token, found) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        assert found[token].logprob == pytest.approx(float(expected[i][token]), abs=1e-9)


def test_padding_changes_nothing(folders, expect, monkeypatch):  # noqa: F811
    """Every step as it is padded for a CUDA graph, without the graph: more rows and masked rows than there are."""
    cases = all_cases("gqa")
    random.Random(0).shuffle(cases)
    with LLM(folders["gqa"], device="cpu", dtype="float64", max_num_seqs=5) as llm:
        runner = llm.engine.runner
        for graphs, more in ((runner._layers, 5), (runner._reveal, 3)):
            monkeypatch.setattr(graphs, "padded", lambda size, more=more: size + more)
        assert_same(cases, run(llm, cases), expect)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
def test_an_add_threshold_of_1_is_one_block_at_a_time(engines, mode, rule):  # noqa: F811
    """Whatever else is asked of the blocks after it."""
    common = dict(mode=mode, unmasking=rule, max_tokens=21, block_length=8, ignore_eos=True, temperature=0.5, seed=2)
    common |= {OPTION[rule]: 0.7} if rule in OPTION else {}
    options = [{}, dict(block_add_threshold=1, decoded_token_threshold=0), dict(decoded_token_threshold=0.3)]
    params = [SamplingParams(**common, **more) for more in options]
    expected, *others = engines["gqa"].generate([[5, 17, 40, 3, 9]] * 3, params, use_tqdm=False)
    for other in others:
        assert other.outputs == expected.outputs
        assert (other.metrics.nfe, other.metrics.denoising_steps) == (expected.metrics.nfe, expected.metrics.nfe)


@pytest.mark.parametrize("n, reached", [(10, 3), (20, 11), (25, 7), (50, 29), (49, 1)])
@pytest.mark.parametrize("mode", ["vanilla", "block"])
def test_a_threshold_is_a_share_of_the_block(engines, mode, n, reached):  # noqa: F811
    """Reached where the revealed are exactly so many: 0.55 * 20 and 0.28 * 25 are a little above 11 and 7."""
    params = [
        SamplingParams(mode=mode, max_tokens=2 * n, block_length=n, ignore_eos=True, **{name: reached / n, other: 0})
        for name, other in [
            ("block_add_threshold", "decoded_token_threshold"),
            ("decoded_token_threshold", "block_add_threshold"),
        ]
    ]
    outputs = engines["gqa"].generate([[1, 2, 3]] * 2, params, use_tqdm=False)
    assert [o.metrics.nfe for o in outputs] == [reached + n] * 2


@pytest.mark.parametrize("device", DEVICES)
def test_float32_tokens_are_equal_but_for_near_ties(folders, expect, device):  # noqa: F811
    pairs = []
    for shape, folder in folders.items():
        with LLM(folder, device=device, dtype="float32", max_num_seqs=8) as llm:
            cases = all_cases(shape)
            pairs += [(expect(c), output.outputs[0]) for c, output in zip(cases, run(llm, cases), strict=True)]
    assert_equivalent(pairs, margin=NEAR_TIE)


# What a broken mode makes of a state and of the right segments for it.
BREAKS = {
    "a kv_len short by one": lambda right, state: with_last(right(state), kv_len=right(state)[-1].kv_len - 1),
    "a commit that sees the window": lambda right, state: [s._replace(kv_len=state.block_end) for s in right(state)],
    "no refresh when the window moves": lambda right, state: right(
        state._replace(step=max(state.step, int(state.block_start > state.prompt_len)))
    ),
    "a refresh in every step": lambda right, state: right(state._replace(step=0)),
}
BROKEN = [(mode, broken) for mode in MODES for broken in BREAKS if "kv_len" in broken]
BROKEN += [("block", "a commit that sees the window")]
BROKEN += [(mode, name) for mode in ("prefix_cache", "dual_cache", "block_refresh") for name in list(BREAKS)[2:]]


def with_last(segments, **changed):
    return [*segments[:-1], segments[-1]._replace(**changed)]


@pytest.mark.parametrize("mode, broken", BROKEN)
def test_a_broken_mode_is_caught(folders, expect, monkeypatch, mode, broken):  # noqa: F811
    right = modes.MODES[mode]
    monkeypatch.setitem(modes.MODES, mode, lambda state: BREAKS[broken](right, state))
    cases = [case for case in all_cases("gqa") if dict(case.options)["mode"] == mode]
    with LLM(folders["gqa"], device="cpu", dtype="float64", max_num_seqs=8, page_size=256) as llm:
        outputs = run(llm, cases)
    with pytest.raises(AssertionError, match="sequences differ:"):
        assert_equivalent((expect(c), o.outputs[0]) for c, o in zip(cases, outputs, strict=True))


def windows_of(result) -> list:
    """The steps that have a window, which those of one block at a time have not."""
    return [step for block in result.blocks for step in block if hasattr(step, "open")]


def test_the_cases_are_many_and_various(expect):  # noqa: F811
    """At least 200 sequences, and what they are meant to reach is reached."""
    cases = all_cases()
    assert len(set(cases)) >= 200 and all(len(c.prompt) + dict(c.options)["max_tokens"] <= LONGEST for c in cases)
    seen = {}
    for case in cases:
        for fact in facts_of(expect(case)):
            seen[fact] = seen.get(fact, 0) + 1
    few = {fact: seen.get(fact, 0) for fact, least in AT_LEAST.items() if seen.get(fact, 0) < least}
    assert not few, f"{few} of {seen}"


# of so many sequences something must be so in some step
AT_LEAST = {
    "two open": 120,
    "four open": 30,
    "one at a time": 5,
    "full before the one before it": 20,
    "two finish at once": 20,
    "open, not active": 30,
    "active out of order": 3,
    "the guarantee decides": 20,
    "a limit of one block decides": 10,
    "a limit of a later block decides": 3,
    "a stop token": 30,
    "a stop token in a later block, before what precedes it": 5,
    "a stop token in a block that is not finished": 10,
    "a window over the canvas's end": 20,
    "finished blocks wait": 10,
    "guided": 15,
    "lengths that do not divide": 100,
}


def facts_of(result) -> set[str]:
    settings, steps = result.settings, windows_of(result)
    length, n = settings.block_length, settings.max_tokens
    revealed = {i: t for t, step in enumerate(steps) for i in step.revealed}
    blocks = [range(start, min(start + length, n)) for start in range(0, n, length)]
    full = [max(revealed.get(i, len(steps)) for i in block) for block in blocks]
    finished = [max(full[: k + 1]) for k in range(len(full))]
    several = [step for step in steps if len(step.open) > 1]
    static = settings.unmasking in STATIC
    facts = {
        "one at a time": settings.one_block_at_a_time,
        "two open": several,
        "four open": any(len(step.open) > 3 for step in steps),
        "full before the one before it": any(b < a for a, b in zip(full, full[1:], strict=False)),
        "two finish at once": any(a == b < len(steps) for a, b in zip(finished, finished[1:], strict=False)),
        "open, not active": static and any(step.active < step.open for step in several),
        "active out of order": any(step.active != step.open[: len(step.active)] for step in several),
        "the guarantee decides": any(step.guaranteed for step in steps),
        "a limit of one block decides": any(0 < len(s.forced) < len(s.revealed) for s in several),
        "a limit of a later block decides": any(s.forced and min(s.forced) >= blocks[s.open[0]].stop for s in several),
        "a stop token": result.finish_reason == "stop",
        "a window over the canvas's end": settings.suffix_window and any(s.open[-1] + 1 < len(blocks) for s in steps),
        "finished blocks wait": settings.commit_delay and len({step.open[0] for step in steps}) > 1,
        "guided": settings.cfg_scale and several,
        "lengths that do not divide": n % length,
    }
    if steps and result.finish_reason == "stop":
        stop = len(result.token_ids)
        earlier_blocks = range(stop // length * length)
        facts |= {
            "a stop token in a later block, before what precedes it": any(
                revealed[i] > revealed[stop] for i in earlier_blocks
            ),
            "a stop token in a block that is not finished": full[stop // length] == len(steps),
        }
    return {fact for fact, so in facts.items() if so}
