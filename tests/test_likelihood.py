"""Likelihoods and choices against a plain implementation at float64, which shares the masks and no code."""

import itertools
import math
import statistics

import pytest
import torch

from blockinfer import LLM, SamplingParams, ScoringParams
from blockinfer.decoding.likelihood import draw_masks, estimate
from blockinfer.engine.scoring import Scores
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.reference import Reference, cut

MASK, VOCAB = 57, 61
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
SHAPES = {"dense": {}, "wide": dict(embedding_size=64, n_kv_heads=2, weight_tying=True, seed=3)}


@pytest.fixture(scope="module", params=SHAPES)
def folder(tmp_path_factory, request):
    folder = write_checkpoint(tmp_path_factory.mktemp("scored"), **SHAPES[request.param])
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


@pytest.fixture(scope="module")
def small(folder):
    with LLM(folder, device="cpu", dtype="float64", max_num_seqs=6, page_size=4) as llm:
        yield llm
        assert llm.engine.pool.num_free == llm.engine.pool.num_pages


def score(llm, prompts, continuations, **options):
    return llm.score(prompts, continuations, ScoringParams(**options), use_tqdm=False)


# --- a plain implementation ---


def plain_logits(reference, prompt, answer, mode):
    """[answer, vocabulary]: with the prompt's own K and V in `block`, else of the whole canvas at once."""
    if mode == "block" and prompt:
        _, before = reference.forward(prompt)
        hidden, _ = reference.forward(answer, len(prompt), cut(before, 0))
    else:
        hidden, _ = reference.forward(prompt + answer)
    return reference.head(hidden)[-len(answer) :, :VOCAB]


def plain_sum(reference, prompt, answer, masked, mode="vanilla", scale=0.0):
    """The log-probabilities of the masked tokens, summed."""
    noisy = [MASK if i in masked else token for i, token in enumerate(answer)]
    logits = plain_logits(reference, prompt, noisy, mode)
    if scale:
        other = plain_logits(reference, [MASK] * len(prompt), noisy, mode)
        logits = other + (scale + 1) * (logits - other)
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
    return -float(losses[sorted(masked)].sum())


def plain_estimate(length, sums):
    """(masked places, their sum) of each forward -> every number of masked tokens alike, as far as it was tried."""
    by_count = {}
    for masked, total in sums:
        by_count.setdefault(len(masked), []).append(total * length / len(masked))
    return statistics.fmean(statistics.fmean(values) for values in by_count.values())


def exact(reference, prompt, answer):
    masks = [m for n in range(1, len(answer) + 1) for m in itertools.combinations(range(len(answer)), n)]
    return plain_estimate(len(answer), [(m, plain_sum(reference, prompt, answer, m)) for m in masks])


# --- scores ---

ANSWERS = [[7], [7, 8], [20, 21, 22], [9, 9, 30, 2, 50], [11, 12, 13, 14, 15, 16, 17, 18]]


@pytest.mark.parametrize("scale", [0.0, 1.5])
@pytest.mark.parametrize("mode", ["vanilla", "block"])
def test_scores_are_the_plain_ones_for_the_same_masks(small, reference, mode, scale):
    """Exact ones, such of every number of masked tokens, and of drawn numbers: 20 forwards are at most the first two,
    and for 12 tokens the last."""
    answers = [*ANSWERS, list(range(10, 22))]
    outputs = score(small, [PROMPT] * 6, answers, mc_num=20, seed=4, mode=mode, cfg_scale=scale)
    for answer, output in zip(answers, outputs, strict=True):
        masks = draw_masks(len(answer), 20, 4)
        sums = [(m, plain_sum(reference, PROMPT, answer, m, mode, scale)) for m in masks]
        if len(answer) == 12:
            expected = statistics.fmean(total * 12 / len(m) for m, total in sums)
        else:
            expected = plain_estimate(len(answer), sums)
        assert output.logprob == pytest.approx(expected, abs=1e-9)
        assert (output.prompt_token_ids, output.token_ids, output.seed) == (PROMPT, answer, 4)
        assert output.nfe == len(masks) * (2 if scale else 1) and output.is_greedy is None
        assert (output.standard_error == 0) == (len(answer) <= 3)


def test_a_short_answer_is_exact_whatever_the_seed(small, reference):
    answer = [9, 30, 2, 50]
    outputs = [score(small, PROMPT, answer, mc_num=15, seed=seed)[0] for seed in (1, 2)]
    assert outputs[0].logprob == outputs[1].logprob == pytest.approx(exact(reference, PROMPT, answer), abs=1e-9)
    assert outputs[0].nfe == 15


