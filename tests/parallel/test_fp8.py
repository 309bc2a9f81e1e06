"""fp8 on several ranks: what each has, and the tokens of a plain implementation that rounds its parts as they do."""

import pytest
import torch
from safetensors.torch import load_file

from blockinfer import LLM, SamplingParams
from blockinfer.kernels.quantize import QuantizedWeight
from blockinfer.memory import weight_bytes
from tests.parallel.test_shares import BY_COLUMNS, OneOf, config_of, load, prepare
from tests.quantized import dequantized
from tests.reference import Reference
from tests.test_quantization import FP8, HEAD, compressed_tensors, fine_grained, prompts, rounded, store


def shares(folder, size, **options):
    """Each rank's network, and what its config comes to."""
    for rank in range(size):
        loaded = load(prepare(config_of(folder, size, **options)), OneOf(rank, size))
        yield rank, loaded.network, loaded


def part_of(weight, name, rank, size):
    return weight.chunk(size, dim=int(name != HEAD and name.split(".")[-2] in BY_COLUMNS))[rank]


def quantized(network):
    return {name: t for name, t in network.checkpoint_tensors().items() if isinstance(t, QuantizedWeight)}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_each_rank_quantises_its_part(shared_folders, size, load_format):
    """And of a file's, or of random weights, as it would be without quantisation."""
    for shape in ("dense", "illada"):
        folder, options = shared_folders[shape], dict(load_format=load_format)
        ((_, plain, _),) = shares(folder, 1, **options)
        whole = plain.checkpoint_tensors()
        for rank, network, loaded in shares(folder, size, quantization="fp8", **options):
            assert len(quantized(network)) == 7 * plain.config.n_layers
            for name, tensor in quantized(network).items():
                values, scales = rounded(part_of(whole[name], name, rank, size), 1, 10**6)
                assert torch.equal(tensor.values.float(), values.float()) and torch.equal(tensor.scale, scales)
            taken = sum(parameter.nbytes for parameter in network.parameters())
            assert taken == weight_bytes(loaded.model_config, loaded.config)


STORED = {
    "channels": (compressed_tensors(), (1, 10**6), "_scale", None),
    "channels, flat": (compressed_tensors(), (1, 10**6), "_scale", (-1,)),
    "one": (compressed_tensors(strategy="tensor"), None, "_scale", ()),
    "blocks": (fine_grained(16, 10), (16, 10), "_scale_inv", None),
}


@pytest.mark.parametrize("how", STORED)
def test_of_a_checkpoint_in_fp8_each_rank_has_its_part(shared_folders, tmp_path, how):
    """Scales of channels and of whole matrices as they are; neither 24 rows nor 24 columns are whole blocks. A head in
    FP8 is widened."""
    about, block, suffix, shape = STORED[how]
    folder = store(shared_folders["dense"], tmp_path / "fp8", about, block, suffix, shape, head=True)
    stored = load_file(folder / "model.safetensors")
    for rank, network, _ in shares(folder, 2):
        for name, tensor in network.checkpoint_tensors().items():
            if name + suffix not in stored:
                continue
            scale = stored[name + suffix]
            if how == "blocks":
                scale = scale.repeat_interleave(16, 0)[:66].repeat_interleave(10, 1)[:, :48]
                scale = scale[: len(stored[name])]
            elif scale.ndim == 1:
                scale = scale[:, None]
            exact = part_of(stored[name].float() * scale, name, rank, 2)
            if not isinstance(tensor, QuantizedWeight):
                assert name == HEAD and torch.equal(tensor, exact)
            elif how == "blocks":
                # rounded once more
                error = (dequantized(tensor, torch.float32) - exact).abs()
                assert (error <= (exact.abs() / 16).maximum(tensor.scale * 2**-10) * 1.0001).all()
            else:
                assert torch.equal(tensor.values.float(), part_of(stored[name].float(), name, rank, 2))
                assert torch.equal(dequantized(tensor, torch.float32), exact)


class ShardedReference(Reference):
    """Layers whose matrices are rounded to FP8, those with columns for each rank in parts, and rows likewise."""

    def __init__(self, folder, size):
        super().__init__(folder)
        self.parts = {}
        for name, weight in self.weights.items():
            if name.startswith("blocks.") and weight.ndim == 2:
                parts = weight.float().chunk(size if name.split(".")[-2] in BY_COLUMNS else 1, dim=1)
                self.parts[name] = [values.double() * s.double() for values, s in (rounded(p, 1, 10**6) for p in parts)]

    def linear(self, x, name):
        parts = self.parts.get(name + ".weight")
        if parts is None:
            return super().linear(x, name)
        return sum(round_rows(own) @ part.T for own, part in zip(x.chunk(len(parts), dim=-1), parts, strict=True))


def round_rows(x):
    largest = x.float().abs().amax(-1, keepdim=True)
    values = (x.float() * (torch.full_like(largest, 448) / largest)).to(FP8).double()
    return values * (largest / 448).double()


@pytest.mark.parametrize("size", [2, 3])
def test_tokens_are_those_of_a_plain_implementation(shared_folders, size):
    """And not those of one rank, which rounds whole rows: the comparison is not blind."""
    folder, modes = shared_folders["dense"], ["vanilla", "dual_cache", "block"]
    options = [dict(mode=mode, max_tokens=12, block_length=8) for mode in modes]
    params = [SamplingParams(**one, ignore_eos=True) for one in options for _ in range(4)]
    with LLM(folder, device="cpu", dtype="float64", quantization="fp8", tensor_parallel_size=size) as llm:
        made = [output.outputs[0].token_ids for output in llm.generate(prompts(4) * 3, params, use_tqdm=False)]

    def expected(ranks):
        reference = ShardedReference(folder, ranks)
        return [list(reference.generate(prompt, **one).tokens) for one in options for prompt in prompts(4)]

    assert [list(tokens) for tokens in made] == expected(size)
    assert [list(tokens) for tokens in made] != expected(1)
