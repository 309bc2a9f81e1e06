"""The baseline through a checkpoint's own modelling code, with code that the test writes."""

import json
import textwrap

import pytest
import transformers

from blockinfer import LLM, SamplingParams
from evals.runs.reference_impl import ReferenceLLM
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.suite.test_runs import run_suite

# A LLaDA as its authors would publish one: configuration and model in two files, named in config.json's auto_map.
CONFIGURATION = """
from transformers import PretrainedConfig

class MyConfig(PretrainedConfig):
    model_type = "my-llada"
"""
MODELING = """
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_my import MyConfig

class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, m, kv = c.d_model, c.mlp_hidden_size, c.n_kv_heads * (c.d_model // c.n_heads)
        self.c, self.attn_norm, self.ff_norm = c, Norm(d, c.rms_norm_eps), Norm(d, c.rms_norm_eps)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, n, bias=False) for n in (d, kv, kv))
        self.attn_out, self.ff_proj = nn.Linear(d, d, bias=False), nn.Linear(d, m, bias=False)
        self.up_proj, self.ff_out = nn.Linear(d, m, bias=False), nn.Linear(m, d, bias=False)

    def forward(self, x):
        B, L, d = x.shape
        head = d // self.c.n_heads
        y = self.attn_norm(x)
        q, k, v = (p(y).view(B, L, -1, head).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        angles = torch.arange(L)[:, None] * self.c.rope_theta ** -(torch.arange(0, head, 2) / head)
        cos, sin = angles.cos().repeat(1, 2).to(x), angles.sin().repeat(1, 2).to(x)
        turn = lambda t: t * cos + torch.cat([-t[..., head // 2:], t[..., : head // 2]], -1) * sin
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, enable_gqa=True)
        x = x + self.attn_out(y.transpose(1, 2).reshape(B, L, d))
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))

class MyModel(PreTrainedModel):
    config_class = MyConfig

    def __init__(self, config):
        super().__init__(config)
        c = config
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict({
            "wte": nn.Embedding(c.embedding_size, c.d_model),
            "blocks": nn.ModuleList(Layer(c) for _ in range(c.n_layers)),
            "ln_f": Norm(c.d_model, c.rms_norm_eps),
            "ff_out": nn.Linear(c.d_model, c.embedding_size, bias=False),
        })
        self.post_init()

    def forward(self, input_ids):
        t = self.model.transformer
        x = t["wte"](input_ids)
        for layer in t["blocks"]:
            x = layer(x)
        return CausalLMOutput(logits=t["ff_out"](t["ln_f"](x)))
"""


def write_with_code(folder, modeling=MODELING):
    write_checkpoint(folder, vocab_size=300, max_sequence_length=1024)
    write_tokenizer(folder)
    (folder / "configuration_my.py").write_text(textwrap.dedent(CONFIGURATION))
    (folder / "modeling_my.py").write_text(textwrap.dedent(modeling))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_my.MyConfig", "AutoModel": "modeling_my.MyModel"}
    config["model_type"] = "my-llada"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_with_code(tmp_path_factory.mktemp("with_code"))


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    """Where transformers copies the code to."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_its_tokens_are_those_of_vanilla(folder):
    prompts = [[1 + i, 2, 3 + i] * (i + 1) for i in range(5)]
    params = SamplingParams(mode="vanilla", max_tokens=20, block_length=8, unmasking="threshold")
    with LLM(folder, device="cpu", dtype="float64") as llm:
        reference = ReferenceLLM(llm)
        ours = llm.generate(prompts, params, use_tqdm=False)
        before = llm.stats.forwards
        theirs = reference.generate(prompts, params, use_tqdm=False)
        assert llm.stats.forwards == before, "the engine's own model takes no part"
    assert [o.outputs for o in theirs] == [o.outputs for o in ours]
    assert [o.metrics.nfe for o in theirs] == [o.metrics.nfe for o in ours]
    assert reference.stats.forwards == sum(o.metrics.nfe for o in theirs), "one request at a time"


def test_the_suite_times_it_beside_the_others(tmp_path, folder):
    options = [f"--model={folder}", "--mode=vanilla", "--reference-impl", "--trust-remote-code"]
    code, text, benchmarks, _ = run_suite(tmp_path, *options)
    assert code == 0, text
    ours, theirs = (benchmarks[f"test_throughput[{m}-8]"]["extra_info"] for m in ("vanilla", "reference_impl"))
    assert (theirs["nfe"], theirs["tokens"]) == (ours["nfe"], ours["tokens"])
    assert theirs["forwards"] == theirs["nfe"] > ours["forwards"]
    assert (theirs["batch_size"], ours["batch_size"]) == (1, 8)


def test_a_checkpoint_without_code(tmp_path):
    folder = write_checkpoint(tmp_path)
    with LLM(folder, device="cpu") as llm:
        with pytest.raises(ValueError, match="does not appear to have a file named configuration_llada.py"):
            ReferenceLLM(llm)
        config = json.loads((folder / "config.json").read_text())
        del config["auto_map"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="brings no modelling code: its config.json has no auto_map for it"):
            ReferenceLLM(llm)


def test_code_that_does_not_load_names_the_transformers_it_needs(tmp_path):
    folder = write_with_code(tmp_path, "from transformers import SomethingThatWasRemoved\n" + MODELING)
    here = transformers.__version__.replace(".", r"\.")
    message = f"does not load with transformers {here}; it was saved with 4.46.3: .*SomethingThatWasRemoved"
    with LLM(folder, device="cpu") as llm, pytest.raises(ValueError, match=message):
        ReferenceLLM(llm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reference-impl"], "runs the code that the checkpoint brings: read it, then pass --trust-remote-code"),
        (["--trust-remote-code"], "--trust-remote-code is read by --reference-impl alone"),
        (["--reference-impl", "--trust-remote-code", "--load-format=dummy"], "--reference-impl needs a checkpoint"),
    ],
)
def test_bad_options(tmp_path, folder, options, message):
    code, text, _, result = run_suite(tmp_path, f"--model={folder}", "--mode=vanilla", *options)
    assert code == 4 and message in text and "Traceback" not in text and result is None
