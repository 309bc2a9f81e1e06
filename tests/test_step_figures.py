"""evals/timing/steps.py and stages.py, evals/test_steps.py: what a step's figures are, and what is timed."""

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import blockinfer.kernels
from blockinfer import LLM
from evals.results import compare
from evals.runs.configurations import STEP
from evals.runs.settings import TINY_MODEL, read_settings
from evals.test_steps import SIZES, measured_model
from evals.timing import stages, steps
from evals.timing.kernels import Ceilings
from evals.timing.stages import CONFIDENCE, LM_HEAD, OTHERS, PRODUCTS, RANKS, Kernel, own_times, stages_of
from evals.timing.steps import Case, Timed, figures, ragged_lengths, random_prompts, timed_run
from tests.checkpoints import write_checkpoint
from tests.report.sample import info


@pytest.fixture(scope="module")
def llm():
    with LLM(TINY_MODEL, device="cpu", max_num_seqs=2) as llm:
        yield llm


def test_ms_a_step_are_wall_time_over_forwards(monkeypatch, llm):
    clock = iter([10.0, 13.2])
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    case = Case("block", [(5, 16), (9, 16)], 8)
    # what was counted before is none of this run's
    llm.generate([1, 2, 3], case.params[0], use_tqdm=False)
    run, outputs = timed_run(llm, random_prompts(llm, case.lengths), case.params)
    # two blocks of eight steps; at the second block's first one the first block is committed
    assert run.forwards == 16 and run.rows == 5 + 9 + 2 * (16 * 8 + 8)
    assert run.lm_head_rows == 2 * 2 * sum(range(1, 9))
    # to the end of the block, those that two segments see once
    assert run.keys == 8 * (5 + 8) + 8 * (5 + 16) + 8 * (9 + 8) + 8 * (9 + 16)
    assert run.seconds == pytest.approx(3.2) and run.ms_per_step == pytest.approx(200)
    assert run.tokens == 32 and all(len(output.outputs[0].token_ids) == 16 for output in outputs)


def test_figures_are_medians_of_the_rounds_and_the_first_run_is_beside_them():
    rounds = [Timed(seconds, 10, 80, 40, 700, tokens=20, preemptions=0) for seconds in (2.0, 1.0, 2.0, 3.0)]
    info = figures(9.0, rounds)
    assert info["ms_per_step"] == pytest.approx(200) and info["tokens_per_second"] == pytest.approx(10)
    assert info["first_seconds"] == 9.0 and info["rounds"] == 4 and info["forwards"] == 10
    assert info["steady"] and info["unsteady"] is None
    assert figures(9.0, rounds[:1])["relative_error"] is figures(9.0, rounds[:1])["steady"] is None
    json.dumps(info, allow_nan=False)


def test_figures_are_of_the_rounds_after_one_that_captured_or_compiled():
    rounds = [Timed(3.0, 10, 80, 40, 700, 20, 0, graphs=1, compiled=2)]
    rounds += [Timed(seconds, 10, 80, 40, 700, 20, 0) for seconds in (1.0, 1.2)]
    info = figures(9.0, rounds)
    assert info["seconds"] == pytest.approx(1.1) and info["rounds"] == 2 and not info["steady"]
    assert info["unsteady"] == "captured 1 CUDA graphs and compiled 2 kernels in round 1"


def test_what_was_captured_in_a_run_is_counted(llm, monkeypatch):
    case, run = Case("block", [(5, 8)], 8), llm.engine.runner.run

    def captures(scheduled):
        llm.engine.runner.stats.graphs += 1
        return run(scheduled)

    monkeypatch.setattr(llm.engine.runner, "run", captures)
    monkeypatch.setattr("blockinfer.llm.num_compiled_kernels", iter([5, 7]).__next__)
    timed, _ = timed_run(llm, random_prompts(llm, case.lengths), case.params)
    assert timed.round.graphs == timed.forwards == 8 and timed.round.compiled == 2


