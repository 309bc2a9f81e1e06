"""Classifier-free guidance and infilling, against the plain implementation at float64."""

import dataclasses
import random

import pytest

from blockinfer import LLM, SamplingParams, ScoringParams
from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.reference import Reference, Settings, infill

MASK = 57
SUFFIX_MODES = ["vanilla", "prefix_cache", "dual_cache"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("guided"), n_kv_heads=2)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


@pytest.fixture(scope="module")
def small(folder):
    with LLM(folder, device="cpu", dtype="float64", max_num_seqs=5, page_size=8) as llm:
        yield llm


def drawn(seed, mode, rule, **more):
    draw = random.Random(seed)
    options = dict(mode=mode, unmasking=rule, max_tokens=draw.randint(5, 20), block_length=draw.choice([4, 7, 32]))
    options |= dict(
        temperature=draw.choice([0.0, 0.6]), seed=draw.randrange(2**63), denoising_steps=draw.choice([None, 3])
    )
    given = {
        "threshold": {"threshold": 0.4},
        "scheduled_threshold": {"threshold": 0.4},
        "entropy": {"entropy_bound": 0.5},
    }
    options |= given.get(rule, {})
    return options | more


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
def test_guided_tokens_are_the_reference_s(small, reference, mode, rule):
    """Two guided requests beside one that is not, whose rows are read in the same step."""
    prompts = [[1, 2, 3, MASK, 4], list(range(1, 30)), [7, 7]]
    options = [drawn(i, mode, rule, cfg_scale=scale) for i, scale in enumerate([0.7, 3.0, 0.0])]
    params = [SamplingParams(**o, ignore_eos=True) for o in options]
    outputs = small.generate(prompts, params, use_tqdm=False)
    expected = [reference.generate(prompt, **o) for prompt, o in zip(prompts, options, strict=True)]
    assert [o.outputs[0].token_ids for o in outputs] == [r.tokens for r in expected]
    assert [o.metrics.nfe for o in outputs] == [r.nfe for r in expected]
    assert outputs[0].metrics.nfe == 2 * outputs[0].metrics.denoising_steps
    assert small.engine.pool.num_free == small.engine.pool.num_pages


def test_guidance_changes_tokens_and_scale_0_changes_nothing(small):
    params = SamplingParams(max_tokens=24, block_length=8, ignore_eos=True)
    prompts = [[i, i + 1, i + 2, 9] for i in range(1, 9)]
    plain, zero, guided = (
        small.generate(prompts, dataclasses.replace(params, cfg_scale=scale), use_tqdm=False) for scale in (0, 0.0, 2.0)
    )
    before = small.stats
    small.generate(prompts, dataclasses.replace(params, cfg_scale=0.0), use_tqdm=False)
    rows = small.stats.rows - before.rows
    small.generate(prompts, dataclasses.replace(params, cfg_scale=0.5), use_tqdm=False)
    assert small.stats.rows - before.rows == 3 * rows
    assert [o.outputs for o in plain] == [o.outputs for o in zero]
    assert sum(a.outputs != b.outputs for a, b in zip(plain, guided, strict=True)) >= 6


def test_padding_changes_nothing(small, monkeypatch):
    """Every step as it is padded for a CUDA graph: guided and not, infilled, with log-probabilities, and scored."""
    ids = [5, MASK, MASK, 7, MASK]
    prompts = [[1, 2, 3], [4, 5], {"prompt_token_ids": ids, "infill": True}]
    options = dict(max_tokens=12, block_length=5, ignore_eos=True)
    params = [SamplingParams(**options, cfg_scale=1.0, logprobs=2), SamplingParams(**options)]
    params.append(SamplingParams(**options, cfg_scale=0.5, mode="vanilla"))

    def outputs():
        scoring = ScoringParams(mc_num=7, seed=1, cfg_scale=0.5)
        return [
            [o.outputs[0].token_ids for o in small.generate(prompts, params, use_tqdm=False)],
            small.score([[1, 2, 3]] * 2, [[4, 5, 6], list(range(9))], scoring, use_tqdm=False),
        ]

    expected = outputs()
    runner = small.engine.runner
    for graphs, more in ((runner._layers, 5), (runner._reveal, 3)):
        monkeypatch.setattr(graphs, "padded", lambda size, more=more: size + more)
    tokens, scores = outputs()
    assert tokens == expected[0]
    assert [s.logprob for s in scores] == pytest.approx([s.logprob for s in expected[1]], abs=1e-9)


def test_a_row_without_guidance_has_no_shadow_s(folder, small):
    """At the end of a step as large as they may be, there is no row where a shadow's would be."""
    options = dict(mode="vanilla", max_tokens=8, block_length=8, denoising_steps=1, ignore_eos=True)
    prompts, params = [[1], [2] * 100], [SamplingParams(**options, cfg_scale=1.0), SamplingParams(**options)]
    expected = [o.outputs for o in small.generate(prompts, params, use_tqdm=False)]
    with LLM(folder, device="cpu", dtype="float64", max_model_len=128, max_num_batched_tokens=128) as llm:
        assert [o.outputs for o in llm.generate(prompts, params, use_tqdm=False)] == expected
        for length, scale in ((8, 1.0), (110, 0.0)):
            last = length - 1
            read = [[(last, 3)]]
            llm.engine.add_scoring([1] * length, range(last, length), [(last,)], read, ScoringParams(cfg_scale=scale))
        outputs = []
        while llm.engine.has_unfinished():
            outputs += llm.engine.step()
        assert llm.stats.forwards == 2 and len(outputs) == 2


