"""LLaDA-MoE and LLaDA2: the published names and ids, the logits and the routing of a second implementation."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockinfer import LLM, SamplingParams
from blockinfer.kernels import router
from blockinfer.models.registry import SHAPES, model_class, published, read_model_config
from tests.families.checkpoints import LLADA2, LLADA_MOE, write_family, write_tokenizer
from tests.families.forward import logits_of, relative_error
from tests.families.networks import LLaDA2Network, LLaDAMoENetwork

NETWORK = {"LLaDAMoEModelLM": LLaDAMoENetwork, "LLaDAMoEModel": LLaDAMoENetwork, "LLaDA2MoeModelLM": LLaDA2Network}
TOKENS = random.Random(0).choices(range(61), k=29)


@pytest.mark.parametrize(
    "config, options",
    [
        (LLADA_MOE, dict()),
        (LLADA_MOE, dict(num_key_value_heads=2, num_experts_per_tok=1, shards=4, seed=1)),
        (LLADA_MOE, dict(architectures=["LLaDAMoEModel"], num_experts=3, partial_rotary_factor=0.25, seed=2)),
        (LLADA_MOE, dict(norm_topk_prob=True, expert_intermediate_size=17, rms_norm_eps=1e-2, seed=3)),
        (LLADA2, dict()),
        (LLADA2, dict(num_key_value_heads=1, num_experts_per_tok=1, shards=4, seed=1)),
        (LLADA2, dict(n_group=8, topk_group=2, first_k_dense_replace=2, seed=2)),
        (LLADA2, dict(n_group=1, topk_group=1, num_shared_experts=0, routed_scaling_factor=1.0, seed=3)),
        (LLADA2, dict(first_k_dense_replace=0, partial_rotary_factor=1.0, rotary_dim=16, rms_norm_eps=1e-2, seed=4)),
    ],
)
def test_logits_and_routing_are_the_second_implementation_s(tmp_path, config, options, monkeypatch):
    folder = write_family(tmp_path, config, **options)
    routed, route = [], router.route_torch
    monkeypatch.setattr(router, "route_torch", lambda *args: routed.append(route(*args)) or routed[-1])
    for name, dtype, error in (("float32", torch.float32, 1e-5), ("float64", torch.float64, 1e-12)):
        with LLM(folder, device="cpu", dtype=name, mask_token_id=57) as llm:
            found = logits_of(llm.engine.model, TOKENS)
        other = NETWORK[config["architectures"][0]](folder, dtype)
        expected = other.logits(TOKENS)
        assert relative_error(found, expected) < error
        top_k = other.config["num_experts_per_tok"]
        # of the last layer `logits` computes the rows once more, all of them here
        assert [one.experts[:, :top_k].tolist() for one in routed] == other.routed
        routed.clear()
    # one that knows no positions, or always takes the same experts, would be far off
    assert relative_error(found, NETWORK[config["architectures"][0]](folder, dtype).logits(TOKENS[::-1]).flip(0)) > 0.1
    assert len({tuple(experts) for experts in other.routed[0]}) > 2


def test_segments_are_block_causal_attention(tmp_path):
    """A staircase: each segment sees all up to its own end."""
    folder = write_family(tmp_path, LLADA2)
    with LLM(folder, device="cpu", dtype="float64", mask_token_id=57) as llm:
        found = logits_of(llm.engine.model, TOKENS, [8, 8, 8, 5])
    other = LLaDA2Network(folder, torch.float64)
    assert relative_error(found, other.logits(TOKENS, block=8)) < 1e-12
    assert relative_error(found, other.logits(TOKENS)) > 1e-2


@pytest.mark.parametrize("config", [LLADA_MOE, LLADA2])
def test_bfloat16(tmp_path, config):
    """Most tokens go to the same experts; the rest may be told by a rounding."""
    dtype = "torch_dtype" if "torch_dtype" in config else "dtype"
    folder = write_family(tmp_path, config, **{dtype: "bfloat16"})
    with LLM(folder, device="cpu", dtype="bfloat16", mask_token_id=57) as llm:
        assert llm.engine.model.cos_sin.dtype == torch.bfloat16
        found = logits_of(llm.engine.model, TOKENS)
    expected = NETWORK[config["architectures"][0]](folder, torch.bfloat16).logits(TOKENS)
    errors = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    assert errors.median() < 0.05


@pytest.mark.parametrize("config", [LLADA_MOE, LLADA2])
def test_every_tensor_is_copied_to_its_place(tmp_path, config):
    folder = write_family(tmp_path, config)
    stored = load_file(folder / "model.safetensors")
    with LLM(folder, device="cpu", mask_token_id=57) as llm:
        loaded = llm.engine.model.checkpoint_tensors()
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name], stored[name]) for name in stored)
        assert sum(t.numel() for t in loaded.values()) == sum(p.numel() for p in llm.engine.model.parameters())


def test_the_bias_stays_in_float32(tmp_path):
    folder = write_family(tmp_path, LLADA2)
    stored = load_file(folder / "model.safetensors")
    with LLM(folder, device="cpu", dtype="bfloat16", mask_token_id=57) as llm:
        bias = llm.engine.model.layers[1].mlp.bias
    assert bias.dtype == torch.float32 and torch.equal(bias, stored["model.layers.1.mlp.gate.expert_bias"])


@pytest.mark.parametrize("config", [LLADA_MOE, LLADA2])
def test_the_ids_where_the_config_is_silent(tmp_path, config):
    """156895 masks and 156892 ends, where there are embeddings for them; the role's end is the tokenizer's."""
    tiny = dict(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_experts=4)
    tiny |= dict(head_dim=16, n_group=1, topk_group=1, num_experts_per_tok=1, moe_layer_freq=None)
    folder = write_family(tmp_path, config, **tiny, vocab_size=157184)
    with LLM(folder, device="cpu", max_num_seqs=1) as llm:
        assert llm.config.mask_token_id == 156895 and llm.engine.stop_token_ids == {156892}
    special = {"<|endoftext|>": 256, "<|role_end|>": 257, "<|mask|>": 258, "<role>": 259}
    template = "{% for m in messages %}<role>{{ m.role | upper }}</role>{{ m.content }}<|role_end|>{% endfor %}<role>"
    write_tokenizer(folder, special, 260, eos_token="<|endoftext|>", mask_token="<|mask|>", chat_template=template)
    with LLM(folder, device="cpu", max_num_seqs=1) as llm:
        assert llm.config.mask_token_id == 258 and llm.engine.stop_token_ids == {256, 257}
        (prompt,) = llm.chat_prompts([{"role": "user", "content": "hi"}])
        assert prompt["prompt"] == "<role>USER</role>hi<|role_end|><role>"
        assert prompt["prompt_token_ids"].count(259) == 2 and prompt["prompt_token_ids"].count(257) == 1
    published = {"<|endoftext|>": 156892, "<|mask|>": 156895, "<|role_end|>": 156900}
    for named in ({}, {"eos_token": "<|endoftext|>"}, {"eos_token": "<|role_end|>"}):
        write_tokenizer(folder, published, 260, **named)
        with LLM(folder, device="cpu", max_num_seqs=1) as llm:
            assert llm.config.mask_token_id == 156895 and llm.engine.stop_token_ids == {156892, 156900}


@pytest.mark.parametrize("shape, parameters", [("llada-moe-7b", 7_356_880_896), ("llada2-mini", 16_255_643_392)])
def test_the_published_shapes(shape, parameters):
    config = read_model_config(SHAPES[shape], shape)
    assert config.usual_mask_token_id == 156895 and config.usual_eos_token_id == 156892
    groups = published(config)
    assert sum(group.parameters_of(1) for group in groups) == parameters
    model = model_class(config.architecture, "")(config, torch.bfloat16, torch.device("meta"), 16)
    expected = dict(tensor for group in groups for tensor in group.tensors())
    assert expected == {name: tuple(tensor.shape) for name, tensor in model.checkpoint_tensors().items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


WRONG = [
    (LLADA_MOE, {"num_experts": 10}, r"8 unexpected|6 missing: model.layers.0.mlp.experts.9.down_proj.weight"),
    (LLADA_MOE, {"num_experts": 2000}, "num_experts must be at most 1024, got 2000"),
    (LLADA_MOE, {"num_experts": None}, "num_experts is missing"),
    (LLADA_MOE, {"num_experts": 1000}, "asks for num_hidden_layers=2 of num_experts=1000, and there are 75 tensors"),
    (LLADA_MOE, {"num_experts_per_tok": 10}, "num_experts_per_tok=10 is more than num_experts=9$"),
    (
        LLADA_MOE,
        {"moe_layer_freq": [0, 1]},
        r"moe_layer_freq=\[0, 1\] is not implemented, only 1 for each of the 2 layers",
    ),
    (LLADA_MOE, {"moe_router_score_function": "sigmoid"}, "moe_router_score_function='sigmoid' is not implemented"),
    (LLADA_MOE, {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True is not implemented"),
    (LLADA_MOE, {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8 is not implemented"),
    (LLADA_MOE, {"qk_layernorm": False}, "qk_layernorm=False is not implemented"),
    (LLADA_MOE, {"router_num_group": 3}, "router_num_group=3 is not implemented"),
    (LLADA_MOE, {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5 is not implemented"),
    (LLADA_MOE, {"clip_qkv": 8.0}, "clip_qkv=8.0 is not implemented"),
    (LLADA_MOE, {"partial_rotary_factor": 2.0}, "partial_rotary_factor=2 of 8 dimensions must be an even number"),
    (LLADA_MOE, {"partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4 of 8 dimensions must be an even number"),
    (LLADA2, {"n_group": 3}, "num_experts=16 does not split into n_group=3 groups"),
    (LLADA2, {"n_group": 16}, "n_group=16 of num_experts=16 are groups of one, where two count"),
    (LLADA2, {"topk_group": 5}, "topk_group=5 is more than n_group=4"),
    (LLADA2, {"topk_group": 1, "num_experts_per_tok": 5}, "is more than the 4 experts of topk_group=1 groups"),
    (LLADA2, {"n_group": None}, "n_group is missing"),
    (LLADA2, {"first_k_dense_replace": 4}, "first_k_dense_replace must be at most 3, got 4"),
    (LLADA2, {"first_k_dense_replace": 0}, "53 missing: model.layers.0.mlp.experts.0.down_proj.weight"),
    (LLADA2, {"rotary_dim": 16}, "rotary_dim=16 is not what partial_rotary_factor=0.5 makes of 16 dimensions, 8"),
    (LLADA2, {"router_dtype": "bf16"}, "router_dtype='bf16' is not implemented, only 'fp32' is"),
    (LLADA2, {"score_function": "softmax"}, "score_function='softmax' is not implemented"),
    (LLADA2, {"norm_topk_prob": False}, "norm_topk_prob=False is not implemented"),
    (LLADA2, {"norm_head": True}, "norm_head=True is not implemented"),
    (LLADA2, {"num_shared_experts": 2}, "num_shared_experts=2 is not implemented"),
    (LLADA2, {"use_qk_norm": False}, "use_qk_norm=False is not implemented"),
    (LLADA2, {"use_qkv_bias": True}, "use_qkv_bias=True is not implemented"),
    (LLADA2, {"head_dim": 32}, "head_dim=32 is not implemented, only hidden_size / num_attention_heads, 16, is"),
    (LLADA2, {"use_sliding_window": True}, "use_sliding_window=True is not implemented"),
    (LLADA2, {"routed_scaling_factor": 0}, "routed_scaling_factor must be a positive number, got 0"),
    (LLADA2, {"expert_capacity": 8}, "expert_capacity=8 is not implemented, only None is"),
    (LLADA2, {"delete_token_id": 5}, "delete_token_id=5 is not implemented, only None is"),
    (LLADA2, {"block_size": 64}, "block_size=64 is not implemented, only 32 is"),
    (LLADA2, {"split_token_id": 5}, "split_token_id=5 is not implemented, only None is"),
    (LLADA2, {"compression_config": {"format": "int"}}, "compression_config={'format': 'int'} is not implemented"),
]


@pytest.mark.parametrize("config, says, message", WRONG)
def test_configs_that_are_wrong(tmp_path, config, says, message):
    folder = write_family(tmp_path, config, says=says)
    with pytest.raises(ValueError, match=message):
        LLM(folder, device="cpu", mask_token_id=57)


@pytest.mark.parametrize(
    "config, says",
    [
        # the published classes' defaults
        (LLADA2, {"partial_rotary_factor": None}),
        (LLADA2, {"partial_rotary_factor": None, "rotary_dim": None}),
        (LLADA_MOE, {"partial_rotary_factor": None}),
        (LLADA_MOE, {"router_num_group": -2, "router_topk_group": -2}),
    ],
)
def test_configs_that_leave_a_field_to_its_class(tmp_path, config, says):
    found = []
    for folder in (write_family(tmp_path / "plain", config), write_family(tmp_path / "silent", config, says=says)):
        with LLM(folder, device="cpu", mask_token_id=57) as llm:
            found.append(logits_of(llm.engine.model, TOKENS))
    assert torch.equal(*found)


def test_a_shared_expert_of_width_0_is_none(tmp_path):
    """Which LLaDA2's class stores where num_shared_experts is 0."""
    folder = write_family(tmp_path, LLADA2, num_shared_experts=0)
    params = SamplingParams(max_tokens=8, block_length=4, ignore_eos=True)
    empty = {"gate_proj": (0, 64), "up_proj": (0, 64), "down_proj": (64, 0)}
    extra = {f"model.layers.1.mlp.shared_experts.{x}.weight": torch.empty(shape) for x, shape in empty.items()}
    answers = []
    for tensors in ({}, extra):
        damaged(lambda stored, tensors=tensors: stored.update(tensors))(folder)
        with LLM(folder, device="cpu", mask_token_id=57) as llm:
            answers.append(llm.generate([6, 7, 8], params, use_tqdm=False)[0].outputs[0].token_ids)
    assert answers[0] == answers[1]