@pytest.mark.parametrize("mc_num", [6, 16])
def test_the_mean_over_seeds_is_within_its_standard_error_of_the_exact_value(small, reference, mc_num):
    """And one score's error is the one that it reports: drawn numbers of masked tokens, and every number alike."""
    answer = [9, 30, 2, 50, 17, 4]
    runs = 150
    outputs = [score(small, PROMPT, answer, mc_num=mc_num, seed=seed)[0] for seed in range(runs)]
    values = [output.logprob for output in outputs]
    expected, spread = exact(reference, PROMPT, answer), statistics.stdev(values)
    assert abs(statistics.fmean(values) - expected) < 3 * spread / math.sqrt(runs)
    told = math.sqrt(statistics.fmean(output.standard_error**2 for output in outputs))
    assert spread * 0.8 < told < spread * (1.25 if mc_num == 16 else 2)


def test_a_prompt_s_pages_are_shared_in_block_alone(small):
    """Of 11 tokens two pages of 4 are full: six forwards at a time compute them once and the three others six times."""
    rows = {}
    for mode in ("vanilla", "block"):
        before = small.stats.rows
        score(small, PROMPT, ANSWERS[-1], mc_num=6, seed=0, mode=mode)
        rows[mode] = small.stats.rows - before
    assert rows == {"vanilla": 6 * (11 + 8), "block": 8 + 6 * (3 + 8)}


def test_neither_the_batch_nor_pages_change_a_score(folder, small):
    """Scores beside each other and beside requests that decode, in an engine of few pages, which preempts."""
    prompts, answers = [PROMPT[:n] for n in (1, 5, 11)] * 2, ANSWERS[-3:] * 2
    expected = [o.logprob for p, a in zip(prompts, answers, strict=True) for o in score(small, p, a, mc_num=9, seed=1)]
    assert [o.logprob for o in score(small, prompts, answers, mc_num=9, seed=1)] == pytest.approx(expected, abs=1e-9)
    page_bytes = 2 * 2 * small.model_config.n_kv_heads * 8 * 8 * 4
    options = dict(max_num_seqs=6, page_size=4, max_model_len=30, max_num_batched_tokens=40)
    with LLM(folder, device="cpu", dtype="float64", kv_cache_memory=9 * page_bytes, **options) as llm:
        assert [o.logprob for o in score(llm, prompts, answers, mc_num=9, seed=1)] == pytest.approx(expected, abs=1e-9)
        engine, params = llm.engine, ScoringParams(mode="block")
        sampling = SamplingParams(max_tokens=12, block_length=4, ignore_eos=True)
        (alone,) = llm.generate(PROMPT, sampling, use_tqdm=False)
        asked = engine.add_request(PROMPT, sampling)
        canvas, answer = PROMPT + ANSWERS[2], range(11, 14)
        reads = [[(i, canvas[i])] for i in answer]
        scored = engine.add_scoring(canvas, answer, [(i,) for i in answer], reads, params)
        outputs = {}
        while engine.has_unfinished():
            outputs |= {output.request_id: output for output in engine.step()}
        assert outputs[asked].outputs == alone.outputs
        assert outputs[asked].metrics.nfe == alone.metrics.nfe and outputs[scored].nfe == 3
        assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_is_greedy_is_whether_decoding_gives_the_answer(small, reference, scale):
    greedy = reference.generate(PROMPT, mode="vanilla", max_tokens=5, block_length=5, cfg_scale=scale).tokens
    other = greedy[:-1] + [greedy[-1] ^ 1]
    outputs = score(small, [PROMPT] * 2, [greedy, other], mc_num=2, is_greedy=True, cfg_scale=scale)
    assert [o.is_greedy for o in outputs] == [True, False]
    assert [o.nfe for o in outputs] == [(2 + 5) * (2 if scale else 1)] * 2


def test_a_text_follows_its_prompt_without_special_tokens(small):
    encode = small.tokenizer.encode
    ids = encode("ab cd", add_special_tokens=False)
    (text,), (given,) = score(small, "hello", "ab cd", seed=1), score(small, encode("hello"), ids, seed=1)
    assert text == given and text.token_ids == ids


