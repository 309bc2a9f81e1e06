"""What does not fit the memory is refused before anything is allocated, and what does is counted right."""

import dataclasses
import math
import time

import pytest
import torch

from blockinfer import LLM, SamplingParams, memory
from blockinfer.models.registry import SHAPES, model_class, published, read_model_config
from tests.checkpoints import write_checkpoint

GB = 10**9


@pytest.fixture
def free(monkeypatch):
    """free(n): so many bytes are free, and no weight or page may be allocated."""

    def allocate(*args, **options):
        pytest.fail("something was allocated")

    def free(size):
        monkeypatch.setattr(memory, "_machine_free", lambda: size)
        monkeypatch.setattr(torch, "empty", allocate)

    return free


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"llada-8b needs 35.\d\d GB on cpu, 21.00 GB are free: 32.06 GB for the weights in float32 .dtype., 0.02"),
        (
            {"dtype": "bfloat16", "max_model_len": 512, "kv_cache_memory": 20 * GB},
            r"needs 26.29 GB on .* 16.03 .* 8.59 GB for",
        ),
        # half of the layers' bytes; on a CPU a matrix is widened when it is multiplied
        (
            {"dtype": "bfloat16", "quantization": "fp8", "max_model_len": 512, "kv_cache_memory": 20 * GB},
            r"needs 19.5\d GB on .* 9.06 GB for the weights in bfloat16 and fp8 .dtype., 8.59 GB for",
        ),
        ({"dtype": "bfloat16", "max_num_seqs": 10**6}, r"90.24 GB to work with .max_num_seqs=1000000, max_model_len"),
    ],
)
def test_a_model_larger_than_memory(free, options, message):
    free(19 * GB if "quantization" in options else 21 * GB)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        LLM("llada-8b", load_format="dummy", device="cpu", **options)
    assert time.perf_counter() - start < 5


def test_a_checkpoint_larger_than_memory(tmp_path, free):
    folder = write_checkpoint(tmp_path)
    free(100_000)
    with pytest.raises(ValueError, match="0.00 GB are free"):
        LLM(folder, device="cpu")


def test_a_gpu_s_memory_is_what_counts_there(monkeypatch, free):
    """With what torch keeps of it for itself."""
    free(0)
    for name, value in {"is_available": True, "device_count": 1, "mem_get_info": (30 * GB, 80 * GB)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * GB)
    with pytest.raises(ValueError, match="needs 35.* GB on cuda, 31.00 GB are free"):
        LLM("llada-8b", load_format="dummy", dtype="float32")
    with pytest.raises(ValueError, match="device='cuda:1' was asked for, and there are 1 GPUs"):
        LLM("llada-8b", load_format="dummy", device="cuda:1")


def test_the_default_cache_takes_half_of_what_weights_leave(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path)
    page = 2 * 2 * 32 * 4 * 16
    monkeypatch.setattr(memory, "_machine_free", lambda: 50 * page + page // 2)
    monkeypatch.setattr("blockinfer.loading.check_fits", lambda *_: None)
    with LLM(folder, device="cpu") as llm:
        assert llm.engine.pool.num_pages == 25
        assert llm.generate([1, 2], SamplingParams(max_tokens=9), use_tqdm=False)
        with pytest.raises(ValueError, match="a KV cache of 8191 bytes holds no page; one of 16 tokens takes 8192"):
            memory.num_pages(llm.model_config, llm.config, 2 * page - 1)


def test_the_default_cache_of_a_gpu_leaves_room_for_a_step(llm):
    """90 % of what weights leave, less a layer's rows at their peak and the columns of the LM head."""
    model = llm.model_config
    config = dataclasses.replace(llm.config, device=torch.device("cuda"), max_num_seqs=10**6)
    step = 8192 * (3 * model.mlp_hidden_size + 10 * model.d_model) * config.dtype.itemsize + 300 * 3 * 1024
    assert memory.num_pages(model, config, GB) == (9 * GB // 10 - step) // memory.page_bytes(model, config)
    with pytest.raises(ValueError, match="a KV cache of 0 bytes holds no page"):
        memory.num_pages(model, config, step)


SMALL = {
    "llada-8b": {"d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 48}
    | {"vocab_size": 61, "embedding_size": 61, "eos_token_id": 1, "mask_token_id": 2},
    "illada-8b": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"intermediate_size": 48, "vocab_size": 61},
}


@pytest.mark.parametrize(
    "shape, options",
    [
        ("llada-8b", {}),
        ("llada-8b", {"n_kv_heads": 2}),
        ("llada-8b", {"weight_tying": True}),
        ("llada-8b", {"embedding_size": 64}),
        ("illada-8b", {}),
        ("illada-8b", {"tie_word_embeddings": False}),
    ],
)
def test_arithmetic_agrees_with_the_model(shape, options):
    config = read_model_config(SHAPES[shape] | SMALL[shape] | options, "")
    model = model_class(config.architecture, "")(config, torch.float32, torch.device("meta"), 16)
    groups = published(config)
    assert sum(group.parameters_of(1) for group in groups) == sum(parameter.numel() for parameter in model.parameters())
    expected = dict(tensor for group in groups for tensor in group.tensors())
    assert sum(group.number for group in groups) == len(expected)
    assert expected == {name: tuple(tensor.shape) for name, tensor in model.checkpoint_tensors().items()}


def test_a_page_s_bytes_are_what_is_allocated(llm):
    pages = llm.engine.runner.kv_pages
    assert pages.nbytes == (llm.engine.pool.num_pages + 1) * memory.page_bytes(llm.model_config, llm.config)
    narrow = dataclasses.replace(llm.config, dtype=torch.float16, page_size=5)
    assert memory.page_bytes(llm.model_config, narrow) == math.prod((2, 2, 5, 4, 8, 2))


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def group(limit, used, inactive, active, prefix=""):
    stat = f"{prefix}inactive_file {inactive}\n{prefix}active_file {active}\nanon 5\n"
    return limit, used, stat


def test_the_limits_of_a_container(tmp_path):
    """Of every group above the process; a file's cache is free, and a group that is not visible is passed over."""
    two = ("memory.max", "memory.current", "memory.stat")
    one = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    places = {
        "sys/fs/cgroup/a/b": (two, group("max", 900, 0, 0)),
        "sys/fs/cgroup/a": (two, group(1000, 900, 30, 70)),
        "sys/fs/cgroup/memory": (one, group(5000, 1000, 10, 20, "total_")),
    }
    for place, (names, values) in places.items():
        write(tmp_path, {f"{place}/{name}": str(value) for name, value in zip(names, values, strict=True)})
    write(tmp_path, {"proc/self/cgroup": "9:name=systemd:/x\n4:memory:/docker/0123\n0::/a/b\n"})
    assert sorted(memory._cgroups_free(tmp_path)) == [200, 4030]
    assert list(memory._cgroups_free(tmp_path / "nowhere")) == []


def test_the_narrowest_limit_counts(monkeypatch, free):
    free(30 * GB)
    monkeypatch.setattr(memory, "_cgroups_free", lambda: [9 * GB, 4 * GB])
    assert memory.free_memory(torch.device("cpu")) == 4 * GB


def test_this_machine_has_memory_free():
    assert 10**8 < memory.free_memory(torch.device("cpu")) < 10**14
