"""fp8 through the whole engine: the tokens of a plain implementation, and checkpoints that are stored in it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockinfer import LLM, SamplingParams
from blockinfer.kernels import fp8_linear
from blockinfer.kernels.quantize import QuantizedWeight
from blockinfer.memory import weight_bytes
from tests.checkpoints import save_shards, write_checkpoint
from tests.families.checkpoints import ILLADA, write_family
from tests.families.forward import logits_of
from tests.quantized import dequantized
from tests.reference import Reference

FP8 = torch.float8_e4m3fn
MODES = ["vanilla", "prefix_cache", "dual_cache", "block", "block_refresh"]
HEAD = "model.transformer.ff_out.weight"
ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


def compressed_tensors(activations=ACTIVATIONS, **weights):
    """What llm-compressor writes."""
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True} | weights
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    about = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}
    return about | {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None}


def fine_grained(*block, **others):
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [*block]} | others


def rounded(weight, *block):
    """weight [N, K] in blocks, whose largest value becomes 448 -> values [N, K], scales [N / block, K / block]."""
    down, across = -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])
    values, scales = torch.empty(weight.shape, dtype=FP8), torch.empty(down, across)
    for i in range(down):
        for j in range(across):
            where = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[where].abs().max() / 448
            values[where] = (weight[where] / scales[i, j]).to(FP8)
    return values, scales


def is_matrix_of_a_layer(name):
    return ".blocks." in name and "norm" not in name


def store(plain, folder, about, block, suffix, shape=None, head=False, shards=1):
    """The plain checkpoint's layers in FP8; shape: of the scales, where it is another than `rounded` gives."""
    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if is_matrix_of_a_layer(name) or head and name == HEAD:
            values, scales = rounded(weight, *(block or weight.shape))
            tensors |= {name: values, name + suffix: scales.reshape(shape) if shape is not None else scales}
        else:
            tensors[name] = weight
    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    save_shards(folder, tensors, shards)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plain"), n_kv_heads=2)


class QuantizedReference(Reference):
    """Layers whose matrices and rows are rounded to FP8."""

    def __init__(self, folder):
        super().__init__(folder)
        self.rounded = {}
        for name, weight in self.weights.items():
            if name.startswith("blocks.") and weight.ndim == 2:
                values, scales = rounded(weight.float(), 1, weight.shape[1])
                self.rounded[name] = values.double() * scales.double()

    def linear(self, x, name):
        if name + ".weight" not in self.rounded:
            return super().linear(x, name)
        largest = x.float().abs().amax(-1, keepdim=True)
        values = (x.float() * (torch.full_like(largest, 448) / largest)).to(FP8).double()
        return (values @ self.rounded[name + ".weight"].T) * (largest / 448).double()


