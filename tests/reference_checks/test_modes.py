"""The reference's modes, each checked against one forward under a mask."""

import math

import pytest
import torch

from tests.reference import MODES, Reference, predict, quota_at, reveal
from tests.reference_checks.inputs import MASK, RULES, SHAPES, prompts


def test_vanilla_one_block_one_token_a_step(model):
    """LLaDA's standard decoding as a loop of five lines."""
    for prompt in prompts(5, seed=1):
        x = prompt + [MASK] * 12
        while MASK in x[len(prompt) :]:
            p = torch.cat([model.logits(x)[:, :MASK], model.logits(x)[:, MASK + 1 :]], dim=1).softmax(-1)
            confidence, column = p.max(-1)
            i = max((i for i in range(len(prompt), len(x)) if x[i] == MASK), key=lambda i: confidence[i])
            x[i] = int(column[i]) + (int(column[i]) >= MASK)
        result = model.generate(prompt, mode="vanilla", max_tokens=12, block_length=12)
        assert result.token_ids == x[len(prompt) :] and result.steps == result.nfe == 12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", list(MODES))
def test_every_step_equals_one_forward_under_a_mask(folders, mode, shape):
    """Each mode as an attention pattern over rows, without a cache: stale K/V are rows of the canvas as it was.

    Every step of a greedy run is predicted again this way, and must reveal the same tokens at the same positions.
    """
    model, length = Reference(folders[shape]), 5
    prompt = prompts(1, seed=4)[0]
    P = len(prompt)
    result = model.generate(prompt, mode=mode, max_tokens=14, block_length=length)
    canvas = prompt + [MASK] * 14
    for steps in result.blocks:
        start = min(i for step in steps for i in step.revealed) + P
        end = min(start + length, len(canvas))
        stale = list(canvas)
        for step in steps:
            tokens, positions, sees = rows_and_mask(mode, stale, canvas, P, start, end, length)
            first = (
                len(tokens) - 1 - positions.tolist()[::-1].index(start)
            )  # the block's row of this step, not a stale one
            logits = masked_logits(model, tokens, positions, sees)[first : first + end - start]
            masked = [i for i in range(start, end) if canvas[i] == MASK]
            settings = result.settings
            predicted = predict(logits[[i - start for i in masked]], [i - P for i in masked], 0, model.config, settings)
            chosen, _ = reveal(predicted, 1, False, settings)
            assert [masked[i] - P for i in chosen] == step.revealed
            for i in chosen:
                canvas[masked[i]] = predicted.tokens[i]
        assert canvas[P:end] == result.tokens[: end - P]


def rows_and_mask(mode, stale, canvas, P, start, end, length):
    """Tokens and positions of the rows, and which row (second axis) each row sees; the last rows are the step's own."""
    if mode == "vanilla":
        old, new = range(0), range(len(canvas))
    elif mode == "prefix_cache":
        old, new = range(len(canvas)), range(start, len(canvas))
    elif mode == "dual_cache":
        old, new = range(len(canvas)), range(start, end)
    else:
        old, new = range(start if mode == "block" else end), range(start, end)
    tokens = [stale[i] for i in old] + [canvas[i] for i in new]
    return tokens, torch.tensor([*old, *new]), sight(old, new, [P, length] if mode == "block" else None)


