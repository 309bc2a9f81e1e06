"""iLLaDA: the published names and ids, and the logits of a second implementation."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockinfer import LLM, SamplingParams
from blockinfer.models.registry import SHAPES, model_class, published, read_model_config
from tests.families.checkpoints import ILLADA, write_family, write_tokenizer
from tests.families.forward import logits_of, relative_error
from tests.families.networks import ILLaDANetwork

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def drawn(length, seed=0, size=61):
    return random.Random(seed).choices(range(size), k=length)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(tie_word_embeddings=False, shards=3, seed=1),
        dict(num_key_value_heads=1, num_hidden_layers=3, rope_theta=1e6, seed=2),
        dict(num_key_value_heads=4, intermediate_size=40, rms_norm_eps=1e-2, seed=3),
    ],
)
def test_logits_are_the_second_implementation_s(tmp_path, options):
    folder = write_family(tmp_path, ILLADA, **options)
    tokens = drawn(37)
    for name, dtype, error in (("float32", torch.float32, 1e-5), ("float64", torch.float64, 1e-12)):
        with LLM(folder, device="cpu", dtype=name) as llm:
            found = logits_of(llm.engine.model, tokens)
        assert relative_error(found, ILLaDANetwork(folder, dtype).logits(tokens)) < error
    # a network that knows no positions would be far off
    assert relative_error(found, logits_of_reversed(folder, tokens)) > 0.1


def logits_of_reversed(folder, tokens):
    return ILLaDANetwork(folder, torch.float64).logits(tokens[::-1]).flip(0)


def test_bfloat16(tmp_path):
    """RoPE's tables are in the network's dtype, which tests/kernels/test_kv_store.py tells from those in float32."""
    folder = write_family(tmp_path, ILLADA, torch_dtype="bfloat16")
    tokens = drawn(50)
    with LLM(folder, device="cpu", dtype="bfloat16") as llm:
        assert llm.engine.model.cos_sin.dtype == torch.bfloat16
        found = logits_of(llm.engine.model, tokens)
    assert relative_error(found, ILLaDANetwork(folder, torch.bfloat16).logits(tokens)) < 0.03


def test_checkpoints_of_every_layout_answer_alike(tmp_path):
    """Sharded or not, with the tied head stored as well, and converted: float32 holds every value of bfloat16."""
    params = SamplingParams(max_tokens=12, block_length=4, ignore_eos=True)

    def answers(folder):
        with LLM(folder, device="cpu") as llm:
            return [o.outputs[0].token_ids for o in llm.generate([[6, 7, 8], [9]], params, use_tqdm=False)]

    plain = write_family(tmp_path / "plain", ILLADA, torch_dtype="bfloat16")
    expected = answers(plain)
    assert answers(write_family(tmp_path / "sharded", ILLADA, torch_dtype="bfloat16", shards=4)) == expected
    file = plain / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {HEAD: tensors[EMBEDDINGS].clone()}, file)
    assert answers(plain) == expected
    # a config that is silent of tying ties, as transformers' own default is
    for says in ({"tie_word_embeddings": None}, {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0}}):
        assert answers(write_family(tmp_path / "silent", ILLADA, torch_dtype="bfloat16", says=says)) == expected


def test_the_mask_token_is_5_and_eos_is_the_tokenizer_s(tmp_path):
    folder = write_family(tmp_path, ILLADA, vocab_size=300)
    with LLM(folder, device="cpu") as llm:
        assert llm.config.mask_token_id == 5 and llm.model_config.eos_token_ids == ()
    template = "{% for m in messages %}<role>{{ m.role }}</role>{{ m.content }}{% endfor %}"
    write_tokenizer(folder, {"<end>": 2, "<[MASK]>": 5}, 270, eos_token="<end>", chat_template=template)
    with LLM(folder, device="cpu") as llm:
        assert llm.config.mask_token_id == 5 and llm.engine.stop_token_ids == {2}
        (prompt,) = llm.chat_prompts([{"role": "user", "content": "hi"}])
        assert prompt["prompt"] == "<role>user</role>hi"
        assert 5 not in llm.generate("hi", SamplingParams(max_tokens=64), use_tqdm=False)[0].outputs[0].token_ids
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": 7, "eos_token_id": [8, 9]}))
    with LLM(folder, device="cpu") as llm:
        assert llm.config.mask_token_id == 7 and llm.engine.stop_token_ids == {8, 9}
    with LLM(folder, device="cpu", mask_token_id=11) as llm:
        assert llm.config.mask_token_id == 11


def test_the_published_shape():
    config = read_model_config(SHAPES["illada-8b"], "illada-8b")
    assert config.usual_mask_token_id == 5 and config.weight_tying
    assert sum(group.parameters_of(1) for group in published(config)) == 7_615_025_152
    model = model_class(config.architecture, "")(config, torch.bfloat16, torch.device("meta"), 16)
    assert model.checkpoint_tensors()["model.layers.31.mlp.down_proj.weight"].shape == (4096, 14336)


@pytest.mark.parametrize(
    "says, message",
    [
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"hidden_size": 30}, "hidden_size=30 must split into num_attention_heads=4 heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000, got 1000000000"),
        ({"num_hidden_layers": 9999}, "the config asks for num_hidden_layers=9999, and there are 20 tensors"),
        ({"num_hidden_layers": 3}, "9 missing: model.layers.2.input_layernorm.weight"),
        ({"intermediate_size": 64}, r"down_proj.weight in .* has shape \[32, 48\], the config asks for \[32, 64\]"),
        ({"attention_bias": True}, "attention_bias=True is not implemented"),
        ({"mlp_bias": True}, "mlp_bias=True is not implemented"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05 is not implemented, only None is"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented, only 'silu' is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.* is not implemented, only RoPE of type"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling=.* is not implemented"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object or null, got 'linear'"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is 10000.0, and in rope_parameters 5.0"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not implemented, only 1.0 is"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not implemented"),
        ({"head_dim": 16}, "head_dim=16 is not implemented, only hidden_size / num_attention_heads, 8, is"),
        ({"sliding_window": 64}, "sliding_window=64 is not implemented, only None is"),
        ({"quantization_config": {}}, "quantization_config={} is not implemented"),
        ({"tie_word_embeddings": False}, "1 missing: lm_head.weight"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
        ({"eos_token_id": 61}, "eos_token_id=61 is outside the 61 embeddings"),
        ({"mask_token_id": 61}, "mask_token_id=61 is outside the 61 embeddings"),
    ],
)
def test_configs_that_are_wrong(tmp_path, says, message):
    folder = write_family(tmp_path, ILLADA, says=says)
    with pytest.raises(ValueError, match=message):
        LLM(folder, device="cpu")


def test_a_stored_head_that_differs(tmp_path):
    folder = write_family(tmp_path, ILLADA)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    head = tensors[EMBEDDINGS].clone()
    head[3, 4] += 1e-3
    save_file(tensors | {HEAD: head}, file)
    with pytest.raises(ValueError, match=f"{HEAD} differs from {EMBEDDINGS}, and the config's tie_word_embeddings is"):
        LLM(folder, device="cpu")


def test_a_vocabulary_without_the_usual_mask(tmp_path):
    with pytest.raises(ValueError, match="names a mask token; pass mask_token_id"):
        LLM(write_family(tmp_path, ILLADA, vocab_size=5), device="cpu")
