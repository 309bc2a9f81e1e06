"""What an answer is made of: stop strings, several answers to a prompt, and log-probabilities."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer import LLM, SamplingParams
from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from blockinfer.engine.answers import request_output
from blockinfer.engine.infilling import InfillSequence
from blockinfer.engine.prompts import PromptReader
from blockinfer.engine.sequence import Sequence
from blockinfer.engine.stops import find_stop
from blockinfer.sampling_params import answer_seed
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.reference import Reference

LONG = SamplingParams(max_tokens=40, block_length=8, ignore_eos=True)


def answers(llm, prompt, params):
    return llm.generate([prompt], params, use_tqdm=False)[0].outputs


# --- stop strings ---


def decoder(llm):
    return functools.partial(llm.tokenizer.decode, skip_special_tokens=True)


def plain_stop(decode, token_ids, stops, include):
    """Token by token, as vLLM looks: (tokens, text, stop), or all of them and None."""
    for count in range(1, len(token_ids) + 1):
        text = decode(token_ids[:count])
        for stop in stops:
            if stop in text:
                return token_ids[:count], text[: text.index(stop) + (len(stop) if include else 0)], stop
    return token_ids, decode(token_ids), None


@pytest.fixture(scope="module")
def llm_of_letters(tmp_path_factory):
    """An engine whose tokens are letters, so that its text has a character for each."""
    folder = write_checkpoint(tmp_path_factory.mktemp("letters"))
    write_tokenizer(folder)
    with LLM(folder, device="cpu", dtype="float64", max_num_seqs=4) as llm:
        yield llm


@pytest.fixture(scope="module")
def free(llm_of_letters):
    """An answer without stops."""
    (completion,) = answers(llm_of_letters, "hello", LONG)
    assert 30 < len(completion.text) <= 40
    return completion


PIECES = ["a", "b", "ab", "ba", "aab", "", "c b", "abcab"]


@given(
    token_ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=12),
    stops=st.lists(st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=3),
    include=st.booleans(),
    data=st.data(),
)
def test_stop_strings_in_tokens_of_any_length(token_ids, stops, include, data):
    """Beginning and ending anywhere in a token; searched at once or block by block."""

    def decode(ids):
        return "".join(PIECES[i] for i in ids)

    expected, searched, found = plain_stop(decode, token_ids, stops, include), 0, None
    while found is None and searched < len(token_ids):
        stop = data.draw(st.integers(searched + 1, len(token_ids)))
        found = find_stop(decode, token_ids[:stop], searched, stops, include)
        searched = stop
    if found is None:
        assert expected == (token_ids, decode(token_ids), None)
    else:
        assert expected == (token_ids[: found.num_tokens], found.text, found.stop)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("start", [0, 3, 7, 15, 30])
@pytest.mark.parametrize("length", [1, 2, 9, 20])
def test_the_text_ends_at_the_stop_string_wherever_it_lies(llm_of_letters, free, start, length, include):
    """Within a block, over the border of two (of 8 tokens) or three, and at the very start."""
    stops = ("\n\n\n", free.text[start : start + length])
    params = dataclasses.replace(LONG, stop=list(stops), include_stop_str_in_output=include)
    (completion,) = answers(llm_of_letters, "hello", params)
    token_ids, text, stop = plain_stop(decoder(llm_of_letters), free.token_ids, stops, include)
    assert (completion.token_ids, completion.text) == (token_ids, text)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_no_block_is_decoded_after_the_stop_string(llm_of_letters, free):
    (output,) = llm_of_letters.generate("hello", dataclasses.replace(LONG, stop=free.text[9:11]), use_tqdm=False)
    token_ids, _, _ = plain_stop(decoder(llm_of_letters), free.token_ids, [free.text[9:11]], False)
    assert output.metrics.nfe == -(-len(token_ids) // 8) * 8


def test_what_is_complete_first_stops_and_of_one_token_the_first_of_the_list(llm_of_letters, free):
    text = free.text
    long, short = text[2:12], text[6:8]
    assert text.index(short) == 6 and text.index(long) == 2
    (completion,) = answers(llm_of_letters, "hello", dataclasses.replace(LONG, stop=[long, short]))
    assert (completion.stop_reason, completion.text) == (short, text[:6])
    ends = [text[4:8], text[6:8]]  # both with the same token
    for stops in (ends, ends[::-1]):
        (completion,) = answers(llm_of_letters, "hello", dataclasses.replace(LONG, stop=stops))
        assert (completion.stop_reason, completion.text) == (stops[0], text[: text.index(stops[0])])


def test_a_stop_string_that_never_comes_changes_nothing(llm_of_letters, free):
    assert answers(llm_of_letters, "hello", dataclasses.replace(LONG, stop="no such thing")) == [free]


def test_a_stop_token_before_the_stop_string_is_what_ends_it(llm_of_letters, free):
    stop_id = free.token_ids[10]
    first = free.token_ids.index(stop_id)
    both = dataclasses.replace(LONG, stop_token_ids=[stop_id], stop=free.text[first + 1 : first + 4])
    (completion,) = answers(llm_of_letters, "hello", both)
    assert (completion.stop_reason, completion.token_ids) == (stop_id, free.token_ids[:first])
    (completion,) = answers(llm_of_letters, "hello", dataclasses.replace(both, stop=free.text[first - 2 : first]))
    assert completion.stop_reason == free.text[first - 2 : first]


def test_stop_strings_need_a_tokenizer(tmp_path):
    with LLM(write_checkpoint(tmp_path), device="cpu") as llm:
        with pytest.raises(ValueError, match="prompt 0: stop strings need a tokenizer, and there is none"):
            llm.generate([1], SamplingParams(stop="x"))


# --- several answers ---

SAMPLED = SamplingParams(max_tokens=20, block_length=8, temperature=0.9, seed=5, n=3, ignore_eos=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
def test_each_answer_is_that_of_its_own_seed(llm, mode, rule):
    params = dataclasses.replace(SAMPLED, mode=mode, unmasking=rule)
    prompt = list(range(1, 38))
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    seeds = [answer_seed(5, i) for i in range(3)]
    assert seeds[0] == output.metrics.seed == 5
    alone = [llm.generate(prompt, dataclasses.replace(params, n=1, seed=seed), use_tqdm=False)[0] for seed in seeds]
    assert [c.token_ids for c in output.outputs] == [o.outputs[0].token_ids for o in alone]
    assert output.metrics.nfe == sum(o.metrics.nfe for o in alone)
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3


def test_seeds_of_answers_do_not_meet():
    seeds = {answer_seed(seed, i) for seed in range(200) for i in range(50)}
    assert len(seeds) == 200 * 50 and all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize("prompt_len, own", [(33, 1), (32, 0), (47, 15), (15, 15)])
def test_in_block_the_prompt_is_computed_once(llm, prompt_len, own):
    """Pages are of 16: the prompt's rows go through once, and of each further answer what lies in a page of both."""
    before = llm.stats
    params = dataclasses.replace(SAMPLED, n=4, max_tokens=8, denoising_steps=1)
    prompt = list(range(1, prompt_len + 1))
    llm.generate(prompt, params, use_tqdm=False)
    assert llm.stats.rows - before.rows == prompt_len + 3 * own + 4 * 8
    # all in one step: in each layer the prompt's K and V are there before any of them attends
    assert llm.stats.forwards - before.forwards == 1


