"""What each rank has of a model, and what it reads for it."""

import contextlib
import dataclasses

import pytest
import torch

from blockinfer import memory, weights
from blockinfer.config import EngineConfig
from blockinfer.kernels.ranks import Ranks
from blockinfer.loading import load, prepare
from blockinfer.memory import num_pages, page_bytes
from blockinfer.models.published import num_parameters
from blockinfer.models.registry import model_class, published

BY_COLUMNS = ("attn_out", "ff_out", "o_proj", "down_proj")


class OneOf(Ranks):
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def config_of(folder, size, **options):
    fields = {name: None for name in EngineConfig.__dataclass_fields__}
    defaults = dict(max_num_seqs=2, page_size=8, enforce_eager=False, dtype="float32", device="cpu", load_format="auto")
    return EngineConfig(**fields | defaults | dict(model=folder, tensor_parallel_size=size) | options)


def parameters_of(config, size=1):
    return num_parameters(published(config), size, {model_class(config.architecture, "").EMBEDDINGS})


def share(folder, size, rank=0, **options):
    """The network of one of so many ranks."""
    loaded = load(prepare(config_of(folder, size, **options)), OneOf(rank, size))
    found = sum(weight.numel() for weight in loaded.network.parameters())
    assert found == parameters_of(loaded.model_config, size)
    return loaded.network


def together(name, parts, whole):
    """The ranks' parts of a published tensor, put together."""
    if parts[0].shape == whole.shape:
        assert all(torch.equal(part, whole) for part in parts)
        return whole
    of_layer = ".blocks." in name or ".layers." in name
    return torch.cat(parts, dim=1 if of_layer and name.split(".")[-2] in BY_COLUMNS else 0)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("shape", ["dense", "tied", "illada"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_the_ranks_shares_make_up_the_model(shared_folders, shape, size, load_format):
    """Of files, and of random weights, which are the same however many ranks there are."""
    one = share(shared_folders[shape], 1, load_format=load_format)
    several = [share(shared_folders[shape], size, rank, load_format=load_format) for rank in range(size)]
    for name, whole in one.checkpoint_tensors().items():
        parts = [network.checkpoint_tensors()[name] for network in several]
        assert torch.equal(together(name, parts, whole), whole), name
    assert torch.equal(torch.cat([network.lm_head for network in several]), one.lm_head)


class CountingFile:
    """A safetensors file, and how many numbers were read of it."""

    read = 0

    def __init__(self, file):
        self.file = file

    def get_tensor(self, name):
        return self.count(self.file.get_tensor(name))

    def get_slice(self, name):
        self.entry = self.file.get_slice(name)
        return self

    def __getitem__(self, share):
        return self.count(self.entry[share])

    def count(self, tensor):
        CountingFile.read += tensor.numel()
        return tensor


def test_a_rank_reads_its_share_alone(shared_folders, monkeypatch):
    """Of all but embeddings and norms."""
    prepared = prepare(config_of(shared_folders["dense"], 3))
    right = weights._open

    @contextlib.contextmanager
    def counting(path):
        with right(path) as file:
            yield CountingFile(file)

    monkeypatch.setattr(weights, "_open", counting)
    network = load(prepared, OneOf(1, 3)).network
    whole = parameters_of(network.config)
    everyones = network.wte.numel() + sum(w.numel() for w in network.parameters() if w.ndim == 1)
    assert CountingFile.read == parameters_of(network.config, 3) == (whole - everyones) / 3 + everyones


def test_memory_is_that_of_a_rank(shared_folders, monkeypatch):
    """On a CPU the ranks take of the same memory, so the whole model has to fit."""
    one, two = (prepare(config_of(shared_folders["dense"], size)) for size in (1, 2))
    assert 2 * page_bytes(two.model_config, two.config) == page_bytes(one.model_config, one.config)
    free = 60_000_000
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    prepare(config_of(shared_folders["dense"], 2))
    free = 10_000_000
    with pytest.raises(ValueError, match=r"on cpu for each of 2 ranks, 0.01 GB are free: .* for the weights"):
        prepare(config_of(shared_folders["dense"], 2))
    cache = [num_pages(p.model_config, dataclasses.replace(p.config, max_num_seqs=999), free) for p in (one, two)]
    assert cache[0] == cache[1] > 0
