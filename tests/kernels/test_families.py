"""The networks of LLaDA's relatives on the kernels, in the interpreter too."""

import random

import pytest

from blockinfer import LLM
from blockinfer.kernels import activation, experts, kv_store, linear, norm, router
from tests.families.checkpoints import ILLADA, LLADA2, LLADA_MOE, write_family
from tests.families.forward import logits_of
from tests.families.networks import ILLaDANetwork, LLaDA2Network, LLaDAMoENetwork

KERNELS = {
    kv_store: "rope_store_kv_triton",
    norm: "add_rms_norm_triton",
    router: "route_triton",
    experts: "mixture_triton",
    linear: "skinny_linear_triton",
    activation: "silu_mul_triton",
}


@pytest.mark.parametrize("skinny", [True, False])
@pytest.mark.parametrize(
    "config, network", [(ILLADA, ILLaDANetwork), (LLADA_MOE, LLaDAMoENetwork), (LLADA2, LLaDA2Network)]
)
def test_logits(device, tmp_path, monkeypatch, config, network, skinny):
    folder = write_family(tmp_path, config)
    tokens = random.Random(1).choices(range(61), k=6)
    with LLM(folder, device=device, dtype="float32", enforce_eager=True, mask_token_id=57) as llm:
        model = llm.engine.model
    called = set()
    monkeypatch.setattr(linear, "_is_skinny", lambda x: skinny)
    monkeypatch.setattr(linear, "choose_tiling", lambda *args, **options: linear.Tiling(16, 16, 1 if options else 2))
    tiling = experts.ExpertTiling(16, 16, 16)
    monkeypatch.setattr(experts, "expert_tilings", lambda *args: (tiling, tiling))
    for module, name in KERNELS.items():
        kernel = getattr(module, name)
        monkeypatch.setattr(module, "runs_triton", lambda x: True)
        monkeypatch.setattr(module, name, lambda *a, k=kernel, n=name, **options: called.add(n) or k(*a, **options))
    found = logits_of(model, tokens).cpu()
    expected = network(folder).logits(tokens)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    left_out = {"skinny_linear_triton"} if not skinny else set()
    left_out |= {"silu_mul_triton"} if skinny or config is LLADA_MOE else set()
    left_out |= {"route_triton", "mixture_triton"} if config is ILLADA else set()
    assert called == set(KERNELS.values()) - left_out
