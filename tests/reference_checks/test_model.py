"""The reference and its checkpoints, each checked against something still plainer."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests import comparison
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.reference import Reference, Settings, predict
from tests.reference_checks.inputs import MASK, SHAPES, load_all, prompts


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
        confidence += [1 + score for score in predict(logits, list(range(16)), 0, reference.config, Settings()).scores]
        result = reference.generate(prompt, max_tokens=16, block_length=8)
        margins += [step.margin for block in result.blocks for step in block]
        tokens |= set(result.tokens)
    low, middle, high = np.quantile(confidence, [0.1, 0.5, 0.9])
    assert 0.1 < low < 0.4 < middle + 0.15 < 0.85 < high + 0.2 and max(confidence) < 0.9999
    assert np.mean(np.array(margins) < comparison.NEAR_TIE) < 0.02
    assert len(tokens) >= 15


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