@pytest.mark.parametrize("slots, pages", [(2, 99), (3, 99), (9, 9)])
def test_neither_slots_nor_pages_change_guided_answers(folder, small, slots, pages):
    """Shadows are preempted and share prompts with their requests."""
    params = SamplingParams(max_tokens=20, block_length=8, cfg_scale=1.0, temperature=0.8, n=3, seed=3, ignore_eos=True)
    prompts = [list(range(1, 20)), [5, 6]]
    expected = [o.outputs for o in small.generate(prompts, params, use_tqdm=False)]
    page_bytes = 2 * 2 * 16 * 8 * 8
    options = dict(max_num_seqs=slots, page_size=8, kv_cache_memory=(2 * pages) * page_bytes)
    with LLM(folder, device="cpu", dtype="float64", **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.engine.pool.num_free == llm.engine.pool.num_pages
    assert [o.outputs for o in outputs] == expected
    assert (sum(o.metrics.preemptions for o in outputs) > 0) == (pages == 9)


def test_guided_logprobs_are_those_of_the_guided_logits(small, reference):
    options = dict(max_tokens=9, block_length=4, cfg_scale=1.5)
    (output,) = small.generate([3, 1, 4], SamplingParams(**options, logprobs=0, ignore_eos=True), use_tqdm=False)
    result = reference.generate([3, 1, 4], **options)
    expected = {i: p for block in result.blocks for s in block for i, p in zip(s.revealed, s.logprobs, strict=True)}
    for i, (token, found) in enumerate(zip(result.tokens, output.outputs[0].logprobs, strict=True)):
        assert found[token].logprob == pytest.approx(float(expected[i][token]), abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_num_seqs=1), "cfg_scale needs max_num_seqs of at least 2, got 1"),
        (dict(max_num_batched_tokens=256), "150 tokens have 300 rows, more than max_num_batched_tokens=256"),
        (dict(kv_cache_memory=19 * 2 * 2 * 16 * 8 * 8, page_size=8), "need 38 pages of 8 tokens, the KV cache has 19"),
    ],
)
def test_what_guidance_needs_is_told(folder, options, message):
    with LLM(folder, device="cpu", dtype="float64", **options) as llm:
        with pytest.raises(ValueError, match=message):
            llm.engine.add_request([1] * 100, SamplingParams(max_tokens=50, cfg_scale=1.0))


# --- infilling ---


def masked_prompt(draw):
    """Spans anywhere: at the beginning, at the end, side by side but for a token, and mask tokens that are given."""
    tokens = [draw.randrange(1, 50) for _ in range(draw.randint(6, 40))]
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(tokens))
        tokens[start : start + draw.randint(1, 6)] = [None] * draw.randint(1, 6)
    return tokens


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", SUFFIX_MODES)
def test_infilled_tokens_are_the_reference_s(small, reference, mode, rule, scale):
    prompts = [masked_prompt(random.Random(f"{mode} {rule} {i}")) for i in range(4)]
    options = [drawn(i, mode, rule, cfg_scale=scale, max_tokens=50) for i in range(4)]
    asked = [{"prompt_token_ids": [MASK if t is None else t for t in p], "infill": True} for p in prompts]
    outputs = small.generate(asked, [SamplingParams(**o, ignore_eos=True) for o in options], use_tqdm=False)
    for prompt, o, output, ids in zip(prompts, options, outputs, asked, strict=True):
        expected = infill(reference, prompt, Settings(**o))
        (completion,) = output.outputs
        assert completion.infilled.token_ids == expected.tokens
        assert all(a in (None, b) for a, b in zip(prompt, expected.tokens, strict=True))
        filled = [b for a, b in zip(prompt, expected.tokens, strict=True) if a is None]
        assert completion.token_ids == filled == [t for s in completion.infilled.spans for t in s.token_ids]
        assert (output.metrics.nfe, output.metrics.denoising_steps) == (expected.nfe, expected.steps)
        assert output.prompt_token_ids == ids["prompt_token_ids"]


def test_preemption_changes_no_infilled_token(folder, reference):
    """A request in `block` grows until the younger one, whose first span is filled, has to give up its pages."""
    prompt = [1, 2, None, None, 3, 4, None, None, 5, None, None, None, 6]
    options = dict(mode="vanilla", max_tokens=50, block_length=3, cfg_scale=1.0)
    page_bytes = 2 * 2 * 16 * 8 * 4
    with LLM(
        folder, device="cpu", dtype="float64", max_num_seqs=3, page_size=4, kv_cache_memory=11 * page_bytes
    ) as llm:
        engine = llm.engine
        engine.add_request([7], SamplingParams(max_tokens=40, block_length=4, denoising_steps=2, ignore_eos=True))
        ids = [MASK if t is None else t for t in prompt]
        filling = engine.add_request({"prompt_token_ids": ids, "infill": True}, SamplingParams(**options))
        outputs = {}
        while engine.has_unfinished():
            outputs |= {output.request_id: output for output in engine.step()}
    assert outputs[filling].outputs[0].infilled.token_ids == infill(reference, prompt, Settings(**options)).tokens
    assert outputs[filling].metrics.preemptions == 1