def test_answers_share_the_pages_that_the_prompt_fills(llm):
    engine = llm.engine
    engine.add_request(list(range(1, 70)), dataclasses.replace(SAMPLED, n=4))
    engine.step()
    pages = [sequence.pages for sequence in engine.scheduler.running]
    assert [p[:4] for p in pages] == [pages[0][:4]] * 4
    assert len({page for p in pages for page in p[4:]}) == sum(len(p) - 4 for p in pages)
    engine.abort_all()
    engine.add_request(list(range(1, 70)), dataclasses.replace(SAMPLED, n=4, mode="vanilla"))
    engine.step()
    assert len({page for s in engine.scheduler.running for page in s.pages}) == 4 * len(
        engine.scheduler.running[0].pages
    )
    engine.abort_all()


@pytest.mark.parametrize("slots, pages", [(1, 99), (2, 99), (8, 8)])
def test_neither_slots_nor_pages_change_answers(checkpoint, llm, slots, pages):
    """Answers that come one after the other, and such as are preempted while a sibling goes on with the pages."""
    prompts = [list(range(1, 37)), [5, 6, 7], list(range(9, 60))]
    expected = [o.outputs for o in llm.generate(prompts, SAMPLED, use_tqdm=False)]
    page_bytes = 2 * 2 * 32 * 8 * 16
    with LLM(
        checkpoint, device="cpu", dtype="float64", max_num_seqs=slots, kv_cache_memory=pages * page_bytes
    ) as other:
        outputs = other.generate(prompts, SAMPLED, use_tqdm=False)
        assert other.engine.pool.num_free == other.engine.pool.num_pages
    assert [o.outputs for o in outputs] == expected
    assert (sum(o.metrics.preemptions for o in outputs) > 0) == (pages == 8)