def prompts(number):
    generator = torch.Generator().manual_seed(number)
    return [torch.randint(0, 55, (5 + i,), generator=generator).tolist() for i in range(number)]


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_a_plain_implementation(plain, mode):
    """And not those of the weights as they were: the comparison is not blind."""
    options = dict(mode=mode, max_tokens=20, block_length=8)
    params = SamplingParams(**options, ignore_eos=True)
    with LLM(plain, device="cpu", dtype="float64", quantization="fp8") as llm:
        made = [output.outputs[0].token_ids for output in llm.generate(prompts(8), params, use_tqdm=False)]

    def expected(reference):
        return [reference.generate(prompt, **options).tokens for prompt in prompts(8)]

    assert [list(tokens) for tokens in made] == [list(tokens) for tokens in expected(QuantizedReference(plain))]
    assert [list(tokens) for tokens in made] != [list(tokens) for tokens in expected(Reference(plain))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_quantised_and_what_it_takes(plain, dtype):
    with LLM(plain, device="cpu", dtype=dtype, quantization="fp8") as llm:
        model, stored = llm.engine.model, load_file(plain / "model.safetensors")
        for name, tensor in model.checkpoint_tensors().items():
            assert isinstance(tensor, QuantizedWeight) == is_matrix_of_a_layer(name)
            if isinstance(tensor, QuantizedWeight):
                values, scales = rounded(stored[name], 1, stored[name].shape[1])
                assert torch.equal(tensor.values.float(), values.float()) and torch.equal(tensor.scale, scales)
            else:
                assert torch.equal(tensor, stored[name].to(tensor.dtype)) and tensor.dtype == llm.config.dtype
        taken = sum(parameter.nbytes for parameter in model.parameters())
        assert taken == weight_bytes(llm.model_config, llm.config)
        assert llm.generate([1, 2], SamplingParams(max_tokens=8), use_tqdm=False)


def test_rows_are_quantised_by_the_norm_before_a_product_where_there_is_one(plain, monkeypatch):
    counted, quantize_rows = [], fp8_linear.quantize_rows
    monkeypatch.setattr(fp8_linear, "quantize_rows", lambda x: counted.append(x.shape) or quantize_rows(x))
    with LLM(plain, device="cpu", quantization="fp8") as llm:
        llm.generate([1, 2], SamplingParams(max_tokens=1), use_tqdm=False)
        assert llm.stats.forwards == 1 and len(counted) == 2 * llm.model_config.n_layers


def test_illada_s_layers_are_quantised_too(tmp_path):
    folder, tokens = write_family(tmp_path, ILLADA), list(range(1, 38))
    with LLM(folder, device="cpu") as llm, LLM(folder, device="cpu", quantization="fp8") as quantized:
        for name, tensor in quantized.engine.model.checkpoint_tensors().items():
            assert isinstance(tensor, QuantizedWeight) == ("proj" in name)
        plain, rounded_s = (logits_of(one.engine.model, tokens) for one in (llm, quantized))
    assert 0.001 < (plain - rounded_s).norm() / plain.norm() < 0.3


@pytest.mark.parametrize("shape", ["llada-moe-7b", "llada2-mini"])
def test_mixtures_of_experts_are_refused(shape):
    with pytest.raises(ValueError, match=r"quantization='fp8' is not implemented for LLaDA.*M; leave it out"):
        LLM(shape, load_format="dummy", device="cpu", quantization="fp8")


def test_random_weights_are_those_of_the_seed_quantised(plain):
    options = dict(device="cpu", load_format="dummy", seed=3)
    with LLM(plain, **options) as llm, LLM(plain, **options, quantization="fp8") as quantized:
        as_drawn = llm.engine.model.checkpoint_tensors()
        for name, tensor in quantized.engine.model.checkpoint_tensors().items():
            if isinstance(tensor, QuantizedWeight):
                values, scales = rounded(as_drawn[name], 1, as_drawn[name].shape[1])
                assert torch.equal(tensor.values.float(), values.float()) and torch.equal(tensor.scale, scales)
            else:
                assert torch.equal(tensor, as_drawn[name])


def outputs(folder, **options):
    params = SamplingParams(max_tokens=24, block_length=8, ignore_eos=True)
    with LLM(folder, device="cpu", **options) as llm:
        assert llm.config.quantization == "fp8"
        return [output.outputs[0].token_ids for output in llm.generate(prompts(4), params, use_tqdm=False)]


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_in_fp8_is_taken_as_it_is(plain, tmp_path, shape, shards):
    folder = store(plain, tmp_path / "fp8", compressed_tensors(), (1, 10**6), "_scale", shape, shards=shards)
    assert outputs(folder) == outputs(plain, quantization="fp8") == outputs(folder, quantization="fp8")
    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    with LLM(folder, device="cpu") as llm:
        for name, tensor in llm.engine.model.checkpoint_tensors().items():
            if isinstance(tensor, QuantizedWeight):
                assert torch.equal(tensor.values.float(), stored[name].float())
                assert torch.equal(tensor.scale.flatten(), stored[name + "_scale"].flatten())


@pytest.mark.parametrize("shape", [(1,), ()])
def test_one_scale_for_a_matrix(plain, tmp_path, shape):
    folder = store(plain, tmp_path / "fp8", compressed_tensors(strategy="tensor"), None, "_scale", shape)
    stored = load_file(folder / "model.safetensors")
    with LLM(folder, device="cpu") as llm:
        for name, tensor in llm.engine.model.checkpoint_tensors().items():
            if isinstance(tensor, QuantizedWeight):
                assert torch.equal(dequantized(tensor, torch.float32), stored[name].float() * stored[name + "_scale"])


@pytest.mark.parametrize(
    ("about", "suffix"),
    [
        (fine_grained(16, 24), "_scale_inv"),
        (fine_grained(16, 24, fmt="e4m3", modules_to_not_convert=["lm_head"]), "_scale_inv"),
        (compressed_tensors(strategy="block", block_structure=[16, 24]), "_scale"),
    ],
)
def test_scales_of_blocks_become_those_of_channels(plain, tmp_path, about, suffix):
    """Each value is rounded once more, by half a step at most; 24 divides no matrix's width."""
    folder = store(plain, tmp_path / "fp8", about, (16, 24), suffix)
    stored = load_file(folder / "model.safetensors")
    with LLM(folder, device="cpu") as llm:
        for name, tensor in llm.engine.model.checkpoint_tensors().items():
            if isinstance(tensor, QuantizedWeight):
                exact = stored[name].float()
                for i, row in enumerate(stored[name + suffix]):
                    for j, scale in enumerate(row):
                        exact[16 * i : 16 * i + 16, 24 * j : 24 * j + 24] *= scale
                error = (dequantized(tensor, torch.float32) - exact).abs()
                assert (error <= (exact.abs() / 16).maximum(tensor.scale * 2**-10) * 1.0001).all()
        assert llm.generate([1, 2], SamplingParams(max_tokens=8), use_tqdm=False)


def test_a_head_in_fp8_is_widened(plain, tmp_path):
    folder = store(plain, tmp_path / "fp8", compressed_tensors(), (1, 10**6), "_scale", head=True)
    stored = load_file(folder / "model.safetensors")
    with LLM(folder, device="cpu") as llm:
        assert torch.equal(llm.engine.model.lm_head, stored[HEAD].float() * stored[HEAD + "_scale"])


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("fp8", "quantization_config='fp8' is not implemented, only weights in FP8 .E4M3. with dynamic activations"),
        ({"bits": 4, "quant_method": "gptq"}, "quantization_config=.*'gptq'.* is not implemented"),
        ({"quant_method": ["fp8"]}, "is not implemented"),
        (fine_grained(), "weight_block_size'?: .* is not implemented"),
        (fine_grained(128, 128, activation_scheme="static"), "is not implemented"),
        (fine_grained(128, 128, fmt="e5m2"), "is not implemented"),
        (fine_grained(128, 128, scale_fmt="ue8m0"), "is not implemented"),
        (fine_grained(128, True), "is not implemented"),
        (compressed_tensors() | {"format": "int-quantized"}, "is not implemented"),
        (compressed_tensors() | {"kv_cache_scheme": {"num_bits": 8}}, "is not implemented"),
        (compressed_tensors() | {"config_groups": {}}, "is not implemented"),
        (compressed_tensors() | {"config_groups": {"FP8": ["Linear"]}}, "is not implemented"),
        (compressed_tensors(num_bits=4), "is not implemented"),
        (compressed_tensors(ACTIVATIONS | {"dynamic": False}), "is not implemented"),
        (compressed_tensors(None), "is not implemented"),
        (compressed_tensors(symmetric=False), "is not implemented"),
        (compressed_tensors(strategy="group"), "is not implemented"),
        (compressed_tensors(strategy="block"), "is not implemented"),
        (compressed_tensors(dynamic=True), "is not implemented"),
    ],
)
def test_other_quantisations_are_named_before_anything_is_loaded(plain, tmp_path, monkeypatch, about, message):
    folder = store(plain, tmp_path / "fp8", about, (1, 10**6), "_scale")
    monkeypatch.setattr(torch, "empty", lambda *args, **options: pytest.fail("something was allocated"))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        LLM(folder, device="cpu")


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, change):
    return lambda tensors: tensors.__setitem__(name, change(tensors[name]))