def sight(old: range, new: range, staircase: list[int] | None) -> torch.Tensor:
    """Which row (second axis) each row sees: the old ones, held from before, and those of a step that replaces some.

    With a staircase (the first block's start, block_length) each old block sees what is up to its own end.
    """
    sees = torch.ones(len(old) + len(new), len(old) + len(new), dtype=torch.bool)
    sees[: len(old), len(old) :] = False  # what was computed before knows nothing of what came later
    if staircase:
        P, length = staircase
        level = torch.tensor([0 if i < P else 1 + (i - P) // length for i in old] or [0])
        sees[: len(old), : len(old)] = level[:, None] >= level[None, :]
    for column, i in enumerate(old):
        sees[len(old) :, column] = i not in new
    return sees


def masked_logits(model: Reference, tokens: list[int], positions: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    """The whole model with torch's own attention under a mask."""
    x = model.weights["wte.weight"][torch.tensor(tokens)]
    D = model.config["d_model"] // model.config["n_heads"]
    for layer in range(model.config["n_layers"]):
        name = f"blocks.{layer}."
        h = model.norm(x, name + "attn_norm")
        q, k, v = (model.linear(h, name + p).view(len(tokens), -1, D) for p in ["q_proj", "k_proj", "v_proj"])
        q, k = model.rope(q, positions), model.rope(k, positions)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=sees, enable_gqa=True
        )
        x = x + model.linear(attended.transpose(0, 1).flatten(1), name + "attn_out")
        h = model.norm(x, name + "ff_norm")
        gate = torch.nn.functional.silu(model.linear(h, name + "ff_proj"))
        x = x + model.linear(gate * model.linear(h, name + "up_proj"), name + "ff_out")
    return model.head(model.norm(x, "ln_f"))


def test_modes_differ_where_they_approximate(model):
    """Same first step everywhere but in the modes that drop the suffix; different tokens in the end for each pair."""
    outputs = {mode: [] for mode in MODES}
    for prompt in prompts(12, seed=5):
        for mode in MODES:
            outputs[mode].append(model.generate(prompt, mode=mode, max_tokens=21, block_length=7).tokens)
    names = list(MODES)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            same = sum(x == y for x, y in zip(outputs[a], outputs[b], strict=True))
            assert same < 10, f"{a} and {b} agree on {same} of 12"


@pytest.mark.parametrize("shape", ["dense", "gqa"])
def test_modes_agree_where_nothing_is_approximated(folders, shape):
    """One block of all max_tokens in one step: every mode is one full forward, `block` but for the prompt's K/V."""
    reference = Reference(folders[shape])
    for prompt in prompts(4, seed=6):
        one = dict(max_tokens=6, block_length=6, denoising_steps=1)
        full = [reference.generate(prompt, mode=mode, **one).tokens for mode in MODES if mode != "block"]
        assert all(tokens == full[0] for tokens in full)
        whole = dict(max_tokens=6, block_length=6)
        vanilla = reference.generate(prompt, mode="vanilla", **whole)
        assert vanilla.tokens == reference.generate(prompt, mode="vanilla", max_tokens=6, block_length=64).tokens


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["block", "block_refresh"])
def test_whole_blocks_do_not_depend_on_max_tokens(model, mode, rule):
    for prompt in prompts(3, seed=8):
        common = dict(mode=mode, unmasking=rule, block_length=6, threshold=0.4, temperature=0.5, seed=3)
        short, long = (model.generate(prompt, max_tokens=n, **common).tokens for n in (15, 23))
        assert short[:12] == long[:12]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("denoising_steps", [None, 1, 3, 50])
def test_every_position_is_revealed_once_in_its_block(model, mode, rule, denoising_steps):
    settings = dict(mode=mode, unmasking=rule, denoising_steps=denoising_steps, max_tokens=19, block_length=8)
    result = model.generate(prompts(1, seed=9)[0], threshold=0.5, factor=1.5, entropy_bound=1.0, **settings)
    assert len(result.tokens) == 19 and MASK not in result.tokens and len(result.blocks) == 3
    for index, steps in enumerate(result.blocks):
        n = min(8, 19 - 8 * index)
        assert sorted(i for step in steps for i in step.revealed) == list(range(8 * index, 8 * index + n))
        assert all(step.revealed for step in steps)
        limit = n if denoising_steps is None else min(n, math.ceil(denoising_steps * n / 8))
        if rule in ("low_confidence", "random", "sequential"):
            assert [len(step.revealed) for step in steps] == [quota_at(s, n, limit) for s in range(limit)]
        else:
            assert len(steps) <= limit
    assert result.nfe == sum(len(steps) for steps in result.blocks)


@pytest.mark.parametrize("mode", list(MODES))
def test_thresholds_that_reveal_one_some_and_all(model, mode):
    prompt = prompts(1, seed=10)[0]
    steps = {
        threshold: model.generate(
            prompt, mode=mode, unmasking="threshold", threshold=threshold, max_tokens=16, block_length=8
        ).steps  # fmt: skip
        for threshold in (0.0, 0.5, 1.0)
    }
    assert steps[0.0] == 2 and steps[1.0] == 16 and 2 < steps[0.5] < 16


def test_stops_are_looked_at_when_the_block_is_complete(model):
    prompt = prompts(1, seed=11)[0]
    free = model.generate(prompt, max_tokens=24, block_length=8)
    stops = tuple(free.tokens[9:12])
    first = next(i for i, token in enumerate(free.tokens) if token in stops)
    result = model.generate(prompt, max_tokens=24, block_length=8, stop_ids=stops)
    assert (result.finish_reason, result.stop_reason) == ("stop", free.tokens[first])
    assert result.token_ids == free.tokens[:first]
    assert result.tokens == free.tokens[: (first // 8 + 1) * 8] and result.steps == len(result.tokens)
    assert (free.finish_reason, free.stop_reason, free.token_ids) == ("length", None, free.tokens)


def test_noise_depends_on_the_seed_alone(model):
    prompt, common = prompts(1, seed=12)[0], dict(max_tokens=12, block_length=6, temperature=1.0)
    a, b, c = (model.generate(prompt, seed=seed, **common).tokens for seed in (1, 1, 2))
    assert a == b != c


def test_a_mask_token_in_the_prompt_stays(model):
    prompt = [3, MASK, 7, MASK]
    result = model.generate(prompt, mode="vanilla", max_tokens=4, block_length=4)
    assert len(result.tokens) == 4 and MASK not in result.tokens