def test_what_a_step_takes_at_least(llm):
    """By the matrices that the model has; the embedding is the LM head, too."""
    ceilings = Ceilings(copy=1.0, read=1e9, matmul=1.0, sustained_matmul=1e12)
    config, parameters = llm.model_config, dict(llm.engine.model.named_parameters())
    matrices = sum(weight.numel() for weight in parameters.values() if weight.ndim == 2)
    all_rows = steps.least_ms(Timed(1.0, 2, 60, 60, 0, 1, 0), config, 4, ceilings)
    assert all_rows["least_products_ms"] == pytest.approx(1000 * 2 * matrices * 60 / 1e12 / 2)
    assert all_rows["least_read_ms"] == pytest.approx(1000 * 4 * matrices / 1e9)

    # of rows that reveal nothing, the last layer's K and V and attention alone are computed
    no_head = steps.least_ms(Timed(1.0, 2, 60, 0, 0, 1, 0), config, 4, ceilings)
    last = f"layers.{config.n_layers - 1}."
    left_out = sum(parameters[last + name].numel() for name in ("attn_out", "gate_up_proj", "ff_out"))
    left_out += llm.engine.model.lm_head.numel()
    assert no_head["least_products_ms"] == pytest.approx(1000 * 2 * (matrices - left_out) * 60 / 1e12 / 2)

    halves = steps.least_ms(Timed(1.0, 2, 60, 60, 0, 1, 0), config, 4, ceilings, ranks=2)
    assert halves["least_read_ms"] == pytest.approx(all_rows["least_read_ms"] / 2)
    assert halves["least_products_ms"] == pytest.approx(all_rows["least_products_ms"] / 2)

    keys = steps.least_ms(Timed(1.0, 2, 60, 60, 700, 1, 0), config, 4, ceilings)
    row = llm.engine.runner.kv_pages[:, :, 0, 0].numel() * 4
    assert keys["least_read_ms"] - all_rows["least_read_ms"] == pytest.approx(1000 * row * 700 / 1e9 / 2)

    # a byte for each value of the layers, at twice the pace; the head as before
    fp8 = steps.least_ms(Timed(1.0, 2, 60, 60, 0, 1, 0), config, 4, ceilings, "fp8")
    head = llm.engine.model.lm_head.numel()
    assert fp8["least_read_ms"] == pytest.approx(1000 * (matrices + 3 * head) / 1e9)
    assert fp8["least_products_ms"] == pytest.approx(1000 * (matrices + head) * 60 / 1e12 / 2)


@pytest.mark.parametrize("device", SIZES)
def test_ragged_requests_are_in_their_ranges(device):
    sizes = SIZES[device]
    lengths = sizes.ragged.lengths
    assert len(lengths) == sizes.number > sizes.many
    for values, (low, high) in zip(zip(*lengths, strict=True), (sizes.prompt_range, sizes.new_range), strict=True):
        assert all(low <= value <= high for value in values) and len(set(values)) > 4
        # over the whole range, its mean near the middle
        assert abs(sum(values) / len(values) - (low + high) / 2) < (high - low) / math.sqrt(len(values))
    ends = ragged_lengths(200, (1, 2), (3, 4))
    assert set(ends) == {(1, 3), (1, 4), (2, 3), (2, 4)}


def test_ragged_requests_are_the_same_in_every_run():
    """Of every Python, too: the numbers are those of one run."""
    assert ragged_lengths(3, (32, 2048), (64, 512)) == [(1735, 404), (880, 180), (1063, 245)]
    middle = SIZES["cuda"].uniform.lengths
    assert middle == [(1040, 288)] * 32


