"""The reference, its checkpoints and the comparison, each checked against something still plainer."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests import comparison
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.reference import (
    MODES,
    Prediction,
    Reference,
    Result,
    Settings,
    Step,
    by_entropy,
    by_factor,
    by_threshold,
    philox4x32,
    predict,
    quota_at,
    reveal,
    step_limit,
    uniform,
)

RULES = ["low_confidence", "random", "sequential", "threshold", "factor", "entropy"]
MASK = 57
EOS, EOT = 56, 60
SHAPES = {
    "dense": dict(),
    "gqa": dict(n_kv_heads=2, seed=1),
    "tied": dict(weight_tying=True, n_kv_heads=1, seed=2),
    "wide": dict(embedding_size=64, d_model=48, seed=3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write_checkpoint(root / name, **shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def model(folders):
    return Reference(folders["dense"])


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 55, draw.integers(1, longest + 1)).tolist() for _ in range(count)]


# --- the model ---


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_scalar_loops(folders, shape):
    """The published formulas once more, in numpy float64, one position and one head at a time."""
    config = json.loads((folders[shape] / "config.json").read_text())
    weights = {k.removeprefix("model.transformer."): v.double().numpy() for k, v in load_all(folders[shape]).items()}
    tokens = prompts(1, seed=7, longest=9)[0] + [MASK] * 3
    heads, kv_heads = config["n_heads"], config["n_kv_heads"]
    D = config["d_model"] // heads

    def rms(x, name):
        return x / math.sqrt(float(x @ x) / len(x) + 1e-5) * weights[name + ".weight"]

    def turn(x, position):
        pairs = [(x[i], x[i + D // 2], position * 500000.0 ** (-2 * i / D)) for i in range(D // 2)]
        return np.array([a * math.cos(t) - b * math.sin(t) for a, b, t in pairs]
                        + [b * math.cos(t) + a * math.sin(t) for a, b, t in pairs])  # fmt: skip

    rows = [weights["wte.weight"][token] for token in tokens]
    for layer in range(config["n_layers"]):
        w = {n: weights[f"blocks.{layer}.{n}.weight"] for n in
             ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]}  # fmt: skip
        normed = [rms(x, f"blocks.{layer}.attn_norm") for x in rows]
        after_attention = []
        for position, x in enumerate(rows):
            outputs = []
            for head in range(heads):
                own, shared = slice(head * D, head * D + D), head // (heads // kv_heads)
                theirs = slice(shared * D, shared * D + D)
                q = turn((w["q_proj"] @ normed[position])[own], position)
                ks = [turn((w["k_proj"] @ h)[theirs], i) for i, h in enumerate(normed)]
                e = np.array([math.exp(float(q @ k) / math.sqrt(D)) for k in ks])
                outputs.append(sum(e[i] / e.sum() * (w["v_proj"] @ h)[theirs] for i, h in enumerate(normed)))
            after_attention.append(x + w["attn_out"] @ np.concatenate(outputs))
        rows = []
        for x in after_attention:
            h = rms(x, f"blocks.{layer}.ff_norm")
            gate = w["ff_proj"] @ h
            rows.append(x + w["ff_out"] @ (gate / (1 + np.exp(-gate)) * (w["up_proj"] @ h)))
    head = weights["wte.weight" if config["weight_tying"] else "ff_out.weight"]
    expected = np.array([head @ rms(x, "ln_f") for x in rows])
    np.testing.assert_allclose(Reference(folders[shape]).logits(tokens).numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_close_to_float64(folders, shape):
    exact, single = Reference(folders[shape]), Reference(folders[shape], dtype=torch.float32)
    for tokens in prompts(4, longest=100):
        torch.testing.assert_close(single.logits(tokens).double(), exact.logits(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_checkpoints_spread_their_confidences(folders, shape):
    """Neither flat nor saturated, few near-ties, many different tokens: or an equality of tokens would say little."""
    reference, confidence, margins, tokens = Reference(folders[shape]), [], [], set()
    for prompt in prompts(12, seed=3):
        logits = reference.logits(prompt + [MASK] * 16)[len(prompt) :]
        confidence += predict(logits, list(range(16)), 0, reference.config, Settings()).confidence
        result = reference.generate(prompt, max_tokens=16, block_length=8)
        margins += [step.margin for block in result.blocks for step in block]
        tokens |= set(result.tokens)
    low, middle, high = np.quantile(confidence, [0.1, 0.5, 0.9])
    assert 0.1 < low < 0.4 < middle + 0.15 < 0.85 < high + 0.2 and max(confidence) < 0.9999
    assert np.mean(np.array(margins) < comparison.NEAR_TIE) < 0.02
    assert len(tokens) >= 15


def load_all(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_shards_hold_the_same_tensors(tmp_path, shards):
    sharded = write_checkpoint(tmp_path / "sharded", shards=shards, n_kv_heads=2)
    whole = write_checkpoint(tmp_path / "whole", n_kv_heads=2)
    assert len(list(sharded.glob("*.safetensors"))) == shards
    a, b = load_all(sharded), load_all(whole)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert len(a) == 3 + 9 * 2
    if shards > 1:
        index = json.loads((sharded / "model.safetensors.index.json").read_text())
        assert {
            name: tensor.shape
            for name, tensor in load_file(sharded / index["weight_map"]["model.transformer.wte.weight"]).items()
        }
        for name, file in index["weight_map"].items():
            assert name in load_file(sharded / file)


@pytest.mark.parametrize("vocab_size", [61, 400])
def test_tokenizer_loads_and_has_llada_s_tokens(tmp_path, vocab_size):
    folder = write_checkpoint(tmp_path, vocab_size=vocab_size)
    special = write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert tokenizer.convert_tokens_to_ids(list(special)) == list(special.values())
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (vocab_size - 5, vocab_size - 6)
    bos, *ids = tokenizer("hello there")["input_ids"]
    assert (
        bos == special["<|startoftext|>"]
        and len(ids) == 11
        and max(ids) < vocab_size - 6
        and tokenizer.decode(ids) == "hello there"
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": " hi "}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    chat = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat[0] == special["<|startoftext|>"] and chat.count(special["<|start_header_id|>"]) == 2


# --- the generator ---


@pytest.mark.parametrize(
    "key, counter, words",
    [  # Random123's kat_vectors, philox4x32 10
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(key, counter, words):
    assert [f"{int(word):08x}" for word in philox4x32(key, counter)] == words.split()


def test_uniforms_are_the_first_53_bits():
    assert float(uniform(0, 0, 0, 0, 0)) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


def test_uniforms_use_every_coordinate():
    base = dict(seed=5, vocabulary_id=3, position=2, step=1, purpose=0)
    changes = [
        {},
        dict(seed=6),
        dict(seed=5 + 2**32),
        dict(vocabulary_id=4),
        dict(position=3),
        dict(step=2),
        dict(purpose=1),
    ]
    drawn = {float(uniform(**base | change)) for change in changes}
    assert len(drawn) == len(changes)
    many = uniform(0, np.arange(1000), np.arange(50)[:, None], 0, 0)
    assert many.min() > 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.01 and abs(many.var() - 1 / 12) < 0.002


def test_sampling_follows_the_softmax(model):
    logits = model.logits(prompts(1, seed=2)[0] + [MASK])[-1:]
    settings = Settings(temperature=1.0, seed=11)
    drawn = predict(logits.expand(20000, -1), list(range(20000)), 0, model.config, settings)
    counts = np.bincount(drawn.tokens, minlength=61) / 20000
    logits[:, MASK] = -math.inf
    expected = logits.softmax(-1)[0].numpy()
    assert np.abs(counts - expected).max() < 0.02
    assert drawn.confidence[0] == pytest.approx(expected[drawn.tokens[0]], rel=1e-6)  # without the noise


# --- the rules, on hand-made confidences ---


def test_schedule():
    assert [quota_at(step, 8, 3) for step in range(3)] == [3, 3, 2]
    assert step_limit(5, Settings(block_length=8, denoising_steps=4)) == 3  # ceil(4 * 5 / 8)
    assert step_limit(8, Settings(block_length=8, denoising_steps=100)) == 8
    assert step_limit(8, Settings(block_length=8)) == 8
    assert step_limit(8, Settings(block_length=8, unmasking="entropy")) is None


def test_threshold_rule():
    confidence = [0.5, 0.9, 0.3, 0.7]
    assert by_threshold([float(np.float32(0.7)), 0.1, 0.8], 0.7)[0] == [0, 2]  # at least, not above, at float32
    assert by_threshold(confidence, 0.6) == ([1, 3], pytest.approx(0.1))
    assert by_threshold(confidence, 0.95)[0] == [1]
    assert by_threshold(confidence, 0.0)[0] == [0, 1, 2, 3]
    assert by_threshold([0.4, 0.4], 0.5) == ([0], 0.0)
    assert by_threshold([-math.inf, -math.inf], 0.5)[0] == [0]


def test_factor_rule():
    # bars for factor 1: -, 2/3, 3/4, 4/5
    assert by_factor([0.1, 0.7, 0.8, 0.76], 1.0)[0] == [2, 3]  # 0.8, 0.76 >= 2/3, 0.7 < 3/4
    assert by_factor([0.99, 0.9, 0.95, 0.85], 1.0)[0] == [0, 2, 1, 3]
    assert by_factor([0.99, 0.9, 0.95, 0.79], 1.0)[0] == [0, 2, 1]  # failing at the last index is failing
    assert by_factor([0.2, 0.1], 1.0)[0] == [0]
    assert by_factor([0.2, 0.1, 0.05], 4.0)[0] == [0, 1, 2]
    assert by_factor([-math.inf, 0.9, -math.inf], 100.0)[0] == [1]


def test_entropy_rule():
    assert by_entropy([0.3, 0.05, 0.2, 0.02], 0.15)[0] == [3, 1, 2]  # .02 + .05 <= .15, + .2 is not
    assert by_entropy([0.3, 0.05, 0.2, 0.02], 0.0)[0] == [3]
    assert by_entropy([0.3, 0.05, 0.2, 0.02], 9.0)[0] == [3, 1, 2, 0]
    assert by_entropy([math.inf, 0.01], 9.0)[0] == [1]
    assert by_entropy([math.inf, math.inf], 9.0)[0] == [0]


def test_margins_on_hand_made_confidences():
    settings = Settings(unmasking="low_confidence")
    predicted = Prediction([1, 2, 3], [0.5, 0.004, 0.001], [0.6, 0.59, 0.2], [0.0] * 3)
    assert reveal(predicted, 1, False, settings) == ([0], pytest.approx(0.01))
    assert reveal(predicted, 2, False, settings) == ([0, 1], 0.004)  # the third token's own gap is not at stake
    sampled = dataclasses.replace(settings, temperature=1.0)
    assert reveal(predicted, 2, False, sampled) == ([0, 1], 0.001)
    assert reveal(predicted, 2, True, settings) == ([0, 1, 2], 0.001)


@pytest.mark.parametrize("count, top", [(1, math.inf), (3, math.inf), (60, -math.inf)])
def test_infinite_logits_share_the_confidence(model, count, top):
    logits = torch.full((1, 61), -math.inf, dtype=torch.float64)
    logits[0, 10 : 10 + count] = top
    logits[0, MASK], logits[0, 5] = math.inf, math.nan
    predicted = predict(logits, [0], 0, model.config, Settings())
    assert predicted.tokens == [10 if top > 0 else 0] and predicted.confidence == [pytest.approx(1 / count)]
    assert predicted.entropy == [pytest.approx(math.log(count), abs=1e-6)]


def test_ids_that_do_not_compete(folders):
    """The mask id and columns from vocab_size on win nothing, however large; nor does eos with its logits at -inf."""
    reference = Reference(folders["wide"])
    logits = torch.zeros(1, 64, dtype=torch.float64)
    logits[0, 8], logits[0, EOS], logits[0, MASK], logits[0, 61:] = 1.0, 2.0, 50.0, 90.0
    predicted = predict(logits, [0], 0, reference.config, Settings(eos_ids=(EOS,)))
    assert predicted.tokens == [EOS]
    assert predicted.confidence == [pytest.approx(math.e**2 / (math.e**2 + math.e + 58))]
    suppressed = Settings(eos_ids=(EOS,), logits_eos_inf=True)
    assert predict(logits, [0], 0, reference.config, suppressed).tokens == [8]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "sequential"])
def test_eos_and_eot_are_revealed_last(rule):
    predicted = Prediction([EOS, 3, EOT], [1.0] * 3, [-math.inf, 0.1, -math.inf], [math.inf, 2.0, math.inf])
    settings = Settings(unmasking=rule, threshold=0.0, factor=50.0, entropy_bound=50.0)
    assert reveal(predicted, 1, False, settings)[0] == [1]
    only_held = Prediction([EOS, EOT], [1.0] * 2, [-math.inf] * 2, [math.inf] * 2)
    assert reveal(only_held, 1, False, settings)[0] == [0]


# --- decoding ---


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
    level = torch.tensor([0 if i < P else 1 + (i - P) // length for i in old] or [0])
    sees = torch.ones(len(old) + len(new), len(old) + len(new), dtype=torch.bool)
    sees[: len(old), len(old) :] = False  # what was computed before knows nothing of what came later
    if mode == "block":
        sees[: len(old), : len(old)] = level[:, None] >= level[None, :]
    for column, i in enumerate(old):
        sees[len(old) :, column] = i not in new
    tokens = [stale[i] for i in old] + [canvas[i] for i in new]
    return tokens, torch.tensor([*old, *new]), sees


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


# --- the comparison ---


@dataclasses.dataclass
class Output:
    token_ids: list[int]
    finish_reason: str = "length"
    stop_reason: int | None = None


def result_with(margins: list[float], max_tokens: int = 4, stop_ids=(9,)) -> Result:
    """Two blocks of two, tokens 1 2 3 4, revealed in the order 1, 0, 2, 3, with the given margins."""
    settings = Settings(max_tokens=max_tokens, block_length=2, stop_ids=stop_ids)
    steps = [Step([i], margin) for i, margin in zip([1, 0, 2, 3], margins, strict=True)]
    return Result(settings, [1, 2, 3, 4], [1, 2, 3, 4], blocks=[steps[:2], steps[2:]])


def test_equal_outputs_pass():
    comparison.assert_equivalent([(result_with([1.0] * 4), Output([1, 2, 3, 4]))])


@pytest.mark.parametrize("margin", [0.0, 1e-4])
@pytest.mark.parametrize(
    "output",
    [
        Output([1, 2, 3, 5]),
        Output([8, 2, 3, 4]),
        Output([1, 2, 3]),
        Output([1, 2, 3, 4, 4]),
        Output([1, 2, 3], "stop", 9),
        Output([1, 2, 3, 4], "stop", 9),
        Output([1, 2, 3, 4], "stop", 4),
        Output([], "length"),
    ],
)
def test_a_wrong_output_fails(output, margin):
    pairs = [(result_with([1.0] * 4), Output([1, 2, 3, 4]))] * 200
    with pytest.raises(AssertionError, match="1 of 201 sequences differ"):
        comparison.assert_equivalent([*pairs, (result_with([1.0] * 4), output)], margin=margin)


@pytest.mark.parametrize(
    "margins, output, passes",
    [
        ([1e-5, 1, 1, 1], Output([1, 5, 6, 7]), True),  # all that follows a near-tie may differ
        ([1e-5, 1, 1, 1], Output([5, 2, 6, 7]), True),  # an earlier step of the block was the near-tie
        ([1, 1e-5, 1, 1], Output([5, 2, 6, 7]), True),
        ([1, 1e-5, 1, 1], Output([1, 5, 6, 7]), False),  # a later step does not excuse an earlier one
        ([1, 1e-5, 1, 1], Output([5, 5, 3, 4]), False),
        ([1e-5, 1, 1, 1], Output([1, 2, 3, 5]), False),  # nor does another block
        ([1, 1, 1, 1e-5], Output([1, 2, 3], "stop", 9), True),
        ([1, 1, 1, 1e-5], Output([1, 2], "stop", 9), False),
        ([1, 1, 1e-5, 1], Output([1, 2], "stop", 9), True),
        ([1e-5] * 4, Output([1, 2], "stop", 8), False),  # 8 is no stop
        ([1e-5] * 4, Output([1, 2, 3]), False),  # too short is no near-tie
        ([1e-5] * 4, Output([1, 9, 5, 5]), True),  # the caller says whether a stop in the middle is one
    ],
)
def test_near_ties(margins, output, passes):
    expected = result_with(margins)
    found = comparison.difference(expected, output)
    assert (found.margin < comparison.NEAR_TIE) is passes
    pairs = [(result_with([1.0] * 4), Output([1, 2, 3, 4]))] * 100
    if passes:
        comparison.assert_equivalent([*pairs, (expected, output)], margin=comparison.NEAR_TIE)
    with pytest.raises(AssertionError):
        comparison.assert_equivalent([*pairs, (expected, output)])
    with pytest.raises(AssertionError):
        comparison.assert_equivalent([*pairs[:98], (expected, output)], margin=comparison.NEAR_TIE)


def test_a_genuine_near_tie_passes(tmp_path, folders):
    """Two vocabulary rows of the LM head almost the same: the reference says by how little it chose."""
    tensors = load_all(folders["dense"])
    head = tensors["model.transformer.ff_out.weight"]
    prompt = prompts(1, seed=13)[0]
    a = Reference(folders["dense"]).generate(prompt, max_tokens=1, block_length=1).tokens[0]
    b = next(i for i in range(55) if i != a)
    head[b] = head[a]
    head[b, 0] += 1e-6
    write_checkpoint(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    tied = Reference(tmp_path).generate(prompt, max_tokens=1, block_length=1)
    assert tied.tokens[0] in (a, b) and 0 < tied.blocks[0][0].margin < comparison.NEAR_TIE
    other = Output([a + b - tied.tokens[0]])
    unrelated = Output([next(i for i in range(55) if i not in (a, b))])
    pairs = [(tied, Output(tied.token_ids))] * 100
    comparison.assert_equivalent([*pairs, (tied, other)], margin=comparison.NEAR_TIE)
    with pytest.raises(AssertionError):
        comparison.assert_equivalent([*pairs, (tied, other)])
    assert comparison.difference(tied, unrelated).got != tied.tokens[0]
