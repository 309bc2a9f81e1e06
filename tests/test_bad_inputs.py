"""Every wrong option, prompt and checkpoint gets an error that says what is wrong, where, and what was expected."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockinfer import LLM, SamplingParams
from tests.checkpoints import write_checkpoint, write_tokenizer

WTE = "model.transformer.wte.weight"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": -3}, ValueError, "max_tokens must be at least 1, got -3"),
        ({"max_tokens": 1.5}, ValueError, "max_tokens must be an integer, got 1.5"),
        ({"max_tokens": True}, ValueError, "max_tokens must be an integer, got True"),
        ({"max_tokens": None}, ValueError, "max_tokens must be an integer, got None"),
        ({"block_length": 0}, ValueError, "block_length must be at least 1, got 0"),
        ({"block_length": "32"}, ValueError, "block_length must be an integer, got '32'"),
        ({"denoising_steps": 0}, ValueError, "denoising_steps must be at least 1, got 0"),
        ({"denoising_steps": 2.0}, ValueError, "denoising_steps must be an integer, got 2.0"),
        ({"mode": "dual"}, ValueError, "mode must be one of vanilla, .*got 'dual'"),
        ({"mode": "blocks"}, ValueError, "got 'blocks'; did you mean 'block'?"),
        ({"mode": None}, ValueError, "mode must be one of .*got None"),
        ({"unmasking": "treshold"}, ValueError, "got 'treshold'; did you mean 'threshold'?"),
        ({"unmasking": ["threshold"]}, ValueError, "unmasking must be one of"),
        ({"threshold": 0.9}, ValueError, "'low_confidence' does not read threshold .only threshold does., got thresh"),
        ({"unmasking": "threshold", "factor": 1.0}, ValueError, "'threshold' does not read factor .only factor does."),
        ({"unmasking": "factor", "entropy_bound": 0.1}, ValueError, "does not read entropy_bound .only entropy does."),
        ({"unmasking": "threshold", "threshold": 1.1}, ValueError, "threshold must be between 0.0 and 1.0, got 1.1"),
        ({"unmasking": "threshold", "threshold": -0.1}, ValueError, "threshold must be between 0.0 and 1.0, got -0.1"),
        ({"unmasking": "threshold", "threshold": float("nan")}, ValueError, "threshold must be a finite number"),
        ({"unmasking": "threshold", "threshold": "0.9"}, ValueError, "threshold must be a finite number, got '0.9'"),
        ({"unmasking": "factor", "factor": -1}, ValueError, "factor must be at least 0.0, got -1"),
        ({"unmasking": "entropy", "entropy_bound": float("inf")}, ValueError, "entropy_bound must be a finite number"),
        ({"temperature": -0.5}, ValueError, "temperature must be between 0.0 and 1000000.0, got -0.5"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a finite number, got nan"),
        ({"temperature": True}, ValueError, "temperature must be a finite number, got True"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be below 2"),
        ({"seed": 1.0}, ValueError, "seed must be an integer, got 1.0"),
        ({"stop_token_ids": [1, -1]}, ValueError, "stop_token_ids must be at least 0, got -1"),
        ({"stop_token_ids": ["a"]}, ValueError, "stop_token_ids must be an integer, got 'a'"),
        ({"stop_token_ids": 7}, ValueError, "stop_token_ids must be a list of token ids, got 7"),
        ({"ignore_eos": 1}, ValueError, "ignore_eos must be True or False, got 1"),
        ({"logits_eos_inf": "no"}, ValueError, "logits_eos_inf must be True or False, got 'no'"),
        ({"confidence_eos_eot_inf": None}, ValueError, "confidence_eos_eot_inf must be True or False, got None"),
        (
            {"unmasking": "sequential", "confidence_eos_eot_inf": True},
            ValueError,
            "'sequential' does not read confidence_eos_eot_inf",
        ),
        ({"max_token": 5}, TypeError, "unknown option 'max_token'; did you mean 'max_tokens'?"),
        ({"top_p": 0.9}, TypeError, "unknown option 'top_p'"),
        ({"n": 2}, TypeError, "unknown option 'n'"),
    ],
)
def test_sampling_params(options, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_num_seq": 4}, TypeError, "LLM got an unknown option 'max_num_seq'; did you mean 'max_num_seqs'?"),
        ({"gpu_memory_utilization": 0.9}, TypeError, "unknown option 'gpu_memory_utilization'"),
        ({"trust_remote_code": True}, TypeError, "unknown option 'trust_remote_code'"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of auto, float64, .*got 'int8'"),
        ({"dtype": "float"}, ValueError, "got 'float'; did you mean"),
        ({"dtype": torch.int32}, ValueError, "dtype must be one of .*got torch.int32"),
        ({"device": "tpu"}, ValueError, "device must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ({"device": "meta"}, ValueError, "device must be 'auto', 'cpu' or 'cuda', got 'meta'"),
        ({"load_format": "pt"}, ValueError, "load_format must be one of auto, dummy, got 'pt'"),
        ({"tokenizer": "no/such/folder/here"}, ValueError, "'no/such/folder/here' is no local folder"),
        ({"mask_token_id": -1}, ValueError, "mask_token_id must be at least 0, got -1"),
        ({"mask_token_id": 300}, ValueError, "mask_token_id=300 is outside the 300 embeddings"),
        ({"max_model_len": 0}, ValueError, "max_model_len must be at least 1, got 0"),
        ({"max_model_len": 257}, ValueError, "max_model_len=257 exceeds the config's max_sequence_length=256"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be at least 1, got 0"),
        ({"max_num_seqs": None}, ValueError, "max_num_seqs must be an integer, got None"),
        ({"max_num_batched_tokens": 255}, ValueError, "max_num_batched_tokens=255 must be at least max_model_len=256"),
        ({"page_size": 0}, ValueError, "page_size must be at least 1, got 0"),
        ({"page_size": 16.0}, ValueError, "page_size must be an integer, got 16.0"),
        ({"kv_cache_memory": 100}, ValueError, "a KV cache of 100 bytes holds no page; one of 16 tokens takes 8192"),
        ({"kv_cache_memory": 2**62, "page_size": 2**40}, ValueError, "the KV cache of .* bytes cannot be allocated"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be below 2\\*\\*64"),
        ({"tokenizer": 5}, ValueError, "tokenizer must be a folder or a name on the Hub, got 5"),
        ({"tokenizer": ""}, ValueError, "tokenizer must be a folder or a name on the Hub, got ''"),
        ({"revision": 7}, ValueError, "revision must be .*, got 7"),
        ({"revision": "main"}, ValueError, "revision='main' is for a Hub name, and .* is a local folder"),
    ],
)
def test_llm_options(checkpoint, options, error, message):
    with pytest.raises(error, match=message):
        LLM(checkpoint, **{"device": "cpu", **options})


@pytest.mark.parametrize("model", [None, 5, "", b"folder"])
def test_a_model_that_is_no_name(model):
    with pytest.raises(ValueError, match="model must be a folder or a name on the Hub, got"):
        LLM(model, device="cpu")


def test_a_tokenizer_folder_without_its_file(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="there is no tokenizer.json; the fast tokenizer's file is expected"):
        LLM(checkpoint, tokenizer=tmp_path, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there(checkpoint):
    with pytest.raises(ValueError, match="device='cuda' was asked for, but this torch .* sees no GPU"):
        LLM(checkpoint, device="cuda")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty: it must have at least 1 token"),
        ([], None),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt_token_ids": "abc"}, "must be a string or a list of token ids, got str"),
        ({"prompt": 5}, '"prompt" must be a string, got int'),
        ({"prompt": ""}, "the prompt is empty"),
        ({1: 2, "a": 3}, r"""a dict prompt has "prompt" or "prompt_token_ids", got the keys \[1, 'a'\]"""),
        ({"prompt_token_ids": [1], "multi_modal": 1}, "got the keys"),
        ({}, "got the keys"),
        ([[1, 2], [3, 300]], "prompt 1: prompt token 1 must be an integer from 0 to 299, got 300"),
        ([[-1]], "prompt 0: prompt token 0 must be an integer from 0 to 299, got -1"),
        ([[1, 2.5]], "prompt token 1 must be an integer from 0 to 299, got 2.5"),
        ([[1, "a"]], "prompt token 1 must be"),
        ([[True]], "prompt token 0 must be"),
        ([None], "prompt 0: a prompt must be a string or a list of token ids, got NoneType"),
        (5, "prompts must be a prompt or a list of prompts, got int"),
        (None, "prompts must be a prompt or a list of prompts, got NoneType"),
        ([[1] * 200], "the prompt's 200 tokens and max_tokens=128 make 328, more than max_model_len=256"),
        (["x" * 300], "the prompt's 301 tokens and max_tokens=128 make 429"),
    ],
)
def test_prompts(llm, prompt, message):
    if message is None:
        assert llm.generate(prompt, use_tqdm=False) == []
        return
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, use_tqdm=False)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([SamplingParams()] * 3, "there are 2 prompts but 3 params"),
        ({"max_tokens": 5}, "params must be a SamplingParams or one for each prompt, got dict"),
        ([SamplingParams(), {"max_tokens": 3}], "prompt 1: params must be a SamplingParams, got dict"),
        (SamplingParams(stop_token_ids=[5, 300]), r"stop_token_ids \[300\] are outside the 300 embeddings"),
        (SamplingParams(max_tokens=256), "tokens and max_tokens=256 make 257, more than max_model_len=256"),
    ],
)
def test_params_of_generate(llm, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([[1], [2]], params, use_tqdm=False)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "chat needs at least one message"),
        ("hello", "must be a list of {'role': ..., 'content': ...}, got str"),
        ([{"role": "user"}], "conversation 0: message 0 must be .*got the keys .'role'"),
        ([[{"role": "user", "content": "a"}], []], "conversation 1: it has no messages"),
        ([{"role": "user", "content": 5}], "conversation 0: message 0 must be"),
        ([{"role": "user", 1: 5}], "conversation 0: message 0 must be .*got the keys"),
        (["hi"], "conversation 0: it must be a list of .*, got str"),
        ([1, 2], "conversation 0: it must be a list of .*, got int"),
    ],
)
def test_conversations(llm, messages, message):
    with pytest.raises(ValueError, match=message):
        llm.chat(messages, use_tqdm=False)


def test_a_request_that_the_pages_can_never_hold(checkpoint):
    page_bytes = 2 * 2 * 32 * 4 * 16
    with LLM(checkpoint, device="cpu", kv_cache_memory=3 * page_bytes) as llm:
        with pytest.raises(ValueError, match="10 tokens and max_tokens=39 need 4 pages of 16 .* has 3"):
            llm.generate([1] * 10, SamplingParams(max_tokens=39))
        assert llm.generate([1] * 10, SamplingParams(max_tokens=38), use_tqdm=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alibi": True}, "alibi=True is not implemented"),
        ({"rope": False}, "rope=False is not implemented"),
        ({"rope_full_precision": False}, "rope_full_precision=False is not implemented"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling=.* is not implemented"),
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
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not implemented"),
        (
            {"architectures": ["LLaDAMoEModelLM"]},
            "'LLaDAMoEModelLM' is not implemented, only LLaDAModelLM is",
        ),
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
        ({"weight_tying": True}, "1 unexpected: model.transformer.ff_out.weight"),
        ({"mlp_hidden_size": 64}, r"ff_out.weight in model.safetensors has shape \[32, 48\], the config asks for"),
        ({"n_kv_heads": 2}, r"k_proj.weight in model.safetensors has shape \[32, 32\], the config asks for \[16, 32\]"),
        (
            {"vocab_size": 250, "embedding_size": 250, "eos_token_id": 1, "mask_token_id": 2},
            "the tokenizer of .* has 262 tokens, the model only 250 embeddings",
        ),
    ],
)
def test_configs(checkpoint, tmp_path, change, message):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        LLM(tmp_path, device="cpu")


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
        ("config.json", lambda p: p.write_text("[]"), "a JSON object is expected, got list"),
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
        (lambda f: (f / "model.safetensors.index.json").write_text("nonsense"), "not a safetensors index"),
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


def test_strings_and_chat_without_a_tokenizer(tmp_path):
    with LLM(write_checkpoint(tmp_path), device="cpu") as llm:
        with pytest.raises(ValueError, match="there is no tokenizer, so prompts must be token ids"):
            llm.generate("hello")
        with pytest.raises(ValueError, match="chat needs a tokenizer"):
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
    [("no-such-model-here", HUB), ("a/b/c", HUB), ("/no/such/folder", NO_FOLDER), ("./here", NO_FOLDER)],
)
def test_a_model_that_is_nowhere(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"'{name}' {message}"):
        LLM(name, device="cpu")


def test_a_shape_s_name_that_is_mistyped(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="with one of llada-8b; did you mean 'llada-8b'?"):
        LLM("llada-8B", load_format="dummy", device="cpu")


def test_a_download_that_breaks_off(monkeypatch):
    """The Hub's client raises its HTTP library's own errors, which are no OSError."""

    def broken(*args, **options):
        raise RuntimeError("peer closed connection")

    monkeypatch.setattr("blockinfer.llm.snapshot_download", broken)
    with pytest.raises(ValueError, match=f"'some/model' {HUB}: peer closed connection"):
        LLM("some/model", device="cpu")