def test_a_call_draws_one_seed(small):
    first, second = (score(small, [PROMPT] * 2, [ANSWERS[-1]] * 2, mc_num=5) for _ in range(2))
    assert first[0].seed == first[1].seed != second[0].seed
    assert first[0].logprob == pytest.approx(first[1].logprob, abs=1e-9)


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-3), ("bfloat16", 3.0)])
def test_other_number_formats_are_near(folder, small, dtype, bound):
    options = dict(mc_num=9, seed=0)
    expected = score(small, [PROMPT] * 2, ANSWERS[-2:], **options)
    with LLM(folder, device="cpu", dtype=dtype) as llm:
        found = score(llm, [PROMPT] * 2, ANSWERS[-2:], **options)
    assert [o.logprob for o in found] == pytest.approx([o.logprob for o in expected], abs=bound)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_an_empty_engine_that_goes_on(small, monkeypatch, error):
    expected = score(small, PROMPT, ANSWERS[-1], seed=0)
    run, steps = small.engine.runner.run, iter(range(100))

    def fails(scheduled):
        if next(steps) == 3:
            raise error("planted")
        return run(scheduled)

    with monkeypatch.context() as patch, pytest.raises(error, match="planted"):
        patch.setattr(small.engine.runner, "run", fails)
        score(small, PROMPT, ANSWERS[-1], seed=0)
    assert not small.engine.has_unfinished() and small.engine.pool.num_free == small.engine.pool.num_pages
    assert score(small, PROMPT, ANSWERS[-1], seed=0) == expected


def test_requests_that_others_added_are_not_taken_along(small):
    small.engine.add_request(PROMPT)
    with pytest.raises(RuntimeError, match="the engine has unfinished requests"):
        score(small, PROMPT, ANSWERS[0])
    small.engine.abort_all()


# --- what is drawn, and what is told of it ---


@pytest.mark.parametrize("length, mc_num", [(1, 1), (3, 7), (3, 6), (5, 12), (5, 4), (9, 128), (64, 128), (65, 128)])
def test_masks(length, mc_num):
    masks = draw_masks(length, mc_num, 7)
    assert masks == draw_masks(length, mc_num, 7) and 1 <= len(masks) <= mc_num
    assert all(mask == tuple(sorted(set(mask))) and mask and 0 <= mask[0] and mask[-1] < length for mask in masks)
    if 2**length - 1 <= mc_num:
        assert len(set(masks)) == len(masks) == 2**length - 1
    elif 2 * length <= mc_num:
        counts, share = [len(mask) for mask in masks], (mc_num - 1) // (length - 1)
        assert {counts.count(n) > 1 for n in range(1, length)} == {True} and counts.count(length) == 1
        there = {n: math.comb(length, n) for n in range(1, length)}
        assert all(counts.count(n) in (share, share + 1, number) for n, number in there.items())
        assert len(masks) == mc_num or min(there.values()) <= share + 1
        assert length == 3 or draw_masks(length, mc_num, 8) != masks
    else:
        assert len(masks) == mc_num


@pytest.mark.parametrize("length, mc_num", [(5, 3), (9, 6), (12, 7), (10, 1)])
def test_drawn_numbers_of_masked_tokens_are_all_alike_over_seeds(length, mc_num):
    """Also where they are halves apart, of which rounding to even numbers leaves some out."""
    masks = [mask for seed in range(3000) for mask in draw_masks(length, mc_num, seed)]
    counts = [len(mask) for mask in masks]
    places = [i for mask in masks for i in mask]
    for values, least in ((counts, 1), (places, 0)):
        assert all(abs(values.count(least + i) / len(values) - 1 / length) < 0.02 for i in range(length))


def test_a_single_forward_tells_no_error():
    masks = draw_masks(6, 1, 0)
    value, error = estimate(6, 1, masks, [-3.0])
    assert value == pytest.approx(-3.0 * 6 / len(masks[0])) and error is None


def test_the_error_of_a_drawn_number_of_masked_tokens_is_of_neighbours_differences():
    """Half the mean square of successive differences estimates the variance of a value (von Neumann et al., Annals of
    Mathematical Statistics 12, 1941), and that of a mean of three is a third of it."""
    masks, values = [(0, 1), (2, 3, 4, 5), tuple(range(8))], [-4.0, -1.0, -2.0]
    sums = [value * len(mask) / 8 for mask, value in zip(masks, values, strict=True)]
    assert estimate(8, 3, masks, sums) == pytest.approx((-7 / 3, math.sqrt((3**2 + 1**2) / 2 / 2 / 3)))


# --- choices ---