def test_an_answer_that_ends_early_leaves_its_slot_to_others(checkpoint, llm):
    params = dataclasses.replace(SAMPLED, n=6, max_tokens=64)
    (free,) = llm.generate([1, 2, 3], params, use_tqdm=False)
    # a token that only some answers have
    stop = next(t for t in free.outputs[0].token_ids if sum(t in c.token_ids for c in free.outputs) < 4)
    (output,) = llm.generate([1, 2, 3], dataclasses.replace(params, stop_token_ids=[stop]), use_tqdm=False)
    reasons = [completion.finish_reason for completion in output.outputs]
    assert set(reasons) == {"stop", "length"}
    for cut, whole in zip(output.outputs, free.outputs, strict=True):
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert (stop in whole.token_ids) == (cut.finish_reason == "stop")


def test_a_request_of_several_answers_is_aborted_as_one(llm):
    engine = llm.engine
    first = engine.add_request([1, 2, 3], SAMPLED)
    second = engine.add_request([1, 2, 3], SAMPLED)
    assert second == first + 3
    engine.step()
    with pytest.raises(ValueError, match=f"no unfinished request {first + 1}"):
        engine.abort(first + 1)
    engine.abort(first)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert [(o.request_id, len(o.outputs)) for o in outputs] == [(second, 3)]


# --- log-probabilities ---

FREE_RULES = ["low_confidence", "threshold", "entropy"]


@pytest.mark.parametrize("rule", FREE_RULES)
@pytest.mark.parametrize("mode", MODES)
def test_logprobs_are_those_of_the_step_that_revealed_the_token(tmp_path_factory, mode, rule):
    folder = write_checkpoint(tmp_path_factory.mktemp("logprobs"), eos_token_id=3)
    options = dict(mode=mode, unmasking=rule, max_tokens=13, block_length=5, temperature=0.7, logits_eos_inf=True)
    options |= {"threshold": {"threshold": 0.4}, "entropy": {"entropy_bound": 0.5}}.get(rule, {})
    prompts = [[1, 2, 3, 4], [9] * 20, [7]]
    reference = Reference(folder)
    with LLM(folder, device="cpu", dtype="float64", max_num_seqs=2) as llm:
        params = SamplingParams(**options, seed=1, logprobs=4, ignore_eos=True)
        outputs = llm.generate(prompts, [params, dataclasses.replace(params, logprobs=0), params], use_tqdm=False)
        plain = llm.generate(prompts, dataclasses.replace(params, logprobs=None), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]
    assert all(o.outputs[0].logprobs is None for o in plain)
    for prompt, output, number in zip(prompts, outputs, (4, 0, 4), strict=True):
        result = reference.generate(prompt, **options, seed=1, eos_ids=(3,))
        expected = {}
        for step in (step for block in result.blocks for step in block):
            expected |= dict(zip(step.revealed, step.logprobs, strict=True))
        (completion,) = output.outputs
        assert completion.token_ids == result.tokens and len(completion.logprobs) == 13
        for i, (token, found) in enumerate(zip(result.tokens, completion.logprobs, strict=True)):
            values, ids = expected[i].topk(4)
            wanted = {*ids[:number].tolist(), token}
            assert found.keys() == wanted
            for token_id, logprob in found.items():
                assert logprob.logprob == pytest.approx(float(expected[i][token_id]), abs=1e-9)
                assert logprob.rank == 1 + int((expected[i] > expected[i][token_id]).sum())
                assert logprob.decoded_token is None