def test_a_text_s_spans(small):
    params = SamplingParams(mode="vanilla", block_length=4, ignore_eos=True)
    text = "def {fill:3}x: {fill:5}return"
    encode = small.tokenizer.encode
    before, between, after = (
        encode("def "),
        encode("x: ", add_special_tokens=False),
        encode("return", add_special_tokens=False),
    )
    (output,) = small.generate({"prompt": text}, params, use_tqdm=False)
    infilled = output.outputs[0].infilled
    starts = [len(before), len(before) + 3 + len(between)]
    assert [(s.start, len(s.token_ids)) for s in infilled.spans] == [(starts[0], 3), (starts[1], 5)]
    assert infilled.token_ids[: starts[0]] == before and infilled.token_ids[starts[1] + 5 :] == after
    assert infilled.text == small.tokenizer.decode(infilled.token_ids, skip_special_tokens=True)
    assert output.outputs[0].text == "".join(span.text for span in infilled.spans)
    assert output.prompt == text and output.outputs[0].finish_reason == "length"


def test_a_span_ends_at_its_own_stop(small):
    params = SamplingParams(mode="vanilla", block_length=16, ignore_eos=True)
    prompt = {"prompt": "ab{fill:8}cd{fill:8}e"}
    (free,) = small.generate(prompt, params, use_tqdm=False)
    spans = free.outputs[0].infilled.spans
    stop = spans[0].token_ids[4]
    (cut,) = small.generate(prompt, dataclasses.replace(params, stop_token_ids=[stop]), use_tqdm=False)
    for a, b in zip(spans, cut.outputs[0].infilled.spans, strict=True):
        end = a.token_ids.index(stop) if stop in a.token_ids else 8
        assert b.token_ids == a.token_ids[:end]
    assert cut.outputs[0].infilled.token_ids == free.outputs[0].infilled.token_ids
    word = spans[1].text[2:4]
    (cut,) = small.generate(prompt, dataclasses.replace(params, stop=word), use_tqdm=False)
    assert cut.outputs[0].infilled.spans[1].text == spans[1].text[: spans[1].text.index(word)]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", word)


def test_what_is_no_masked_span_stays(small):
    """In a plain string braces are text, as words in braces are everywhere, and a mask token among ids is a token."""
    params = SamplingParams(mode="vanilla", max_tokens=4, block_length=4, ignore_eos=True)
    (text,) = small.generate("a{fill:3}b", params, use_tqdm=False)
    (ids,) = small.generate({"prompt_token_ids": [1, MASK, 2]}, params, use_tqdm=False)
    (words,) = small.generate({"prompt": "a{fill:none}b{fill:#000}"}, params, use_tqdm=False)
    assert text.outputs[0].infilled is ids.outputs[0].infilled is words.outputs[0].infilled is None
    assert len(text.outputs[0].token_ids) == len(ids.outputs[0].token_ids) == 4


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (
            {"prompt": "a{fill:2}"},
            {},
            "mode 'block' drops what is after a block, which infilling must see; use vanilla,",
        ),
        ({"prompt": "a{fill:2}"}, {"mode": "block_refresh"}, "mode 'block_refresh' drops what is after a block"),
        (
            {"prompt": "a{fill:9}"},
            {"mode": "vanilla", "max_tokens": 8},
            "spans have 9 positions, more than max_tokens=8",
        ),
        *(
            (
                {"prompt": f"a{{fill:3}}b{wrong}"},
                {"mode": "vanilla"},
                f"written as {{fill:32}}, .*, got '{wrong}'; if it",
            )
            for wrong in ("{fill:0}", "{fill:}", "{fill:-3}", "{fill: 3}", "{fill:3.0}", "{fill:03}", "{fill:1000000}")
        ),
        ({"prompt": "a{fill:999}"}, {"mode": "vanilla", "max_tokens": 999}, "tokens are more than max_model_len=256"),
        ({"prompt": "ab", "infill": True}, {"mode": "vanilla"}, "the text has none: write it as {fill:32}"),
        ({"prompt_token_ids": [1, 2], "infill": True}, {}, "needs the mask token 57 among the ids"),
        ({"prompt_token_ids": [MASK], "infill": 1}, {}, '"infill" must be True or False, got 1'),
        ({"infill": True}, {}, 'a dict prompt has "prompt" or "prompt_token_ids"'),
    ],
)
def test_bad_spans(small, prompt, options, message):
    with pytest.raises(ValueError, match=f"prompt 0: .*{message}"):
        small.generate([prompt], SamplingParams(**options), use_tqdm=False)