@pytest.mark.parametrize("scale", [0.0, 0.8])
def test_choices_are_the_softmax_of_the_reference_s_logits(small, reference, scale):
    candidates = [[5], [9], [60], [0]]
    before = small.stats
    outputs = small.choose([PROMPT, [1, 2]], candidates, ScoringParams(cfg_scale=scale), use_tqdm=False)
    assert small.stats.forwards - before.forwards == 1
    for prompt, output in zip([PROMPT, [1, 2]], outputs, strict=True):
        logits = plain_logits(reference, prompt, [MASK], "vanilla")[0]
        if scale:
            other = plain_logits(reference, [MASK] * len(prompt), [MASK], "vanilla")[0]
            logits = other + (scale + 1) * (logits - other)
        ids = [c[0] for c in candidates]
        assert output.logprobs == pytest.approx(logits.log_softmax(-1)[ids].tolist(), abs=1e-9)
        assert output.probabilities == pytest.approx(logits[ids].softmax(-1).tolist(), abs=1e-9)
        assert output.best == int(logits[ids].argmax()) and math.fsum(output.probabilities) == pytest.approx(1)
        assert output.scores == [None] * 4 and output.nfe == (2 if scale else 1)


def test_a_choice_in_the_middle_sees_what_follows(small, reference):
    before, after = PROMPT[:4], PROMPT[4:]
    prompt = {"prompt_token_ids": [*before, MASK, *after], "infill": True}
    (output,) = small.choose(prompt, [[5], [9]], use_tqdm=False)
    logits = reference.logits([*before, MASK, *after])[4, :VOCAB].log_softmax(-1)
    assert output.logprobs == pytest.approx(logits[[5, 9]].tolist(), abs=1e-9)


def test_longer_candidates_are_scored(small):
    candidates = [[5], [9, 10], [1, 2, 3, 4]]
    params = ScoringParams(mc_num=8, seed=2)
    (output,) = small.choose(PROMPT, candidates, params, use_tqdm=False)
    scores = small.score([PROMPT] * 3, candidates, params, use_tqdm=False)
    assert output.logprobs == pytest.approx([s.logprob for s in scores], abs=1e-9)
    assert [s and s.standard_error for s in output.scores[1:]] == [s.standard_error for s in scores[1:]]
    assert output.scores[0] is None and output.nfe == sum(s.nfe for s in scores)
    weights = [math.exp(s.logprob) for s in scores]
    assert output.probabilities == pytest.approx([w / sum(weights) for w in weights])


def test_choices_whose_own_probabilities_are_0_in_floating_point(small):
    candidates = [[5] * 220, [9] * 220]
    (output,) = small.choose([1], candidates, ScoringParams(mc_num=2, seed=0), use_tqdm=False)
    assert math.exp(max(output.logprobs)) == 0 and math.fsum(output.probabilities) == pytest.approx(1)