def test_logprobs_end_with_the_tokens_and_have_their_text(llm_of_letters, free):
    params = dataclasses.replace(LONG, stop=free.text[9:11], logprobs=1)
    (completion,) = answers(llm_of_letters, "hello", params)
    assert len(completion.logprobs) == len(completion.token_ids) < 40
    for token, found in zip(completion.token_ids, completion.logprobs, strict=True):
        assert found[token].decoded_token == llm_of_letters.tokenizer.decode([token], skip_special_tokens=True)


@pytest.mark.parametrize("size", [0, 5])
def test_logprobs_beside_requests_without(llm, size, monkeypatch):
    """In one batch, and padded as for a CUDA graph."""
    monkeypatch.setattr(llm.engine.runner._reveal, "padded", lambda rows: rows + size)
    asking = dataclasses.replace(LONG, logprobs=2)
    prompts = [[i, i + 1, i + 2] for i in range(1, 7)]
    params = [asking if i % 2 else LONG for i in range(6)]
    together = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
    for prompt, p, completion in zip(prompts, params, together, strict=True):
        (alone,) = answers(llm, prompt, p)
        assert alone.token_ids == completion.token_ids and (alone.logprobs is None) == (completion.logprobs is None)
        for a, b in zip(alone.logprobs or [], completion.logprobs or [], strict=True):
            assert a.keys() == b.keys()
            torch.testing.assert_close(*(torch.tensor([x[i].logprob for i in a]) for x in (a, b)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("ab{fill:2}c", [0, 97, 98, None, None, 99]),
        ("{fill:1}c{fill:1}", [0, None, 99, None]),
    ],
)
def test_special_tokens_begin_a_prompt_with_spans_and_nothing_else(text, expected):
    def tokenize(text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(character) for character in text]

    assert PromptReader(tokenize, 500, 1000).read({"prompt": text}).tokens == expected


def test_metrics_of_several_answers():
    """Counts of all of them, times of the first to get that far."""
    siblings = []
    for number in range(2):
        Sequence(number, None, [1], SamplingParams(max_tokens=4), 7, frozenset(), siblings)
    for sequence, nfe, preemptions, begun, block in zip(siblings, (3, 4), (1, 2), (2, 1), (9, 5), strict=True):
        sequence.nfe, sequence.preemptions = nfe, preemptions
        sequence.first_run_at, sequence.first_block_at = siblings[0].added_at + begun, siblings[0].added_at + block
    metrics = request_output(siblings, None).metrics
    assert (metrics.nfe, metrics.preemptions, metrics.seed) == (7, 3, 7)
    assert (metrics.queued_seconds, metrics.first_block_seconds) == pytest.approx((1, 5))


def test_the_last_span_says_why_an_answer_ended():
    tokens, params = [1, None, 2, None], SamplingParams(mode="vanilla", max_tokens=2)
    sequence = InfillSequence(0, None, tokens, params, 7, frozenset({9}), [], [1, 57, 2, 57])
    sequence.first_run_at = sequence.added_at
    for last, reason, stop in ((5, "length", None), (9, "stop", 9)):
        sequence.output_token_ids = [9, 2, last]
        (answer,) = request_output([sequence], None).outputs
        assert (answer.finish_reason, answer.stop_reason) == (reason, stop)
        assert [span.token_ids for span in answer.infilled.spans] == [[], [5] if last == 5 else []]
