"""Every wrong checkpoint gets an error that says what is wrong, where, and what was expected."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockinfer import LLM
from tests.checkpoints import write_checkpoint, write_tokenizer

WTE, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alibi": True}, "alibi=True is not implemented"),
        ({"rope": False}, "rope=False is not implemented"),
        ({"rope_full_precision": False}, "rope_full_precision=False is not implemented"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling=.* is not implemented"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters=.* is not implemented, only RoPE of"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 500000.0, and in rope_parameters 10000.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not implemented"),
        ({"include_bias": True}, "include_bias=True is not implemented"),
        ({"include_qkv_bias": True}, "include_qkv_bias=True is not implemented"),
        ({"bias_for_layer_norm": True}, "bias_for_layer_norm=True is not implemented"),
        ({"layer_norm_type": "default"}, "layer_norm_type='default' is not implemented, only 'rms' is"),
        ({"layer_norm_with_affine": False}, "layer_norm_with_affine=False is not implemented"),
        ({"attention_layer_norm": True}, "attention_layer_norm=True is not implemented"),
        ({"block_type": "sequential"}, "block_type='sequential' is not implemented, only 'llama' is"),
        ({"block_group_size": 2}, "block_group_size=2 is not implemented"),
        ({"activation_type": "gelu"}, "activation_type='gelu' is not implemented, only 'silu' is"),
        ({"input_emb_norm": True}, "input_emb_norm=True is not implemented"),
        ({"scale_logits": True}, "scale_logits=True is not implemented"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0 is not implemented"),
        ({"sliding_window": 128}, "sliding_window=128 is not implemented"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not implemented, only weights in FP8"),
        ({"compression_config": {"format": "float-quantized"}}, "compression_config=.* is not implemented"),
        ({"architectures": ["DreamModel"]}, "'DreamModel' is not implemented, only LLaDAModelLM, ILLaDAForCausalLM"),
        ({"n_layers": 10**9}, "n_layers must be at most 10000, got 1000000000"),
        ({"n_layers": 10**4}, "the config asks for n_layers=10000, and there are 21 tensors"),
        ({"d_model": 2**30}, r"attn_norm.weight in .* has shape \[32\], the config asks for \[1073741824\];"),
        (
            {"vocab_size": 2**31 - 1, "embedding_size": None},
            r"shape \[300, 32\], the config asks for \[2147483647, 32\]",
        ),
        ({"vocab_size": 10**400}, r"vocab_size must be at most 2147483647, got 1000.*\.\.\. .401 characters"),
        ({"mlp_hidden_size": 2**63}, "mlp_hidden_size must be at most 2147483647, got 9223372036854775808"),
        (
            {"max_sequence_length": 2**31 - 1},
            r"GB are free: .* GB to work with .max_num_seqs=32, max_model_len=2147483647",
        ),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number, got 1000.*401 characters"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, got nan"),
        ({"eos_token_id": 10**400}, "eos_token_id=10000.*is outside the 300 embeddings"),
        ({"architectures": None}, "architectures must be a list of one name"),
        ({"architectures": "LLaDAModelLM"}, "architectures must be a list of one name"),
        ({"d_model": None}, "config.json: d_model is missing"),
        ({"n_layers": 0}, "n_layers must be a positive integer, got 0"),
        ({"n_heads": 3}, "d_model=32 must split into n_heads=3 heads"),
        ({"n_heads": 32}, "heads of an even size"),
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"vocab_size": "300"}, "vocab_size must be a positive integer, got '300'"),
        ({"embedding_size": 200}, "embedding_size=200 is below vocab_size=300"),
        ({"max_sequence_length": None}, "max_sequence_length is missing"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, got 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number"),
        ({"weight_tying": "yes"}, "weight_tying must be true or false, got 'yes'"),
        ({"eos_token_id": -1}, "eos_token_id must be a token id"),
        ({"eos_token_id": 300}, "eos_token_id=300 is outside the 300 embeddings"),
        ({"mask_token_id": "<mask>"}, "mask_token_id must be a token id"),
        ({"mask_token_id": [4, 5]}, "mask_token_id must be one token id, got"),
        ({"mask_token_id": None}, "names a mask token; pass mask_token_id"),
        ({"torch_dtype": "float8"}, "dtype must be one of .*got 'float8'"),
        ({"torch_dtype": ["bfloat16"]}, "dtype must be one of .*got .'bfloat16'."),
        ({"weight_tying": []}, "weight_tying must be true or false, got"),
        ({"n_layers": 3}, "9 missing: model.transformer.blocks.2.attn_norm.weight"),
        ({"n_layers": 1}, "9 unexpected: model.transformer.blocks.1.attn_norm.weight"),
        ({"weight_tying": True}, "model.transformer.ff_out.weight differs from model.transformer.wte.weight, and"),
        ({"mlp_hidden_size": 64}, r"ff_out.weight in model.safetensors has shape \[32, 48\], the config asks for"),
        ({"n_kv_heads": 2}, r"k_proj.weight in model.safetensors has shape \[32, 32\], the config asks for \[16, 32\]"),
        (
            {"vocab_size": 250, "embedding_size": 250, "eos_token_id": 1, "mask_token_id": 2},
            "the tokenizer of .* has 262 tokens, the model's vocab_size is only 250",
        ),
        ({"vocab_size": 261}, "the tokenizer of .* has 262 tokens, the model's vocab_size is only 261"),
    ],
)
def test_configs(checkpoint, tmp_path, change, message):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        LLM(tmp_path, device="cpu")


def _strange_id(path):
    content = json.loads(path.read_text())
    content["model"]["vocab"]["a"] = 5_000_000
    path.write_text(json.dumps(content))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _edit(change):
    def edit(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("config.json", lambda p: p.unlink(), "there is no config.json; a checkpoint in the Hugging Face format"),
        ("config.json", lambda p: p.write_text("{"), "config.json: not valid JSON"),
        ("generation_config.json", lambda p: p.write_text("{"), "generation_config.json: not valid JSON"),
        ("generation_config.json", lambda p: p.write_text('{"eos_token_id": "</s>"}'), "eos_token_id must be a token "),
        ("generation_config.json", lambda p: p.write_text('{"eos_token_id": [1, 300]}'), "=300 is outside the 300 emb"),
        ("config.json", lambda p: p.write_text("[]"), "a JSON object is expected, got list"),
        ("config.json", lambda p: p.write_text("[" * 10**5), "config.json: not valid JSON: it is nested too deeply"),
        ("config.json", lambda p: p.write_bytes(b"\xff"), "config.json: not valid JSON: 'utf-8' codec can't decode"),
        ("config.json", lambda p: p.write_text('{"a": ' + "1" * 5000 + "}"), "config.json: not valid JSON: Exceeds"),
        (
            "config.json",
            lambda p: os.truncate(p, 10**8 + 1),
            "config.json: 100000001 bytes, more than the 100000000 of",
        ),
        ("tokenizer.json", lambda p: p.write_text("[" * 10**5), "the tokenizer cannot be loaded: maximum recursion"),
        ("tokenizer.json", _strange_id, "has a token of id 5000000, the model's vocab_size is only 300"),
        (
            "tokenizer_config.json",
            lambda p: p.write_text("[" * 10**5),
            "_config.json: not valid JSON: it is nested too",
        ),
        (
            "tokenizer_config.json",
            lambda p: p.write_text("[]"),
            "tokenizer_config.json: a JSON object is expected, got",
        ),
        (
            "tokenizer_config.json",
            lambda p: p.write_text('{"fast_tokenizer_files": ["tokenizer.json", "../x/tokenizer.4.0.0.json"]}'),
            r"fast_tokenizer_files must be plain file names, got \['tokenizer.json', '../x/",
        ),
        (
            "tokenizer_config.json",
            lambda p: p.write_text('{"eos_token": 5}'),
            "the tokenizer cannot be loaded: Special",
        ),
        ("tokenizer.json", lambda p: p.write_text("{}"), "the tokenizer cannot be loaded"),
        ("model.safetensors", lambda p: p.unlink(), "there is neither model.safetensors nor"),
        ("model.safetensors", _truncate, "model.safetensors: not a whole safetensors file"),
        ("model.safetensors", lambda p: p.write_bytes(p.read_bytes() + b"12"), "not a whole safetensors file ."),
        ("model.safetensors", lambda p: p.write_bytes(b""), "safetensors: not a whole safetensors"),
        ("model.safetensors", lambda p: p.write_bytes(b"x" * 1000), "not a whole safetensors file"),
        ("model.safetensors", _edit(lambda t: t.pop(WTE)), f"1 missing: {WTE}"),
        ("model.safetensors", _edit(lambda t: t.update(extra=torch.zeros(1))), "1 unexpected: extra"),
        ("model.safetensors", _edit(lambda t: t.update({WTE: t[WTE][:-1]})), r"shape \[299, 32\], the config asks for"),
        (
            "model.safetensors",
            _edit(lambda t: t.update({WTE: t[WTE].to(torch.int8)})),
            "dtype I8, which is not",
        ),
        (
            "model.safetensors",
            _edit(lambda t: t[WTE][7].fill_(torch.nan)),
            f"{WTE} has values that are NaN or infinite",
        ),
        (
            "model.safetensors",
            _edit(lambda t: t[WTE][7].fill_(-torch.inf)),
            "that are NaN or infinite in torch.float32",
        ),
    ],
)
def test_damaged_files(checkpoint, tmp_path, file, damage, message):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path / file)
    with pytest.raises(ValueError, match=message):
        LLM(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
            "named in .*but there is no such file",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "not a safetensors index with a weight_map"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
            "its safetensors hold no tensors",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("nonsense"), "index.json: not valid JSON"),
        (
            lambda f: (f / "model-00002-of-00003.safetensors").write_bytes(
                (f / "model-00001-of-00003.safetensors").read_bytes()
            ),
            "is in model-00001-of-00003.safetensors too",
        ),
        (lambda f: _truncate(f / "model-00003-of-00003.safetensors"), "model-00003-of-00003.safetensors: not a whole"),
    ],
)
def test_damaged_shards(tmp_path, damage, message):
    write_checkpoint(tmp_path, shards=3)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        LLM(tmp_path, device="cpu")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_head_stored_beside_tied_embeddings(tmp_path, shards):
    folder = write_checkpoint(tmp_path, weight_tying=True, shards=shards)
    with LLM(folder, device="cpu") as llm:
        expected = llm.generate([1, 2], use_tqdm=False)[0].outputs
    first = sorted(folder.glob("*.safetensors"))[0]
    head = load_file(first)[WTE].clone()
    last = sorted(folder.glob("*.safetensors"))[-1]
    index = folder / "model.safetensors.index.json"
    if shards > 1:
        content = json.loads(index.read_text())
        content["weight_map"][HEAD] = last.name
        index.write_text(json.dumps(content))
    _edit(lambda t: t.update({HEAD: head}))(last)
    with LLM(folder, device="cpu") as llm:
        assert llm.generate([1, 2], use_tqdm=False)[0].outputs == expected
    head[3, 4] += 1e-3
    _edit(lambda t: t.update({HEAD: head}))(last)
    with pytest.raises(ValueError, match=f"{HEAD} differs from {WTE}, and the config's weight_tying is true"):
        LLM(folder, device="cpu")
    _edit(lambda t: t.update({HEAD: head[:-1].clone()}))(last)
    with pytest.raises(ValueError, match=f"{HEAD} in .* has shape .60, 32., the config asks for .61, 32."):
        LLM(folder, device="cpu")


def test_strings_and_chat_without_a_tokenizer(tmp_path):
    with LLM(write_checkpoint(tmp_path), device="cpu") as llm:
        with pytest.raises(ValueError, match="there is no tokenizer, so prompts must be token ids"):
            llm.generate("hello")
        with pytest.raises(ValueError, match="chat needs a tokenizer, and there is none; pass tokenizer="):
            llm.chat([{"role": "user", "content": "hi"}])
        assert llm.generate([1, 2], use_tqdm=False)[0].outputs[0].text is None


def test_chat_without_a_template(tmp_path):
    folder = write_checkpoint(tmp_path, vocab_size=300)
    write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with LLM(folder, device="cpu") as llm, pytest.raises(ValueError, match="chat needs a chat template"):
        llm.chat([{"role": "user", "content": "hi"}])


HUB = "is no local folder and could not be fetched from the Hub"
NO_FOLDER = "is no folder; a checkpoint's folder or a Hub name is expected"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-model-here", HUB),
        ("a/b/c", HUB),
        ("/no/such/folder", NO_FOLDER),
        ("./here", NO_FOLDER),
        ("/dev/null", NO_FOLDER),
        ("a" * 100 + "/b" * 3000, "cannot be looked for: .* File name too long"),
        ("~nobody-of-that-name/x", "cannot be looked for: Could not determine home directory"),
    ],
)
def test_a_model_that_is_nowhere(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"{name[:60]}.* {message}"):
        LLM(name, device="cpu")


def test_a_shape_s_name_that_is_mistyped(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="with one of llada-8b, .*; did you mean 'llada-8b'?"):
        LLM("llada-8B", load_format="dummy", device="cpu")


def test_a_shape_s_name_without_load_format():
    with pytest.raises(ValueError, match="'llada-8b' is a shape's name, for random weights: pass load_format='dummy'"):
        LLM("llada-8b", device="cpu")


def test_a_shape_has_no_revision():
    with pytest.raises(ValueError, match="revision='main' is for a Hub name, and 'llada-8b' is a shape"):
        LLM("llada-8b", load_format="dummy", revision="main", device="cpu")


def test_a_tokenizer_that_is_nowhere(checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"the tokenizer 'nowhere' {HUB}") as caught:
        LLM(checkpoint, tokenizer="nowhere", device="cpu")
    assert "load_format" not in str(caught.value)
    with pytest.raises(ValueError, match="the tokenizer './here' is no folder; a tokenizer's folder or a Hub name"):
        LLM(checkpoint, tokenizer="./here", device="cpu")


def test_a_download_that_breaks_off(monkeypatch):
    """The Hub's client raises its HTTP library's own errors, which are no OSError."""

    def broken(*args, **options):
        raise RuntimeError("peer closed connection")

    monkeypatch.setattr("blockinfer.checkpoint.snapshot_download", broken)
    with pytest.raises(ValueError, match=f"'some/model' {HUB}: peer closed connection"):
        LLM("some/model", device="cpu")
