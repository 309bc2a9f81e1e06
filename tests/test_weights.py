"""Loading: every layout of a checkpoint gives the same model, and every published tensor lands where it belongs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockinfer import LLM, SamplingParams
from tests.checkpoints import write_checkpoint, write_tokenizer

PARAMS = SamplingParams(max_tokens=8, block_length=8, ignore_eos=True)


def outputs(folder, **options):
    with LLM(folder, device="cpu", **options) as llm:
        return llm.generate([[1, 2, 3], [9, 8]], PARAMS, use_tqdm=False)


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_equal_a_single_file(tmp_path, shards):
    single = outputs(write_checkpoint(tmp_path / "single"))
    sharded = outputs(write_checkpoint(tmp_path / "sharded", shards=shards))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) == shards
    assert [o.outputs for o in single] == [o.outputs for o in sharded]


@pytest.mark.parametrize("options", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"weight_tying": True}])
def test_every_tensor_is_copied_to_its_place(tmp_path, options):
    folder = write_checkpoint(tmp_path, **options)
    with LLM(folder, device="cpu") as llm:
        loaded = llm.engine.model.checkpoint_tensors()
        stored = load_file(folder / "model.safetensors")
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name], stored[name]) for name in stored)
        covered = sum(tensor.numel() for tensor in loaded.values())
        assert covered == sum(p.numel() for p in llm.engine.model.parameters())


def test_the_published_names_and_count():
    from blockinfer.models.registry import SHAPES, model_class, read_model_config

    config = read_model_config(SHAPES["llada-8b"], "llada-8b")
    model = model_class(config.architecture, "llada-8b")(config, torch.bfloat16, torch.device("meta"), 16)
    tensors = model.checkpoint_tensors()
    assert len(tensors) == 3 + 32 * 9
    assert tensors["model.transformer.ff_out.weight"].shape == (126464, 4096)
    assert tensors["model.transformer.blocks.31.ff_out.weight"].shape == (4096, 12288)
    assert sum(tensor.numel() for tensor in tensors.values()) == 8_015_581_184


def test_a_checkpoint_in_another_dtype_is_converted(tmp_path):
    folder = write_checkpoint(tmp_path, dtype="bfloat16")
    with LLM(folder, device="cpu") as llm:
        assert llm.model_config.dtype == torch.bfloat16 and llm.config.dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in llm.engine.model.parameters())


def test_embeddings_beyond_the_vocabulary_are_never_predicted(tmp_path):
    folder = write_checkpoint(tmp_path, vocab_size=61, embedding_size=64)
    many = SamplingParams(max_tokens=100, temperature=5.0, seed=0, ignore_eos=True)
    with LLM(folder, device="cpu") as llm:
        token_ids = llm.generate([1, 2], many, use_tqdm=False)[0].outputs[0].token_ids
    assert max(token_ids) < 61 and llm.config.mask_token_id not in token_ids


def test_the_mask_id_comes_from_the_argument_then_the_config(tmp_path):
    folder = write_checkpoint(tmp_path)
    with LLM(folder, device="cpu") as llm:
        assert llm.config.mask_token_id == json.loads((folder / "config.json").read_text())["mask_token_id"]
    with LLM(folder, device="cpu", mask_token_id=3) as llm:
        assert llm.config.mask_token_id == 3


def test_the_mask_id_of_the_tokenizer(tmp_path):
    """It counts where the config names none; a config that names another is refused."""
    folder = write_checkpoint(tmp_path)
    own = write_tokenizer(folder)["<|mdm_mask|>"]

    def name(file, **named):
        content = json.loads((folder / file).read_text()) | named
        (folder / file).write_text(json.dumps(content))

    name("tokenizer_config.json", mask_token="<|mdm_mask|>")
    for named in (own, None):
        name("config.json", mask_token_id=named)
        with LLM(folder, device="cpu") as llm:
            assert llm.config.mask_token_id == own
    name("config.json", mask_token_id=3)
    with pytest.raises(ValueError, match=f"mask_token_id=3 is not the tokenizer's mask token, which is {own}; pass"):
        LLM(folder, device="cpu")
    with LLM(folder, device="cpu", mask_token_id=3) as llm:
        assert llm.config.mask_token_id == 3


def test_a_config_that_only_gives_mlp_ratio_and_multi_query_attention(tmp_path):
    folder = write_checkpoint(tmp_path, n_kv_heads=1, mlp_hidden_size=128, multi_query_attention=True)
    config = json.loads((folder / "config.json").read_text()) | {"n_kv_heads": None, "mlp_hidden_size": None}
    (folder / "config.json").write_text(json.dumps(config))
    with LLM(folder, device="cpu") as llm:
        assert (llm.model_config.n_kv_heads, llm.model_config.mlp_hidden_size) == (1, 128)


FREQUENCIES = 500000.0 ** -(torch.arange(0, 8, 2) / 8)


def add_tensors(folder, extra):
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_fine_tuned_llada_checkpoints_have_besides(tmp_path, dtype):
    """RoPE's frequencies, and fields of the config that change nothing: as if they were not there."""
    expected = outputs(write_checkpoint(tmp_path / "plain"))
    harmless = dict(_name_or_path="x", dtype="float32", flash_attention=True, use_cache=True, precision="amp_fp16")
    harmless |= dict(embedding_dropout=0.1, rope_scaling=None, quantization_config=None, transformers_version="5.0.0")
    # as transformers 5 writes it
    harmless |= dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    folder = write_checkpoint(tmp_path / "tuned", **harmless)
    names = ["rotary_emb.inv_freq", *(f"model.transformer.blocks.{i}.rotary_emb.inv_freq" for i in range(2))]
    add_tensors(folder, {name: FREQUENCIES.to(dtype, copy=True) for name in names})
    assert [o.outputs for o in outputs(folder)] == [o.outputs for o in expected]


@pytest.mark.parametrize(
    "name, frequencies, message",
    [
        ("rotary_emb.inv_freq", FREQUENCIES * 1.01, "rotary_emb.inv_freq differs from the frequencies of .*=500000$"),
        ("rotary_emb.inv_freq", torch.ones(4), "differs from the frequencies of the config's rope_theta"),
        ("rotary_emb.inv_freq", FREQUENCIES * torch.nan, "differs from the frequencies"),
        ("a.rotary_emb.inv_freq", FREQUENCIES[:3], r"has shape \[3\], the config asks for \[4\]"),
        ("a.rotary_emb.inv_freq", FREQUENCIES.long(), "has dtype I64, which is not a plain floating point type"),
        ("my_rotary_emb.inv_freq", FREQUENCIES, "1 unexpected: my_rotary_emb.inv_freq"),
        ("lm_head.weight", torch.zeros(61, 32), "1 unexpected: lm_head.weight"),
    ],
)
def test_what_would_change_the_result_is_refused(tmp_path, name, frequencies, message):
    folder = write_checkpoint(tmp_path)
    add_tensors(folder, {name: frequencies.clone()})
    with pytest.raises(ValueError, match=message):
        LLM(folder, device="cpu")
