"""CUDA graphs: few, all captured while the model is loaded; and nothing is compiled or captured afterwards."""

import itertools

import pytest
import torch

from blockinfer import LLM, SamplingParams, ScoringParams
from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from blockinfer.engine.graphs import MAX_GRAPH_ROWS, ROW_TILE, StepGraphs, default_sizes
from blockinfer.kernels.backend import num_compiled_kernels
from tests.checkpoints import write_checkpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("largest", [1, 8, 100, 128, 129, 512, 600, 2047, 2048, 8192])
def test_sizes_are_few_and_near(largest):
    sizes = default_sizes(largest)
    assert sizes == sorted(set(sizes)) and len(sizes) <= 40
    assert min(largest, MAX_GRAPH_ROWS) <= sizes[-1] <= MAX_GRAPH_ROWS
    # only the last is more than can be needed, and no more than whole tiles, for which there is memory
    assert all(size < largest for size in sizes[:-1]) and sizes[-1] <= -(-largest // ROW_TILE) * ROW_TILE
    graphs = StepGraphs(lambda size, cut: None, sizes)
    for rows in range(1, min(largest, MAX_GRAPH_ROWS) + 1):
        assert graphs.padded(rows) in sizes
        assert rows <= graphs.padded(rows) <= max(rows + 7, rows * 1.25)


def test_what_was_not_captured_runs_plainly_in_whole_tiles():
    called = []

    def function(size, cut):
        assert cut is None
        called.append(size)

    graphs = StepGraphs(function, [8, 16])
    assert [graphs.padded(size) for size in (1, 8, 9, 16, 17, 128, 129)] == [8, 8, 16, 16, 128, 128, 256]
    graphs(256)
    assert called == [256]
    assert [StepGraphs(function, []).padded(size) for size in (1, 9, 300)] == [1, 9, 300]


@pytest.mark.parametrize("largest", [64, 128, 512])
def test_there_is_memory_for_every_size(tmp_path, largest):
    with LLM(write_checkpoint(tmp_path), device="cpu", max_model_len=64, max_num_batched_tokens=largest) as llm:
        llm.generate([1], SamplingParams(max_tokens=1), use_tqdm=False)
        runner = llm.engine.runner
        with torch.inference_mode():
            for size in default_sizes(largest):
                runner._run_layers(size)
                runner._run_reveal(size)


def requests():
    """Prompts and params of every mode with every rule, at several lengths, temperatures and flags, in pairs."""
    flags = itertools.cycle([{}, {"logits_eos_inf": True}, {"confidence_eos_eot_inf": True}])
    lengths = itertools.cycle([(1, 1, 1), (5, 7, 4), (33, 40, 32), (100, 64, 64), (17, 130, 130)])
    for mode, rule, temperature in itertools.product(MODES, RULES, [0.0, 0.7]):
        prompt, new, block = next(lengths)
        flag = next(flags) if rule != "sequential" else {}
        limit = {"denoising_steps": 3} if temperature else {}
        options = dict(mode=mode, unmasking=rule, temperature=temperature, max_tokens=new, block_length=block)
        yield [1 + i % 7 for i in range(prompt)], SamplingParams(**options, **flag, **limit, ignore_eos=True)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_after_loading_nothing_is_compiled_or_captured(tmp_path, dtype):
    """Of any mode, rule, length, temperature or flag, one request at a time and many, and of more rows than a graph."""
    folder, before = write_checkpoint(tmp_path, max_sequence_length=4096), num_compiled_kernels()
    with LLM(folder, device="cuda", dtype=dtype, max_num_seqs=16) as llm:
        loaded = llm.stats
        assert loaded.graphs == 2 * len(default_sizes(8192)) and loaded.capture_seconds > 0
        # the kernels' variants: by head sizes and tiles, which are few, and by no request
        assert loaded.compiled - before <= 60
        prompts, params = zip(*requests(), strict=True)
        for pair in list(zip(prompts, params, strict=True))[::4]:
            llm.generate(*pair, use_tqdm=False)
        llm.generate(list(prompts), list(params), use_tqdm=False)
        wide = SamplingParams(mode="vanilla", max_tokens=1100, block_length=1100, denoising_steps=2, ignore_eos=True)
        llm.generate([[1] * 1500] * 3, wide, use_tqdm=False)
        for rows in (1, 5, 70):
            short = dict(max_tokens=rows, block_length=rows, denoising_steps=2, ignore_eos=True)
            llm.generate([1, 2, 3], SamplingParams(**short, logprobs=3, cfg_scale=1.0), use_tqdm=False)
            llm.score([[1, 2]], [[3] * rows], ScoringParams(mc_num=40, cfg_scale=0.5), use_tqdm=False)
            llm.score([[1] * 700], [[3] * rows], ScoringParams(mc_num=40, mode="block"), use_tqdm=False)
        llm.choose([[1, 2, 3]], [[4], [5]], use_tqdm=False)
        spans = {"prompt_token_ids": [1, 57, 57, 2, 57], "infill": True}
        llm.generate(spans, SamplingParams(mode="vanilla", logprobs=1), use_tqdm=False)
        now = llm.stats
    assert (now.graphs, now.compiled) == (loaded.graphs, loaded.compiled)


@pytest.mark.gpu
@needs_gpu
def test_sizes_may_be_given_and_graphs_left_out(tmp_path):
    folder = write_checkpoint(tmp_path)
    made = {}
    for name, options in (
        ("few", {"cudagraph_capture_sizes": [4, 40]}),
        ("none", {"enforce_eager": True}),
        ("small", {"max_model_len": 60, "max_num_batched_tokens": 100}),
        ("all", {}),
    ):
        with LLM(folder, device="cuda", dtype="float32", **options) as llm:
            params = SamplingParams(max_tokens=24, block_length=8, ignore_eos=True)
            made[name] = [o.outputs for o in llm.generate([[1, 2, 3], [4] * 30], params, use_tqdm=False)]
            graphs = {"few": 4, "none": 0, "small": 2 * len(default_sizes(100)), "all": 2 * len(default_sizes(8192))}
            assert llm.stats.graphs == graphs[name]
    assert made["few"] == made["none"] == made["small"] == made["all"]


@pytest.mark.gpu
@needs_gpu
def test_steps_with_wide_segments_have_graphs_of_their_own(tmp_path):
    """On GPUs where these have a kernel of their own: of 128 rows and more, among others, in every mode.

    A product of other rows beside its own may round otherwise, so in bfloat16 a few tokens may tip.
    """
    folder = write_checkpoint(tmp_path, max_sequence_length=1024, d_model=256, n_heads=4, n_kv_heads=2)
    modes = ["vanilla", "prefix_cache", "dual_cache", "block", "block_refresh"]
    prompts = [[1 + i % 7 for i in range(length)] for length in (100, 128, 300, 129, 40)]
    params = [SamplingParams(mode=mode, max_tokens=40, block_length=16, ignore_eos=True) for mode in modes]
    made = []
    for enforce_eager in (True, False):
        with LLM(folder, device="cuda", dtype="bfloat16", enforce_eager=enforce_eager) as llm:
            made.append([o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)])
            number = llm.stats.graphs
    sizes = default_sizes(8192)
    least = 128 if torch.cuda.get_device_capability() == (9, 0) else sizes[-1] + 1
    assert number == 2 * len(sizes) + sum(size >= least for size in sizes)
    equal = [one == other for pair in zip(*made, strict=True) for one, other in zip(*pair, strict=True)]
    assert sum(equal) >= 0.9 * len(equal)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"enforce_eager": 1}, "enforce_eager must be True or False, got 1"),
        ({"cudagraph_capture_sizes": []}, r"must be a list of numbers of rows, got \[\]"),
        ({"cudagraph_capture_sizes": 10**5000}, "must be a list of numbers of rows, got something of type int"),
        ({"cudagraph_capture_sizes": [8, 0]}, "every one of cudagraph_capture_sizes must be at least 1, got 0"),
        ({"cudagraph_capture_sizes": [8], "enforce_eager": True}, "leave one of them out"),
        ({"cudagraph_capture_sizes": [8, 8193]}, r"sizes \[8193\] are more rows than max_num_batched_tokens=8192"),
    ],
)
def test_options_that_do_not_fit(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(checkpoint, device="cpu", **options)


@pytest.mark.parametrize("layers, cuts", [(1, 0), (2, 1), (4, 1), (5, 2)])
def test_the_layers_are_cut_after_the_first_and_the_fourth(tmp_path, layers, cuts):
    """Unless that is the last one, which is not whole."""
    with LLM(write_checkpoint(tmp_path, n_layers=layers), dtype="float64") as llm, torch.inference_mode():
        llm.generate([1, 2, 3], SamplingParams(max_tokens=4, block_length=4), use_tqdm=False)
        called = []
        llm.engine.runner._run_layers(8, lambda: called.append("cut"))
    assert len(called) == cuts
