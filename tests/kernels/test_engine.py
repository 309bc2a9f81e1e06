"""The whole engine on the kernels, in the interpreter too; tests/test_equivalence.py does more of it on a GPU."""

import pytest
import torch

from blockinfer import LLM, SamplingParams
from blockinfer.engine import model_runner
from blockinfer.kernels import activation, confidence, kv_store, linear, masked_rows, norm, paged_attention, unmasking
from tests.checkpoints import write_checkpoint
from tests.comparison import NEAR_TIE, assert_equivalent
from tests.reference import Reference

MODES = ["vanilla", "prefix_cache", "dual_cache", "block", "block_refresh"]
RULES = ["threshold", "entropy", "low_confidence", "factor", "random"]
VALUE = {"threshold": {"threshold": 0.3}, "factor": {"factor": 2.0}, "entropy": {"entropy_bound": 0.5}}
KERNELS = {
    activation: ["silu_mul_triton"],
    confidence: ["token_confidence_triton"],
    kv_store: ["rope_store_kv_triton"],
    linear: ["skinny_linear_triton"],
    norm: ["add_rms_norm_triton"],
    paged_attention: ["paged_attention_triton"],
    masked_rows: ["masked_rows_triton"],
    unmasking: ["unmask_triton"],
}


# with rows for skinny products in parts, and for those of more rows
SHAPES = {"dense": (dict(), True), "gqa": (dict(n_kv_heads=2, weight_tying=True), False)}


@pytest.mark.parametrize("shape, skinny", SHAPES.values(), ids=SHAPES)
def test_the_engine_on_the_kernels(device, shape, skinny, tmp_path, monkeypatch):
    """Every mode, each with another rule, in one ragged batch: two blocks, the second short; half of it with noise."""
    called = set()
    unused = activation if skinny else linear
    monkeypatch.setattr(linear, "_is_skinny", lambda x: skinny)
    monkeypatch.setattr(linear, "choose_tiling", lambda *args, **options: linear.Tiling(16, 16, 1 if options else 2))
    monkeypatch.setattr(model_runner, "runs_triton", lambda x: x.dtype != torch.float64)
    kernels = [(module, name) for module, names in KERNELS.items() for name in names if module is not unused]
    for module, name in kernels:
        kernel = getattr(module, name)
        monkeypatch.setattr(module, "runs_triton", lambda x: x.dtype != torch.float64)
        monkeypatch.setattr(module, name, lambda *a, k=kernel, n=name, **options: called.add(n) or k(*a, **options))
    folder = write_checkpoint(tmp_path / "model", seed=5, **shape)
    prompts = [list(range(3, 3 + length)) for length in (1, 9, 4, 11, 6)]
    fixed = dict(max_tokens=6, block_length=4, denoising_steps=2, seed=11)
    settings = [
        fixed | dict(mode=mode, unmasking=rule, temperature=index % 2 / 2) | VALUE.get(rule, {})
        for index, (mode, rule) in enumerate(zip(MODES, RULES, strict=True))
    ]
    options = dict(device=device, dtype="float32", page_size=4, max_num_seqs=7, enforce_eager=True)
    with LLM(folder, **options) as llm:
        outputs = llm.generate(prompts, [SamplingParams(**s, ignore_eos=True) for s in settings], use_tqdm=False)
    reference = Reference(folder)
    expected = [reference.generate(p, **s) for p, s in zip(prompts, settings, strict=True)]
    assert_equivalent([(r, o.outputs[0]) for r, o in zip(expected, outputs, strict=True)], margin=NEAR_TIE)
    assert called == {name for _, name in kernels}
