"""The engine against the reference: the same tokens at float64, the same but for near-ties at float32.

Every sequence's settings are drawn once, from a fixed seed, and serve all tests here.
"""

import dataclasses
import functools
import random

import pytest
import torch

from blockinfer import LLM, SamplingParams
from blockinfer.decoding import modes
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.comparison import NEAR_TIE, assert_equivalent
from tests.reference import Reference, Result

MODES = ["vanilla", "prefix_cache", "dual_cache", "block", "block_refresh"]
RULES = ["low_confidence", "random", "sequential", "threshold", "factor", "entropy", "scheduled_threshold"]
OPTION = {"entropy": "entropy_bound", "scheduled_threshold": "threshold"}
PARAMETER = {"scheduled_threshold": [0.0, 0.3, 0.5, 0.7, 1.0]}
PARAMETER |= {"threshold": [0.0, 0.3, 0.5, 0.7, 1.0], "factor": [0.5, 1.0, 2.0, 9.0], "entropy": [0.0, 0.5, 2.0, 99.0]}
PER_CELL = 4  # sequences per shape, mode and rule
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]
VOCAB, MASK, EOT = 61, 57, 60
EOS = {"dense": [56], "gqa": [56, 3, 19, 33, 40], "tied": [7], "wide": [56]}
SHAPES = {
    "dense": dict(),
    "gqa": dict(n_kv_heads=2, eos_token_id=EOS["gqa"], shards=2, seed=1),
    "tied": dict(n_kv_heads=1, weight_tying=True, eos_token_id=7, seed=2),
    "wide": dict(embedding_size=64, d_model=48, n_layers=3, rope_theta=10000.0, seed=3),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One request; its prompt and its settings as both sides take them."""

    shape: str
    prompt: tuple[int, ...]
    options: tuple[tuple[str, object], ...]  # SamplingParams, sorted

    @property
    def params(self) -> SamplingParams:
        options = dict(self.options)
        return SamplingParams(**options | {"stop_token_ids": list(options["stop_token_ids"])})

    def reference_settings(self) -> dict:
        options = dict(self.options)
        stops, ignore_eos = options.pop("stop_token_ids"), options.pop("ignore_eos")
        # "dense" has a tokenizer, so that <|eot_id|> is known
        eos, eot = tuple(EOS[self.shape]), (EOT,) if self.shape == "dense" else ()
        stops += () if ignore_eos else eos + eot
        return options | {"eos_ids": eos, "eot_ids": eot, "stop_ids": stops}


def draw_case(draw: random.Random, shape: str, mode: str, rule: str, index: int) -> Case:
    block_length = [1, 7, 8, 32][index % 4]
    options = dict(
        mode=mode,
        unmasking=rule,
        block_length=block_length,
        max_tokens=draw.randint(1, 12 if block_length == 1 else 3 * block_length // 2 + 10),
        denoising_steps=draw.choice([None, None, 1, 2, 5, block_length // 2 + 1, block_length + 3]),
        temperature=draw.choice([0.0, 0.0, 0.5, 1.0]),
        seed=draw.choice([0, 1, 2**31, 2**40 + 17, 2**63 - 1]),
        ignore_eos=draw.random() < 0.6,
        stop_token_ids=tuple(draw.sample(range(50), 6)) if draw.random() < 0.4 else (),
        logits_eos_inf=draw.random() < 0.15,
        confidence_eos_eot_inf=rule != "sequential" and draw.random() < 0.3,
    )
    if rule in PARAMETER:
        options[OPTION.get(rule, rule)] = draw.choice(PARAMETER[rule])
    # a literal mask token among them now and then
    prompt = tuple(
        draw.randrange(VOCAB) for _ in range(draw.choice([1, 2, draw.randint(3, 40), draw.randint(41, 100)]))
    )
    return Case(shape, prompt, tuple(sorted(options.items())))


def draw_cell(shape: str, mode: str, rule: str) -> list[Case]:
    draw = random.Random(f"{shape} {mode} {rule}")
    return [draw_case(draw, shape, mode, rule, index) for index in range(PER_CELL)]


def all_cases(shape: str) -> list[Case]:
    return [case for mode in MODES for rule in RULES for case in draw_cell(shape, mode, rule)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("equivalence")
    found = {name: write_checkpoint(root / name, **shape) for name, shape in SHAPES.items()}
    write_tokenizer(found["dense"])
    return found


@pytest.fixture(scope="module")
def expect(folders):
    """The reference's result of a case, at float64, computed once."""
    models = {shape: Reference(folder) for shape, folder in folders.items()}

    @functools.cache
    def result(case: Case) -> Result:
        return models[case.shape].generate(list(case.prompt), **case.reference_settings())

    return result


@pytest.fixture(scope="module")
def engines(folders):
    """One float64 engine a shape, of eight sequences at a time."""
    llms = {shape: LLM(folder, device="cpu", dtype="float64", max_num_seqs=8) for shape, folder in folders.items()}
    yield llms
    for llm in llms.values():
        llm.close()


def run(llm: LLM, cases: list[Case]) -> list:
    return llm.generate([list(case.prompt) for case in cases], [case.params for case in cases], use_tqdm=False)


def assert_same(cases: list[Case], outputs: list, expect) -> None:
    """Tokens, how they ended, and the count of forwards."""
    results = [expect(case) for case in cases]
    assert_equivalent((r, o.outputs[0]) for r, o in zip(results, outputs, strict=True))
    assert [o.metrics.denoising_steps for o in outputs] == [r.steps for r in results]
    assert [o.metrics.nfe for o in outputs] == [r.nfe for r in results]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_tokens_are_equal(engines, expect, shape, mode, rule):
    cases = draw_cell(shape, mode, rule)
    assert_same(cases, run(engines[shape], cases), expect)


def test_the_cases_are_many_and_various(expect):
    """At least 200 sequences, and what they are meant to reach is reached."""
    cases = [case for shape in SHAPES for case in all_cases(shape)]
    options = [dict(case.options) for case in cases]
    results = [expect(case) for case in cases]
    assert len(set(cases)) >= 200
    assert {len(case.prompt) for case in cases} >= {1, 2} and max(len(case.prompt) for case in cases) > 90
    assert any(MASK in case.prompt for case in cases)
    assert sum(o["max_tokens"] % o["block_length"] > 0 for o in options) > len(cases) / 2
    assert sum(len(r.blocks) > 1 for r in results) > len(cases) / 2
    assert sum(r.finish_reason == "stop" for r in results) > len(cases) / 10
    reveals = {rule: set() for rule in RULES}  # in the first step, where neither a step limit nor the length decides it
    for o, result in zip(options, results, strict=True):
        n, first = min(o["block_length"], o["max_tokens"]), len(result.blocks[0][0].revealed)
        if n > 2 and (o["unmasking"] in PARAMETER) == (o["denoising_steps"] is None):
            reveals[o["unmasking"]].add("one" if first == 1 else "all" if first == n else "some")
    assert all(reveals[rule] >= {"one", "some"} for rule in RULES), reveals
    assert all("all" in reveals[rule] for rule in PARAMETER), reveals


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mixed_batch_changes_nothing(engines, expect, shape):
    """All modes, rules, lengths and seeds at once, in any order, eight at a time."""
    cases = all_cases(shape)
    random.Random(shape).shuffle(cases)
    assert_same(cases, run(engines[shape], cases), expect)


@pytest.mark.parametrize("shape", ["dense", "gqa"])
def test_padding_changes_nothing(folders, expect, shape, monkeypatch):
    """Every step as it is padded for a CUDA graph, without the graph: more rows and masked rows than there are."""
    cases = all_cases(shape)
    random.Random(shape).shuffle(cases)
    with LLM(folders[shape], device="cpu", dtype="float64", max_num_seqs=5) as llm:
        runner = llm.engine.runner
        for graphs, more in ((runner._layers, 5), (runner._reveal, 3)):
            monkeypatch.setattr(graphs, "padded", lambda size, more=more: size + more)
        assert_same(cases, run(llm, cases), expect)


@pytest.mark.parametrize("shape", ["dense", "gqa"])
def test_alone_changes_nothing(engines, expect, shape):
    for mode in MODES:
        for rule in RULES:
            case = draw_cell(shape, mode, rule)[-2]
            assert_same([case], run(engines[shape], [case]), expect)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_logits_are_close_on_the_same_state(folders, shape, device, monkeypatch):
    """The first step of several whole canvases in one batch: every masked row's logits, within rtol 1e-4."""
    reference = Reference(folders[shape])
    prompts = [list(case.prompt) for case in draw_cell(shape, "vanilla", "low_confidence")]
    params = SamplingParams(mode="vanilla", max_tokens=9, block_length=9, denoising_steps=1, ignore_eos=True)
    # a graph would not call what takes the place of the head
    with LLM(folders[shape], device=device, dtype="float32", enforce_eager=True) as llm:
        head, seen = llm.engine.model.logits, []
        monkeypatch.setattr(llm.engine.model, "logits", lambda *args: seen.append(head(*args)) or seen[-1].clone())
        llm.generate(prompts, params, use_tqdm=False)
    expected = torch.cat([reference.logits(prompt + [MASK] * 9)[-9:] for prompt in prompts])
    (logits,) = seen
    # behind them there may be padding
    torch.testing.assert_close(logits[: len(expected)].cpu().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_float32_tokens_are_equal_but_for_near_ties(folders, expect, device):
    pairs = []
    for shape, folder in folders.items():
        with LLM(folder, device=device, dtype="float32", max_num_seqs=8) as llm:
            cases = all_cases(shape)
            outputs = run(llm, cases)
            pairs += [(expect(case), output.outputs[0]) for case, output in zip(cases, outputs, strict=True)]
    assert len(pairs) >= 200
    assert_equivalent(pairs, margin=NEAR_TIE)


# Which of a step's segments have a kv_len short by one, by the block's step and the number of segments.
WHERE = {
    "everywhere": lambda step, count: range(count),
    "first step": lambda step, count: [count - 1] if step == 0 else [],
    "later steps": lambda step, count: [0] if step > 0 else [],
    "commits": lambda step, count: range(count - 1),  # and the prompt
}
BROKEN = [(mode, where) for mode in MODES for where in WHERE if where != "commits" or mode == "block"]


@pytest.mark.parametrize("mode, where", BROKEN)
@pytest.mark.parametrize("dtype, margin", [("float64", 0.0), ("float32", NEAR_TIE)], ids=["float64", "float32"])
def test_a_kv_len_short_by_one_is_caught(folders, expect, monkeypatch, mode, where, dtype, margin):
    """The comparison is tested by a broken engine: exact or excusing near-ties, it must not let this pass."""
    right = modes.MODES[mode]

    def wrong(state):
        segments = right(state)
        for i in WHERE[where](state.step, len(segments)):
            segments[i] = segments[i]._replace(kv_len=max(1, segments[i].kv_len - 1))
        return segments

    monkeypatch.setitem(modes.MODES, mode, wrong)
    cases = [case for rule in RULES for case in draw_cell("gqa", mode, rule)]
    # one page a sequence: a page too few for a short kv_len would be an error of another kind
    with LLM(folders["gqa"], device="cpu", dtype=dtype, max_num_seqs=8, page_size=256) as llm:
        outputs = run(llm, cases)
    with pytest.raises(AssertionError, match="sequences differ:"):
        assert_equivalent([(expect(c), o.outputs[0]) for c, o in zip(cases, outputs, strict=True)], margin=margin)