MATRIX = "model.transformer.blocks.1.k_proj.weight"


def with_a_nan(values):
    values.view(torch.uint8)[3, 2] = 0xFF
    return values


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop(MATRIX + "_scale"), "the weights do not fit the config: 1 missing: .*blocks.1.k_proj.weight_scale"),
        (
            put(MATRIX, torch.Tensor.float),
            "k_proj.weight in .* has dtype F32, and its layer is quantised by the config",
        ),
        (
            put(MATRIX + "_scale", lambda scale: scale[:5]),
            r"k_proj.weight_scale in .* has shape \[5, 1\], the config asks for \[16, 1\] or \[16\] or \[1\] or \[\]",
        ),
        (
            put(MATRIX + "_scale", lambda scale: scale.to(torch.int32)),
            "k_proj.weight_scale in .* has dtype I32, which is not a plain floating point type",
        ),
        (
            put(MATRIX + "_scale", lambda scale: scale * torch.nan),
            "k_proj.weight has values that are NaN or infinite in",
        ),
        (put(MATRIX, with_a_nan), "k_proj.weight has values that are NaN or infinite in fp8"),
        (lambda tensors: tensors.update(odd=torch.zeros(1)), "1 unexpected: odd"),
    ],
)
def test_damage_is_named(plain, tmp_path, damage, message):
    folder = store(plain, tmp_path / "fp8", compressed_tensors(), (1, 10**6), "_scale")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        LLM(folder, device="cpu")


def test_a_plain_tensor_with_a_nan_is_named_where_it_is_quantised(plain, tmp_path):
    for path in plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[MATRIX][2, 3] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="k_proj.weight has values that are NaN or infinite in fp8"):
        LLM(tmp_path, device="cpu", quantization="fp8")