def test_prompts_are_of_ordinary_tokens_and_the_same_in_every_run(tmp_path):
    eos = list(range(0, 295, 2))
    folder = write_checkpoint(tmp_path, vocab_size=300, max_sequence_length=1024, eos_token_id=eos)
    with LLM(folder, device="cpu") as llm:
        lengths = [(500, 1), (400, 1)]
        prompts = random_prompts(llm, lengths)
        assert [len(prompt) for prompt in prompts] == [500, 400] and prompts == random_prompts(llm, lengths)
        assert prompts[0][:400] != prompts[1]
        special = {*eos, llm.config.mask_token_id, *(llm.tokenizer.all_special_ids if llm.tokenizer else ())}
        found = {token_id for prompt in prompts for token_id in prompt}
        assert not found & special and max(found) < 300 and len(found) > 100


def test_agreement_counts_tokens_and_sequences():
    def outputs(*sequences):
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(ids))]) for ids in sequences]

    info = steps.agreement(outputs("abcd", "abcd"), outputs("abcd", "axcy"))
    assert info == {"sequences_compared": 2, "share_of_tokens_equal": 0.75, "share_of_sequences_equal": 0.5}


def test_memory_beside_weights_and_cache(monkeypatch, llm):
    info = steps.memory(llm)
    runner = llm.engine.runner
    # the embedding is the LM head too, and counted once
    assert info["weights_gb"] == pytest.approx((TINY_MODEL / "model.safetensors").stat().st_size * 2 / 1e9, rel=0.01)
    assert info["kv_cache_gb"] == pytest.approx(runner.kv_pages.nbytes / 1e9) and info["other_gb"] is None
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5e9)
    on_gpu = SimpleNamespace(engine=llm.engine, config=SimpleNamespace(device=torch.device("cuda")))
    assert steps.memory(on_gpu)["other_gb"] == pytest.approx(5 - info["weights_gb"] - info["kv_cache_gb"])


def test_the_model_that_is_measured(pytestconfig):
    """What --model names; else on a GPU LLaDA-8B's shape with random weights, on a CPU the small model."""
    cpu = read_settings(pytestconfig)
    gpu = dataclasses.replace(cpu, device="cuda", model="GSAI-ML/LLaDA-8B-Instruct", dtype="auto", load_format="auto")
    cpu = dataclasses.replace(cpu, device="cpu", model=str(TINY_MODEL))
    assert measured_model(cpu, None) is cpu and measured_model(gpu, gpu.model) is gpu
    found = measured_model(gpu, None)
    assert (found.model, found.load_format, found.dtype) == ("llada-8b", "dummy", "bfloat16")
    assert found.is_dummy and not found.is_tiny
    assert measured_model(dataclasses.replace(gpu, dtype="float16"), None).dtype == "float16"


def test_steps_are_not_compared(tmp_path):
    path = tmp_path / "out.json"
    infos = {
        "test_ragged": {STEP: "ragged", "model_rows": 3},
        "test_throughput[block-8]": info("block", peak_memory_gib=9.0),
    }
    benchmarks = [{"name": name, "extra_info": one} for name, one in infos.items()]
    path.write_text(json.dumps({"benchmarks": benchmarks, "datetime": "2030-01-01"}))
    assert list(compare.read(str(path))) == ["test_throughput[block-8]"]