def damaged(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


ROUTER, BIAS = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.expert_bias"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(EXPERT), f"1 missing: {EXPERT}"),
        (lambda t: t.pop(BIAS), f"1 missing: {BIAS}"),
        (lambda t: t.update({ROUTER: t[ROUTER].to(torch.int8)}), f"{ROUTER} in .* has dtype I8, which is not a plain"),
        (lambda t: t.update({ROUTER: t[ROUTER][:-1].clone()}), r"has shape \[15, 64\], the config asks for \[16, 64\]"),
        (
            lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}),
            r"has shape \[64, 24\], the config asks for \[24, 64\]",
        ),
        (lambda t: t[BIAS].fill_(torch.nan), f"{BIAS} has values that are NaN or infinite in torch.float32"),
        (lambda t: t.update({"model.layers.1.mlp.w1": torch.zeros(1)}), "1 unexpected: model.layers.1.mlp.w1"),
    ],
)
def test_damaged_weights(tmp_path, change, message):
    folder = write_family(tmp_path, LLADA2)
    damaged(change)(folder)
    with pytest.raises(ValueError, match=message):
        LLM(folder, device="cpu", mask_token_id=57)


def test_llada_moe_decodes_in_every_mode(tmp_path):
    """It looks both ways, as LLaDA does, and takes all modes in one batch."""
    folder = write_family(tmp_path, LLADA_MOE)
    modes = ["vanilla", "prefix_cache", "dual_cache", "block", "block_refresh"]
    params = [SamplingParams(mode=mode, max_tokens=12, block_length=4, ignore_eos=True) for mode in modes]
    with LLM(folder, device="cpu", mask_token_id=57, dtype="float64") as llm:
        together = llm.generate([[6, 7, 8]] * 5, params, use_tqdm=False)
        alone = [llm.generate([6, 7, 8], one, use_tqdm=False)[0] for one in params]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    # in one block of everything vanilla and block are the same
    whole = [SamplingParams(mode=mode, max_tokens=8, block_length=8, ignore_eos=True) for mode in ("vanilla", "block")]
    network = LLaDAMoENetwork(folder, torch.float64)
    canvas = [6, 7, 8] + [57] * 8
    while 57 in canvas:
        logits = network.logits(canvas)
        logits[:, 57] = -torch.inf
        probabilities, tokens = logits.softmax(-1).max(-1)
        best = max((i for i, token in enumerate(canvas) if token == 57), key=lambda i: probabilities[i].item())
        canvas[best] = int(tokens[best])
    with LLM(folder, device="cpu", mask_token_id=57, dtype="float64") as llm:
        assert llm.generate([6, 7, 8], whole[0], use_tqdm=False)[0].outputs[0].token_ids == canvas[3:]


def test_what_a_row_is_multiplied_by():
    """Of LLaDA2-mini: one dense layer, and 19 of eight experts and a shared one with their router."""
    config = read_model_config(SHAPES["llada2-mini"], "llada2-mini")
    dense, sparse = 3 * 2048 * 5120, 9 * 3 * 2048 * 512 + 256 * 2048
    assert config.mlp_elements == pytest.approx((dense + 19 * sparse) / 20)
    # a prefill's largest tensors: pairs behind the first product and behind the second
    assert config.step_width >= 9 * (512 + 2048)
    assert read_model_config(SHAPES["llada-8b"], "").mlp_elements == 3 * 4096 * 12288