def test_choices_of_each_prompt_and_as_text(small):
    outputs = small.choose(["ab", "cd"], [["x", "y"], ["z", "x", "y"]], use_tqdm=False)
    assert [len(o.choices) for o in outputs] == [2, 3]
    (again,) = small.choose("ab", ["x", "y"], use_tqdm=False)
    assert again.logprobs == pytest.approx(outputs[0].logprobs, abs=1e-9)


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mc_num": 0}, ValueError, "mc_num must be at least 1, got 0"),
        ({"mc_num": 2**21}, ValueError, "mc_num must be at most 1048576"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"mode": "dual_cache"}, ValueError, "mode must be one of vanilla, block, got 'dual_cache'"),
        ({"cfg_scale": -1.0}, ValueError, "cfg_scale must be between"),
        ({"is_greedy": 1}, ValueError, "is_greedy must be True or False, got 1"),
        ({"is_check_greedy": True}, TypeError, "it is called is_greedy here"),
        ({"batch_size": 4}, TypeError, "max_num_seqs, an option of LLM, is what runs at once"),
        ({"max_tokens": 4}, TypeError, "it is an option of SamplingParams"),
        ({"mcnum": 4}, TypeError, "did you mean 'mc_num'"),
    ],
)
def test_scoring_params(options, error, message):
    with pytest.raises(error, match=message):
        ScoringParams(**options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda llm: llm.score([[1], [2]], [[3]]), ValueError, "there are 2 prompts but 1 continuations"),
        (lambda llm: llm.score([1], []), ValueError, "there are 1 prompts but 0 continuations"),
        (lambda llm: llm.score([1], ""), ValueError, "prompt 0: the continuation is empty"),
        (lambda llm: llm.score([1], 5), ValueError, "continuations must be a list of strings or of lists"),
        (lambda llm: llm.score([1], [[99]]), ValueError, "continuation token 0 must be an integer from 0 to"),
        (
            lambda llm: llm.score([[1], [1]], [[1], [1] * 256]),
            ValueError,
            "prompt 1: the prompt's and the answer's 257 tokens are more than max_model_len=256",
        ),
        (
            lambda llm: llm.choose([[1], [1] * 256], [[1], [2]]),
            ValueError,
            "prompt 1: the prompt's and the answer's 257 tokens",
        ),
        (lambda llm: llm.score("", "a"), ValueError, "prompt 0: the prompt is empty"),
        (lambda llm: llm.score({"prompt": "a{fill:1}"}, "a"), ValueError, "score takes no masked spans"),
        (lambda llm: llm.score([1], [2], SamplingParams()), ValueError, "scoring_params must be a ScoringParams"),
        (lambda llm: llm.score([1], [2], mc_num=3), TypeError, "'mc_num'; it is an option of ScoringParams"),
        (lambda llm: llm.score([1], [2], params=3), TypeError, "it is called scoring_params here"),
        (lambda llm: llm.choose([1], ["a"]), ValueError, "prompt 0: choose needs at least 2 choices, got 1"),
        (lambda llm: llm.choose([1], ["a", "a"]), ValueError, "two choices are the same tokens"),
        (lambda llm: llm.choose([1], "ab"), ValueError, "choices must be a list of candidates"),
        (lambda llm: llm.choose([1], [["a"], ["b"]]), ValueError, "there are 1 prompts but 2 lists of choices"),
        (lambda llm: llm.choose({"prompt": "a{fill:1}"}, ["ab", "b"]), ValueError, "choice 0 has 2 tokens, the masked"),
        (
            lambda llm: llm.choose({"prompt": "{fill:1}a{fill:1}"}, ["a", "b"]),
            ValueError,
            "one masked span in a prompt",
        ),
        (
            lambda llm: llm.choose([1], ["a", "b"], ScoringParams(is_greedy=True)),
            ValueError,
            "is_greedy is for score alone",
        ),
        (lambda llm: llm.score([1], [2], use_tqdm=None), ValueError, "use_tqdm must be True or False"),
    ],
)
def test_bad_calls(small, call, error, message):
    with pytest.raises(error, match=message):
        call(small)
    assert not small.engine.has_unfinished()


def test_a_column_beyond_the_vocabulary_is_no_token(tmp_path):
    with LLM(write_checkpoint(tmp_path, embedding_size=64), device="cpu") as llm:
        with pytest.raises(ValueError, match="prompt 0: token 62 is none of the 61 that the model predicts"):
            llm.score([1], [62])


def test_logits_that_are_not_finite_end_their_request_alone(tmp_path, monkeypatch):
    with LLM(write_checkpoint(tmp_path), device="cpu", dtype="float64") as llm:
        engine = llm.engine
        head = engine.model.logits
        canvas, params = PROMPT + [1, 2], ScoringParams()
        bad = engine.add_scoring(canvas, range(11, 13), [(11,)], [[(11, 1)]], params)
        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "logits", lambda *args: head(*args) * math.nan)
            engine.step()
            assert engine.step() == []
        good = engine.add_scoring(canvas, range(11, 13), [(11,)], [[(11, 1)]], params)
        with pytest.raises(FloatingPointError, match=f"NaN or infinite for request {bad}:"):
            engine.step()
        engine.abort(bad)
        outputs = []
        while engine.has_unfinished():
            outputs += engine.step()
        assert [o.request_id for o in outputs] == [good] and not math.isnan(outputs[0].values[0][0])


def test_logits_that_are_not_finite_are_told_after_ctrl_c_too(tmp_path, monkeypatch):
    """It comes when the values have been read, and before anyone has looked at them."""
    with LLM(write_checkpoint(tmp_path), device="cpu", dtype="float64") as llm:
        engine, collect = llm.engine, Scores.collect
        head = engine.model.logits
        canvas, masks, reads = PROMPT + [1, 2], [(11,), (12,)], [[(11, 1)], [(12, 2)]]
        bad = engine.add_scoring(canvas, range(11, 13), masks, reads, ScoringParams())

        def collect_and_interrupt(scores):
            collect(scores)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "logits", lambda *args: head(*args) * math.nan)
            engine.step()
            patch.setattr(Scores, "collect", collect_and_interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        with pytest.raises(FloatingPointError, match=f"NaN or infinite for request {bad}:"):
            engine.step()
        engine.abort(bad)
        assert not engine.has_unfinished() and engine.pool.num_free == engine.pool.num_pages