STEP_OF_KERNELS = [
    ("_masked_rows_kernel", OTHERS),
    ("void at::native::vectorized_gather_kernel<16, long>(char*, char*)", OTHERS),
    ("_rms_norm_kernel", "norms"),
    ("nvjet_tst_64x8_64x16_1x2_h_bz_TNT", PRODUCTS),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", PRODUCTS),
    ("_rope_store_kv_kernel", "RoPE + K/V store"),
    ("_wide_attention_kernel", "attention"),
    ("_paged_attention_kernel", "attention"),
    ("_combine_kernel", "attention"),
    ("_skinny_linear_kernel", PRODUCTS),
    ("_sum_parts_kernel", RANKS),
    ("_one_shot_sum_rms_norm_kernel", RANKS),
    ("_two_shot_sum_rms_norm_kernel", RANKS),
    ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", RANKS),
    ("_add_rms_norm_kernel", "norms"),
    ("_hopper_linear_kernel", PRODUCTS),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas", PRODUCTS),
    ("_silu_mul_kernel", "SiLU x up"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", PRODUCTS),
    ("void at::native::index_elementwise_kernel<128, 4>", OTHERS),
    ("nvjet_tst_128x32", LM_HEAD),
    ("splitKreduce_kernel", LM_HEAD),
    ("_tile_kernel", CONFIDENCE),
    ("_noise_kernel", CONFIDENCE),
    ("_combine_kernel", CONFIDENCE),
    ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", RANKS),
    ("_merge_kernel", CONFIDENCE),
    ("_unmask_kernel", OTHERS),
    ("Memcpy DtoH (Device -> Pinned)", OTHERS),
]


def kernels_of(names):
    return [Kernel(name, 3.0 * i, 3.0 * i + 2.0) for i, name in enumerate(names)]


def test_kernels_are_told_apart_by_name_and_order():
    names, expected = zip(*STEP_OF_KERNELS, strict=True)
    assert stages_of(kernels_of(names)) == list(expected)
    assert stages_of(kernels_of(["_combine_kernel"])) == [OTHERS]


def test_every_kernel_of_the_engine_has_a_stage():
    """A kernel that is renamed, or a new one, would else be counted with the unmasking's, and torch's."""
    folder = Path(blockinfer.kernels.__file__).parent
    names = {n for path in folder.glob("*.py") for n in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)}
    assert len(names) >= 6
    assert {name for name in names if stages.stage_of(name) == OTHERS} == {"_masked_rows_kernel", "_unmask_kernel"}


def test_time_by_stage_and_idle():
    names = [name for name, _ in STEP_OF_KERNELS]
    # two forwards, out of order; 2 us of 3 busy; without the profiler 100 us a step
    kernels = kernels_of(names * 2)[::-1]
    run, profiled = (Timed(seconds, 2, 64, 64, 128, 2, 0) for seconds in (200e-6, 300e-6))
    info = stages.figures(kernels, run, profiled)
    assert info["ms_by_stage"]["attention"] == pytest.approx(6e-3) and info["kernels_by_stage"]["attention"] == 3
    assert sum(info["ms_by_stage"].values()) == pytest.approx(2e-3 * len(names))
    assert info["idle_ms"] == pytest.approx(0.1 - 2e-3 * len(names)) and info["ms_per_step"] == pytest.approx(0.1)
    lines = stages.table(info)
    assert lines[-1].split()[:3] == ["wall", "time", "0.100"] and len(lines) == 3 + len(stages.STAGES)


@pytest.mark.parametrize("key, other", [("requests", 20), ("prompt_tokens", [32, 1024]), ("new_tokens", [8, 8])])
def test_steps_of_other_requests_are_not_compared(key, other):
    info = {"mode": "block", "requests": 200, "prompt_tokens": [32, 2048], "new_tokens": [64, 512]}
    assert compare.differences(info, dict(info)) == []
    assert compare.differences(info, info | {key: other}) == [f"{key} was {info[key]}, is {other}"]


def test_time_of_two_kernels_at_once_is_counted_once():
    """It is the time of the one that began first: what is launched early waits."""
    assert own_times([Kernel("a", 0, 4), Kernel("b", 1, 2), Kernel("c", 3, 6), Kernel("d", 8, 9)]) == [4, 0, 2, 1]


def test_stages_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert stages.main([]) == 2
    assert "this needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["no/stages.json", "/dev/null", "evals/llada_tiny/config.json"])
def test_the_file_of_the_stages_is_tried_before_they_are_measured(path, capsys):
    assert stages.main(["--json", path, "--model", "evals/llada_tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"stages: --json: '{path}' cannot be written: ") and error.count("\n") == 1
    for option in ("--json", "--model"):
        with pytest.raises(SystemExit):
            stages.main([option, ""])
        assert f"argument {option}: must not be empty, got ''" in capsys.readouterr().err
