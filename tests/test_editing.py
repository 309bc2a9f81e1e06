"""Editing, and LLaDA2.0's rule: against loops that are written by the words of LLaDA2.1, for two families."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from blockinfer import LLM, SamplingParams
from blockinfer.decoding.editing import BlockEdits
from blockinfer.engine.editing import EditedRow, edit
from blockinfer.kernels.confidence import Confidence
from blockinfer.kernels.slots import SlotOptions, SlotState
from tests.checkpoints import write_checkpoint
from tests.families.checkpoints import LLADA2, write_family
from tests.families.networks import LLaDA2Network
from tests.reference import Reference

MASK, B = 57, 8
PROMPTS = [[3], [6, 7, 8, 9, 10], list(range(20, 36)), list(range(2, 21))]


@dataclasses.dataclass
class Model:
    """logits(canvas, end): of the positions up to `end`, of those that it sees. aligned: blocks begin at multiples."""

    llm: LLM
    logits: Callable[[list[int], int], torch.Tensor]
    mode: str
    aligned: bool


@pytest.fixture(scope="module", params=["llada", "llada2"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llada":
        write_checkpoint(folder, seed=4)
        reference = Reference(folder)
        made = Model(None, lambda canvas, end: reference.logits(canvas), "vanilla", False)
    else:
        write_family(folder, LLADA2 | {"mask_token_id": MASK, "num_hidden_layers": 2}, seed=5)
        network = LLaDA2Network(folder, torch.float64)
        made = Model(None, lambda canvas, end: network.logits(canvas[:end], block=B), "block", True)
    with LLM(folder, device="cpu", dtype="float64", max_num_seqs=4) as llm:
        made.llm = llm
        yield made


def decoded(model, prompt, new, *, threshold, steps=None, editing=None, max_post_steps=16):
    """-> the tokens, the steps, and how many tokens were replaced.

    Of a block's masked positions those of a confidence above the threshold become tokens, or, where they are fewer than
    the schedule says, the so many best; of its tokens, those of the prompt aside, those that differ from what is
    predicted with a confidence above `editing`. It ends when a step that found no mask changes nothing.
    """
    end = len(prompt) + new
    end = -(-end // B) * B if model.aligned else end
    canvas, masked = prompt + [MASK] * (end - len(prompt)), {*range(len(prompt), end)}
    start, made, edits = len(prompt) // B * B if model.aligned else len(prompt), 0, 0
    while start < end:
        stop = min(start + B, end)
        # of a block-causal network the schedule is a whole block's, whatever is given of it
        number, step, post_steps = B if model.aligned else len([i for i in masked if i < stop]), 0, 0
        limit = min(number, -(-(steps or B) * number // B))
        while True:
            left = [i for i in range(start, stop) if i in masked]
            if not left:
                post_steps += 1
                if post_steps > max_post_steps or editing is None:
                    break
            logits = model.logits(canvas, stop)
            logits[:, MASK] = -torch.inf
            shares, tokens = (x.tolist() for x in logits.softmax(-1).max(-1))
            count = number // limit + (step < number % limit) if step < limit else 0
            above = [i for i in left if shares[i] > threshold]
            reveal = above if len(above) >= count else sorted(left, key=lambda i: (-shares[i], i))[:count]
            given = len(prompt)
            changed = [
                i
                for i in range(max(start, given), stop)
                if editing is not None and i not in masked and tokens[i] != canvas[i] and shares[i] > editing
            ]
            for i in reveal + changed:
                canvas[i] = tokens[i]
            masked -= {*reveal}
            made, step, edits = made + 1, step + 1, edits + len(changed)
            if not left and not changed:
                break
        start = stop
    return canvas[len(prompt) : len(prompt) + new], made, edits


@pytest.mark.parametrize(
    "options",
    [
        dict(threshold=0.4),
        dict(threshold=0.3, steps=3),
        dict(threshold=0.95),
        dict(threshold=0.4, editing=0.3),
        dict(threshold=0.2, steps=2, editing=0.1, max_post_steps=2),
        dict(threshold=0.3, editing=0.0, max_post_steps=3),
        dict(threshold=0.5, editing=0.2, max_post_steps=0),
    ],
)
def test_tokens_and_steps(model, options):
    """In one batch, with one beside them that is not edited."""
    names = {"steps": "denoising_steps", "editing": "editing_threshold"}
    given = {names.get(name, name): value for name, value in options.items()}
    params = SamplingParams(
        mode=model.mode, unmasking="scheduled_threshold", max_tokens=13, block_length=B, ignore_eos=True, **given
    )
    plain = SamplingParams(mode=model.mode, max_tokens=13, block_length=B, ignore_eos=True)
    *outputs, beside = model.llm.generate(PROMPTS + [PROMPTS[1]], [params] * len(PROMPTS) + [plain], use_tqdm=False)
    edits = 0
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        tokens, steps, replaced = decoded(model, prompt, 13, **options)
        assert output.outputs[0].token_ids == tokens
        assert output.metrics.denoising_steps == steps == output.metrics.nfe
        edits += replaced
    assert (edits > 0) == ("editing" in options and options["editing"] < 0.9)
    assert beside.outputs[0].token_ids == decoded(model, PROMPTS[1], 13, threshold=1.0)[0]


@pytest.mark.parametrize("unmasking", ["low_confidence", "threshold"])
def test_every_rule_may_be_edited(model, unmasking):
    """The same alone and in a batch, also where pages are taken; more forwards than without."""
    shared = dict(mode=model.mode, max_tokens=13, block_length=B, ignore_eos=True, unmasking=unmasking, seed=3)
    edited, plain = SamplingParams(**shared, editing_threshold=0.2), SamplingParams(**shared)
    alone = [model.llm.generate(prompt, edited, use_tqdm=False)[0] for prompt in PROMPTS]
    together = model.llm.generate(PROMPTS, edited, use_tqdm=False)
    without = model.llm.generate(PROMPTS, plain, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in alone] == [o.outputs[0].token_ids for o in together]
    assert [o.outputs[0].token_ids for o in without] != [o.outputs[0].token_ids for o in together]
    assert sum(o.metrics.nfe for o in together) > sum(o.metrics.nfe for o in without)


def test_a_canvas_shows_what_was_replaced(model):
    params = SamplingParams(
        mode=model.mode, max_tokens=8, block_length=B, ignore_eos=True, editing_threshold=0.0, max_post_steps=3
    )
    canvases = [output.outputs[0].canvas for output in model.llm.stream(PROMPTS[2], params, denoise=True)]
    before = [canvas for canvas in canvases if canvas is not None]
    pairs = [(a, b) for one, other in zip(before, before[1:], strict=False) for a, b in zip(one, other, strict=True)]
    assert any(a is not None and a != b for a, b in pairs) and all(b is not None for a, b in pairs if a is not None)


def test_guided_requests_are_edited_too(model):
    params = SamplingParams(
        mode=model.mode, max_tokens=8, block_length=B, ignore_eos=True, editing_threshold=0.2, cfg_scale=1.0
    )
    plain = dataclasses.replace(params, editing_threshold=None)
    (edited,), (without,) = (model.llm.generate(PROMPTS[1], p, use_tqdm=False) for p in (params, plain))
    assert edited.outputs[0].token_ids != without.outputs[0].token_ids
    assert edited.metrics.nfe > without.metrics.nfe


def test_logits_that_are_not_finite_where_nothing_is_masked(model, monkeypatch):
    """They end the request as they do elsewhere."""
    runner, made = model.llm.engine.runner, []
    right = runner.model.logits

    def wrong(attended, residual, rows):
        made.append(len(rows))
        return right(attended, residual, rows).fill_(torch.nan) if len(made) > 12 else right(attended, residual, rows)

    monkeypatch.setattr(runner.model, "logits", wrong)
    params = SamplingParams(mode=model.mode, max_tokens=8, block_length=B, editing_threshold=0.0, max_post_steps=40)
    with pytest.raises(FloatingPointError):
        model.llm.generate(PROMPTS[2], params, use_tqdm=False)


def test_another_token_must_be_more_certain_than_the_threshold():
    """The first is as certain as that, the second more, the third less; the fourth is not finite."""
    tokens = torch.tensor([[5, 6, 7, 8, 9], [0] * 5])
    options = torch.zeros(2, len(SlotOptions._fields), dtype=torch.int64)
    state = SlotState(tokens, torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, dtype=torch.bool), options)
    others, sure = torch.tensor([0.25, 0.24, 0.9, 0.24]), torch.tensor([True, True, True, False])
    predicted = Confidence(torch.tensor([15, 16, 17, 18]), others, torch.zeros(4), sure)
    rows = [EditedRow(i, 0, i + 1, i, 3, 0.75, 0, 0.0) for i in range(4)]
    edit(rows, 4, state, lambda *asked: predicted)
    assert state.tokens[0].tolist() == [5, 6, 16, 8, 9] and state.broken.tolist() == [True, False]


def test_when_a_block_is_finished():
    def ends(*steps, most=16, first=0):
        edits, done = BlockEdits(first), []
        for step in steps:
            edits, finished = edits.after_step(step, most)
            done.append(finished)
        return done

    assert ends((1, None), (1, 2), (1, 2)) == [False, False, True]
    assert ends((1, 2), (1, 3), (1, 2), (1, 2)) == [False, False, False, True]
    assert ends((1, 2), (1, 3), (1, 2), (1, 3), most=2) == [False, False, True, True]
    assert ends((1, None), (1, 2), most=0) == [False, True]
    # a mask token that the prompt has
    assert ends((None, 2), (None, 2), first=1) == [False, True]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"editing_threshold": 1.5}, "editing_threshold must be between 0.0 and 1.0, got 1.5"),
        ({"editing_threshold": "on"}, "editing_threshold must be a finite number, got 'on'"),
        ({"max_post_steps": 3}, "max_post_steps=3 is of editing, and editing_threshold is None"),
        ({"editing_threshold": 0.9, "max_post_steps": -1}, "max_post_steps must be at least 0, got -1"),
        ({"editing_threshold": 0.9, "logprobs": 1}, "logprobs are of the step that reveals a token"),
        ({"editing_threshold": 0.9, "block_add_threshold": 0.5}, "tokens are edited in one block at a time"),
        ({"unmasking": "scheduled_threshold", "factor": 1.0}, "unmasking 'scheduled_threshold' does not read factor"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_masked_spans_are_not_edited(model):
    if model.aligned:
        pytest.skip("a block-causal model fills none")
    spans = {"prompt_token_ids": [1, MASK, 2], "infill": True}
    with pytest.raises(ValueError, match="what fills masked spans is not edited, got editing_threshold=0.9"):
        model.llm.generate(spans, SamplingParams(mode="vanilla", editing_threshold=0.9), use_tqdm=False)
