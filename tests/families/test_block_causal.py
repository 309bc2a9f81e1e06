"""Block-causal decoding, against a loop that computes the whole sequence anew in every step, with the mask."""

import random
from types import SimpleNamespace

import pytest
import torch

from blockinfer import LLM, SamplingParams
from evals.runs.settings import Case, read_settings
from evals.suite import Suite
from evals.test_steps import SIZES
from evals.timing.steps import refusal
from tests.families.checkpoints import LLADA2, write_family, write_tokenizer
from tests.families.networks import LLaDA2Network
from tests.options import Options
from tests.test_rows import QA, write

MASK, EOS, B = 57, 56, 8
CONFIG = LLADA2 | {"vocab_size": 61, "mask_token_id": MASK, "eos_token_id": EOS, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("block_causal"), CONFIG, seed=5)


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, device="cpu", dtype="float64", max_num_seqs=6, page_size=5) as llm:
        yield llm


@pytest.fixture(scope="module")
def network(folder):
    return LLaDA2Network(folder, torch.float64)


def decoded(network, prompt, new, length, threshold=None, cfg_scale=0.0):
    """arXiv 2512.15745, by the words: blocks at multiples of `length`, the last one whole; one token a step, or all
    that are sure enough. -> the new tokens, and the steps."""
    end = -(-(len(prompt) + new) // length) * length
    canvas = prompt + [MASK] * (end - len(prompt))
    masked = [False] * len(prompt) + [True] * (end - len(prompt))
    steps = 0
    for start in range(len(prompt) // length * length, end, length):
        while any(masked[start : start + length]):
            logits = network.logits(canvas[: start + length], block=length)
            if cfg_scale:
                hidden = [MASK] * len(prompt) + canvas[len(prompt) : start + length]
                without = network.logits(hidden[: start + length], block=length)
                logits = without + (cfg_scale + 1) * (logits - without)
            logits[:, MASK] = -torch.inf
            shares, tokens = logits.softmax(-1).max(-1)
            left = [i for i in range(start, start + length) if masked[i]]
            best = max(left, key=lambda i: (shares[i].item(), -i))
            for i in left:
                if i == best or (threshold is not None and shares[i] >= threshold):
                    canvas[i], masked[i] = int(tokens[i]), False
            steps += 1
    return canvas[len(prompt) : len(prompt) + new], steps


def prompts(number, seed=0):
    draw = random.Random(seed)
    lengths = [1, B - 1, B, B + 1, 3 * B, 3 * B + 5]
    return [[draw.randrange(56) for _ in range(lengths[i % len(lengths)])] for i in range(number)]


@pytest.mark.parametrize("length", [B, 5])
@pytest.mark.parametrize("options", [{}, {"unmasking": "threshold", "threshold": 0.3}])
def test_tokens_are_those_of_the_whole_sequence(llm, network, length, options):
    """Of prompts that end inside a block, at its end and behind it; of answers that end inside one too."""
    asked, news = prompts(6), [13, 1, 8, 9, 16, 11]
    params = [SamplingParams(max_tokens=n, block_length=length, ignore_eos=True, **options) for n in news]
    outputs = llm.generate(asked, params, use_tqdm=False)
    for output, prompt, new in zip(outputs, asked, news, strict=True):
        tokens, steps = decoded(network, prompt, new, length, options.get("threshold"))
        assert output.outputs[0].token_ids == tokens and output.outputs[0].finish_reason == "length"
        assert output.metrics.denoising_steps == steps == output.metrics.nfe


def test_a_literal_mask_token_stays_in_the_first_block(llm, network):
    prompt = [3, 4, MASK, 5] + [6] * B + [7, MASK]
    output = llm.generate(prompt, SamplingParams(max_tokens=12, block_length=B, ignore_eos=True), use_tqdm=False)[0]
    assert output.outputs[0].token_ids == decoded(network, prompt, 12, B)[0]


def test_guidance(llm, network):
    """The shadow sees none of the prompt, in the first block neither."""
    params = SamplingParams(max_tokens=12, block_length=B, ignore_eos=True, cfg_scale=1.5)
    for prompt in prompts(5)[1:]:
        found = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
        assert found == decoded(network, prompt, 12, B, cfg_scale=1.5)[0]


def test_preempted_requests_lose_nothing(folder, network):
    """Pages for two of four requests: what was committed is computed once more, block by block."""
    asked = prompts(4, seed=3)
    params = SamplingParams(max_tokens=3 * B, block_length=B, ignore_eos=True)
    page = 2 * 2 * 4 * 2 * 16 * 8  # K and V, layers, tokens, heads, size, bytes
    with LLM(folder, device="cpu", dtype="float64", page_size=4, kv_cache_memory=20 * page, max_model_len=64) as llm:
        outputs = llm.generate(asked, params, use_tqdm=False)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    for output, prompt in zip(outputs, asked, strict=True):
        assert output.outputs[0].token_ids == decoded(network, prompt, 3 * B, B)[0]


def test_noise_depends_on_the_position_in_the_output(llm):
    """The same in any batch, and for several answers, each of which has its own."""
    params = SamplingParams(max_tokens=12, block_length=B, ignore_eos=True, temperature=1.0, seed=7, n=3)
    one = SamplingParams(max_tokens=12, block_length=B, ignore_eos=True, temperature=1.0, seed=7)
    prompt = prompts(6)[5]
    (several,) = llm.generate(prompt, params, use_tqdm=False)
    answers = [completion.token_ids for completion in several.outputs]
    assert len({tuple(answer) for answer in answers}) == 3
    assert llm.generate(prompt, one, use_tqdm=False)[0].outputs[0].token_ids == answers[0]


def test_streams_and_logprobs_are_of_the_output_alone(llm):
    prompt = prompts(2)[1]
    params = SamplingParams(max_tokens=12, block_length=B, ignore_eos=True, logprobs=2)
    (whole,) = llm.generate(prompt, params, use_tqdm=False)
    assert len(whole.outputs[0].logprobs) == 12
    for token, tokens in zip(whole.outputs[0].token_ids, whole.outputs[0].logprobs, strict=True):
        assert token in tokens and -50 < tokens[token].logprob <= 0
    streamed = list(llm.stream(prompt, params))
    assert [len(output.outputs[0].token_ids) for output in streamed] == [1, 9, 12]
    canvases = [
        o.outputs[0].canvas for o in llm.stream(prompt, params, denoise=True) if o.outputs[0].canvas is not None
    ]
    assert {len(canvas) for canvas in canvases} == {8, 3} and all(None in canvas for canvas in canvases[:1])


def test_a_stop_token_ends_it(folder, network):
    tokens, _ = decoded(network, [3, 4, 5], 3 * B, B)
    with LLM(folder, device="cpu", dtype="float64") as llm:
        params = SamplingParams(max_tokens=3 * B, block_length=B, stop_token_ids=[tokens[6]])
        completion = llm.generate([3, 4, 5], params, use_tqdm=False)[0].outputs[0]
    first = next(i for i, token in enumerate(tokens) if token in (tokens[6], EOS))
    assert completion.token_ids == tokens[:first] and completion.finish_reason == "stop"


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"mode": "vanilla"},
            "mode 'vanilla' computes positions that see later blocks, .* use 'block', which is exact",
        ),
        ({"mode": "prefix_cache"}, "mode 'prefix_cache' computes positions that see later blocks"),
        ({"mode": "dual_cache"}, "mode 'dual_cache' computes positions that see later blocks"),
        ({"mode": "block_refresh"}, "mode 'block_refresh' computes positions that see later blocks"),
        ({"block_add_threshold": 0.5, "unmasking": "threshold"}, "block_add_threshold=0.5 has blocks see later ones"),
        ({"suffix_window": 4}, "suffix_window=4 has blocks see later ones, and this model is block-causal; leave it 0"),
        ({"commit_delay": 1}, "commit_delay=1 has blocks see later ones"),
        ({"max_tokens": 250}, "4 tokens and max_tokens=250 in whole blocks of 7 make 259, more than max_model_len=256"),
    ],
)
def test_what_is_refused(llm, options, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([1, 2, 3, 4], SamplingParams(**{"block_length": 7} | options), use_tqdm=False)


def test_likelihoods_and_masked_spans_are_refused(llm):
    for ask in (lambda: llm.score([1], [2], use_tqdm=False), lambda: llm.choose([1], [[2], [3]], use_tqdm=False)):
        with pytest.raises(ValueError, match="likelihoods are not defined here for a block-causal model"):
            ask()
    spans = {"prompt_token_ids": [1, MASK, 2], "infill": True}
    # none of the modes that fill them elsewhere is named: they are refused here
    for mode in ("block", "vanilla"):
        with pytest.raises(ValueError, match="this model is block-causal: no mode fills them; leave them out of the"):
            llm.generate(spans, SamplingParams(mode=mode), use_tqdm=False)


def test_the_suite_says_which_mode_to_pass(llm):
    case = Case("dual_cache", 32, "low_confidence", SamplingParams(mode="dual_cache"))
    with pytest.raises(ValueError, match="this model is block-causal: use 'block', .*: --mode block"):
        Suite(llm, SimpleNamespace(cases=[case]))
    case = Case("block", 32, "low_confidence", SamplingParams(suffix_window=4))
    with pytest.raises(ValueError, match="suffix_window=4 has .*; leave it 0$"):
        Suite(llm, SimpleNamespace(cases=[case]))


def test_the_suite_cuts_prompts_so_that_whole_blocks_fit(tmp_path):
    """Of 199 tokens 192 are blocks of 8, of which the answer takes 10."""
    folder = write_family(tmp_path / "model", CONFIG, vocab_size=300)
    write_tokenizer(folder, {"<end>": EOS, "<mask>": MASK}, 270, eos_token="<end>")
    row = QA | {"context": "Ann did. " * 90}
    options = dict(
        dataset=str(write(tmp_path / "rows.jsonl", [row])), mode=["block"], block_length=[4, B], max_tokens=10
    )
    settings = read_settings(Options(model=str(folder), device="cpu", **options))
    with LLM(folder, device="cpu", max_model_len=199, max_num_seqs=1) as llm:
        suite = Suite(llm, settings)
        assert suite.truncated == 1 and 170 < len(suite.prompts[0]["prompt_token_ids"]) <= 192 - 10
        llm.generate(suite.prompts, settings.cases[1].params, use_tqdm=False)


def test_steps_that_are_not_block_causal_are_left_out(llm):
    """Of modes that see what comes after, and of several blocks open at once."""
    refused = {name for name, case in SIZES["cpu"].cases.items() if refusal(llm, case)}
    assert refused == {"dual_cache-1x16", "vanilla-1x16", "block-1x16-add0.01", "block-1x16-add0.4-active0.4"}
