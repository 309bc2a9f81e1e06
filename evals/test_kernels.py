"""Speed of the kernels at the shapes of LLaDA-8B: their share of the ceilings that the same run measures.

A test first checks the kernel's result on the timed inputs against its PyTorch twin in float64; attention and a whole
layer are checked against their timed baseline. Then a round times the kernel over many sets of buffers, so that on a
GPU they come from its memory and not from its L2 cache. Right before each round the baseline is timed in the same way:
for attention scaled_dot_product_attention on contiguous K and V, for products torch's, for a whole layer
torch.compile's version of it around the same attention, for others a copy of as many bytes (evals/timing/kernels.py).
On a CPU the twin runs, at shapes so small that its times say nothing about the kernel, and nothing is compiled.
"""

import inspect
import statistics
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blockinfer import LLM
from blockinfer.kernels.activation import silu_mul, silu_mul_torch
from blockinfer.kernels.attention import attend
from blockinfer.kernels.backend import runs_triton
from blockinfer.kernels.confidence import RowOptions, Vocabulary, token_confidence, token_confidence_torch
from blockinfer.kernels.kv_store import rope_store_kv, rope_store_kv_torch, rope_tables
from blockinfer.kernels.linear import gated_linear, linear, linear_parts
from blockinfer.kernels.norm import add_rms_norm, add_rms_norm_torch
from blockinfer.kernels.paged_attention import paged_attention
from blockinfer.kernels.segments import Cutting, SegmentTable, count_tiles, cut, make_scratch
from blockinfer.kernels.wide_attention import with_wide
from blockinfer.models.llada import LLaDALayer
from blockinfer.models.registry import SHAPES, read_model_config
from evals.conftest import close_suite, settings_of
from evals.runs.machine import device_name
from evals.timing.kernels import Work, about, copies, figures, make_round, measure_ceilings, num_sets

PAGE_SIZE = inspect.signature(LLM).parameters["page_size"].default
ROUNDS = {"cuda": 20, "cpu": 3}
# bounds of the relative error |out - expected| / |expected|
BOUND = {torch.bfloat16: 2e-2, torch.float32: 1e-5}

# Microseconds once measured on an H200: more than twice as many there is a regression.
KNOWN_ON_H200 = {
    "test_attention[1x32-160-32]": 6.7,
    "test_attention[1x32-1024-32]": 10.5,
    "test_attention[1x32-3200-32]": 20.3,
    "test_attention[8x32-3200-32]": 109,
    "test_attention[1x1024-1024-32]": 34,
    "test_attention[8x384-384-32]": 45,
    "test_confidence[greedy-32]": 7.9,
    "test_confidence[greedy-256]": 25,
}


class Sizes(NamedTuple):
    """attention: segments, query rows and keys of each. rows: of a step."""

    dtype: torch.dtype
    heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    attention: list[tuple[int, int, int]]
    kv_heads: list[int]
    confidence_rows: list[int]
    product_rows: list[int]
    rows: list[int]


# the decode steps of a request and of a batch, and prompts
ATTENTION = [(1, 32, 160), (1, 32, 1024), (1, 32, 3200), (1, 32, 4096), (8, 32, 384), (8, 32, 3200), (32, 32, 400)]
ATTENTION += [(1, 384, 384), (8, 384, 384), (1, 1024, 1024), (1, 4096, 4096), (1, 1024, 4096)]
ROWS = [32, 256, 1024]
SIZES = {
    "cuda": Sizes(torch.bfloat16, 32, 128, 12288, 126464, ATTENTION, [32, 8], ROWS, [32, 64, 1024], ROWS),
    "cpu": Sizes(torch.float32, 4, 16, 192, 1000, [(1, 8, 40), (3, 8, 25)], [4, 2], [4], [32], [32]),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = SIZES[settings_of(metafunc.config).device]
    if "segments" in metafunc.fixturenames:
        named = [f"{segments}x{rows}-{keys}" for segments, rows, keys in sizes.attention]
        metafunc.parametrize(("segments", "rows", "keys"), sizes.attention, ids=named)
        metafunc.parametrize("kv_heads", sizes.kv_heads)
    elif "product" in metafunc.fixturenames:
        metafunc.parametrize("product", PRODUCTS)
        metafunc.parametrize("rows", sizes.product_rows)
    elif "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", ["greedy", "noise"])
        metafunc.parametrize("rows", sizes.confidence_rows)
    else:
        metafunc.parametrize("rows", sizes.rows)


@pytest.fixture(scope="session")
def device(request):
    return settings_of(request.config).device


@pytest.fixture(scope="session")
def sizes(device):
    return SIZES[device]


@pytest.fixture(scope="module")
def ceilings(request, device, sizes):
    close_suite(request.config)
    return measure_ceilings(sizes.dtype, device)


@pytest.fixture(autouse=True)
def memory_is_given_back(device):
    """The next test's buffers have other sizes."""
    yield
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def randn(device, sizes):
    """torch.randn on the device, in the dtype that is measured, the same values in every run."""
    generator = torch.Generator(device).manual_seed(0)
    return partial(torch.randn, generator=generator, device=device, dtype=sizes.dtype)


@pytest.fixture
def measure(request, benchmark, ceilings, device, sizes):
    """measure(work): times it and its baseline; the figures go to extra_info."""

    def measure(work):
        name = device_name(device)
        implementation = "Triton kernel" if runs_triton(torch.empty(0, device=device)) else "PyTorch twin"
        benchmark.extra_info.update(about(work, implementation, sizes.dtype, name))
        timed, beside = make_round(work.calls, device), make_round(work.beside, device)
        beside_seconds = []
        benchmark.pedantic(
            timed.run, setup=lambda: beside_seconds.append(beside.seconds()), rounds=ROUNDS[device], warmup_rounds=1
        )
        if not benchmark.enabled:
            return
        # pytest-benchmark allows one iteration with a setup, and its time is that of a round, not of a call
        stats = benchmark.stats
        stats.iterations = timed.calls
        stats.stats.data = [seconds / timed.calls for seconds in stats.stats.data]
        # the first of them belongs to the round that warms up
        median = statistics.median(stats.stats.data)
        benchmark.extra_info.update(figures(work, median, statistics.median(beside_seconds[1:]), ceilings))
        known = KNOWN_ON_H200.get(request.node.name)
        if known is not None and "H200" in name:
            assert 1e6 * median <= 2 * known, f"{1e6 * median:.1f} us, {known} are known"

    return measure


def assert_close(made, expected):
    error = (made.double() - expected.double()).norm() / expected.double().norm()
    assert error < BOUND[made.dtype], f"relative error {error:.1e}"


def segment_table(slots, rows, keys, page_tables, kv_slots, heads, kv_heads, dim, dtype=None):
    """The table of segments with these rows and keys, one per slot, as in a step of only these rows. dtype: that of the
    step; None serves all segments from pages."""
    device = page_tables.device
    cutting, total = Cutting.of(heads, kv_heads, device), slots * rows
    if dtype is not None:
        cutting = with_wide(cutting, dim, PAGE_SIZE, dtype, device)
    columns = (np.full(slots, value) for value in (keys - rows, rows, keys))
    tiles = cut(np.arange(slots), *columns, cutting, total)
    counts = count_tiles(tiles)
    scratch = make_scratch(cutting, heads, kv_heads, dim, device) if cutting.may_split(total) else None
    tensors = torch.from_numpy(tiles).to(device), torch.tensor(counts, device=device)
    return SegmentTable(*tensors, page_tables, kv_slots, scratch, may_be_wide=counts[1] > 0)


@pytest.mark.benchmark(group="kernels: attention")
def test_attention(measure, randn, device, sizes, segments, rows, keys, kv_heads):
    """One layer's attention over pages in any order, or of wide segments. Bytes: the queries, K and V, and the output,
    once each."""
    heads, dim = sizes.heads, sizes.head_dim
    moved = segments * (2 * rows * heads + 2 * keys * kv_heads) * dim * sizes.dtype.itemsize
    sets, pages = num_sets(moved, device), -(-keys // PAGE_SIZE)
    q = randn(sets, segments * rows, heads, dim)
    kv_pages = randn(2, sets * segments * pages, PAGE_SIZE, kv_heads, dim)
    order = torch.randperm(sets * segments * pages, device=device).view(sets, segments, pages)
    # each at its own address, aligned like the others
    of_heads = heads, kv_heads, dim
    tables = [segment_table(segments, rows, keys, ids.clone(), None, *of_heads, sizes.dtype) for ids in order]

    def dense(pages, table):
        """[segments, HK, keys, D]"""
        return pages[table.page_tables].flatten(1, 2)[:, :keys].transpose(1, 2).contiguous()

    def call(one, table):
        k, v = (dense(pages, table)[:, :, -rows:].transpose(1, 2).flatten(0, 1) for pages in kv_pages)
        one, v = (torch.cat([one, k], dim=1), v.contiguous()) if table.may_be_wide else (one, None)
        return partial(attend, one, v, kv_pages, table)

    calls = [call(one, table) for one, table in zip(q, tables, strict=True)]
    beside = [
        partial(
            F.scaled_dot_product_attention,
            one.view(segments, rows, heads, dim).transpose(1, 2).contiguous(),
            *(dense(pages, table) for pages in kv_pages),
            enable_gqa=kv_heads != heads,
        )
        for one, table in zip(q, tables, strict=True)
    ]
    for call, other in zip(calls, beside, strict=True):
        assert_close(call(), other().transpose(1, 2).flatten(0, 1))
    shape = dict(segments=segments, rows=rows, keys=keys, kv_heads=kv_heads)
    flops = 4 * segments * rows * keys * heads * dim
    measure(Work("attention", shape, calls, "SDPA", beside, moved, flops))


def _gated(x, weight):
    return silu_mul(F.linear(x, weight))


# A layer's products and the LM head's: the model's function, torch's, and the weight's shape, in terms of d, the MLP's
# width m and the vocabulary V.
PRODUCTS = {
    "qkv": (linear, F.linear, lambda d, m, V: (3 * d, d)),
    "attn_out": (linear_parts, F.linear, lambda d, m, V: (d, d)),
    "gate_up": (gated_linear, _gated, lambda d, m, V: (2 * m, d)),
    "ff_out": (linear_parts, F.linear, lambda d, m, V: (d, m)),
    "lm_head": (linear, F.linear, lambda d, m, V: (V, d)),
}


@pytest.mark.benchmark(group="kernels: products")
def test_product(measure, randn, device, sizes, product, rows):
    """Bytes: the weights, x and the product, once each, whatever parts it is left in."""
    ours, torch_s, shape_of = PRODUCTS[product]
    columns, depth = shape_of(sizes.heads * sizes.head_dim, sizes.mlp_width, sizes.vocabulary)
    made_columns = columns // 2 if torch_s is _gated else columns
    moved = (columns * depth + rows * (depth + made_columns)) * sizes.dtype.itemsize
    x = randn(num_sets(moved, device), rows, depth)
    weights = [randn(columns, depth) / depth**0.5 for _ in x]
    calls, beside = ([partial(f, *pair) for pair in zip(x, weights, strict=True)] for f in (ours, torch_s))
    for call, *pair in zip(calls, x, weights, strict=True):
        made, expected = call(), F.linear(*(tensor.double() for tensor in pair))
        made = made.sum(0).to(sizes.dtype) if made.ndim == 3 else made
        assert_close(made, silu_mul_torch(expected) if torch_s is _gated else expected)
    shape = dict(product=product, rows=rows, columns=columns, depth=depth)
    measure(Work("product", shape, calls, "torch", beside, moved, 2 * rows * columns * depth))


@pytest.mark.benchmark(group="kernels: confidence")
def test_confidence(measure, randn, device, sizes, variant, rows):
    """Token, confidence and entropy of each row, or of noisy logits. Bytes: the logits, read once."""
    size = sizes.vocabulary
    moved = rows * size * sizes.dtype.itemsize
    logits = randn(num_sets(moved, device), rows, size)
    index = torch.arange(rows, device=device)
    temperature = torch.full_like(index, variant == "noise", dtype=torch.float64)
    options = RowOptions(temperature, index + 7, index, index, index < 0, index < 0)
    # LLaDA's mask token stands 128 before the end
    vocabulary = Vocabulary(size, size - 128, index[:0], index[:0])
    calls = [partial(token_confidence, one, vocabulary, options) for one in logits]
    for call, one in zip(calls, logits, strict=True):
        made, expected = call(), token_confidence_torch(one.double(), vocabulary, options)
        assert torch.equal(made.token_ids, expected.token_ids) and made.finite.all()
        torch.testing.assert_close(made.others, expected.others, rtol=1e-3, atol=0)
        torch.testing.assert_close(made.entropy, expected.entropy, rtol=1e-3, atol=0)
    shape = dict(variant=variant, rows=rows, columns=size)
    measure(Work("confidence", shape, calls, "copy", copies(moved, device), moved))


@pytest.mark.benchmark(group="kernels: elementwise")
def test_rope_store_kv(measure, randn, device, sizes, rows):
    """Bytes: queries, keys and values, read and written once each, and the angles."""
    heads, dim = sizes.heads, sizes.head_dim
    cos_sin = rope_tables(dim, rows, 500_000.0, sizes.dtype, torch.device(device))
    moved = 2 * rows * 3 * heads * dim * sizes.dtype.itemsize + cos_sin.nbytes
    qkv = randn(num_sets(moved, device), rows, 3 * heads, dim)
    pages = torch.randperm(len(qkv) * rows // PAGE_SIZE, device=device)
    slots = (pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=device)).view(len(qkv), rows)
    k_pages, v_pages = torch.zeros(2, len(pages), PAGE_SIZE, heads, dim, dtype=sizes.dtype, device=device)
    calls = [partial(rope_store_kv, one, cos_sin, k_pages, v_pages, at) for one, at in zip(qkv, slots, strict=True)]
    for call, one, at in zip(calls, qkv, slots, strict=True):
        made = torch.cat([call(), k_pages.flatten(0, 1)[at], v_pages.flatten(0, 1)[at]], dim=1)
        k, v = torch.zeros(2, 1, rows, heads, dim, dtype=torch.float64, device=device)
        q = rope_store_kv_torch(one.double(), cos_sin.double(), k, v, torch.arange(rows, device=device))
        assert_close(made, torch.cat([q, k[0], v[0]], dim=1))
    shape = dict(rows=rows, heads=heads, kv_heads=heads)
    measure(Work("RoPE + K/V store", shape, calls, "copy", copies(moved, device), moved))


@pytest.mark.benchmark(group="kernels: elementwise")
def test_add_rms_norm(measure, randn, device, sizes, rows):
    """Bytes: what is added, its sum and what is normed: two reads and two writes, and the weight.

    The sum replaces the residual, so it grows from call to call; only the first call's values are checked.
    """
    width = sizes.heads * sizes.head_dim
    moved = (4 * rows + 1) * width * sizes.dtype.itemsize
    x, residual = randn(2, num_sets(moved, device), rows, width)
    weight, eps = randn(width), 1e-5
    total = x + residual
    calls = [partial(add_rms_norm, one, other, weight, eps) for one, other in zip(x, residual, strict=True)]
    made = torch.stack([call()[0] for call in calls]).flatten(0, 1)
    whole = total.double().flatten(0, 1)
    assert_close(made, add_rms_norm_torch(torch.zeros_like(whole), whole, weight.double(), eps))
    assert_close(residual, total)
    shape = dict(rows=rows, columns=width)
    measure(Work("residual + RMSNorm", shape, calls, "copy", copies(moved, device), moved))


@pytest.mark.benchmark(group="kernels: elementwise")
def test_silu_mul(measure, randn, device, sizes, rows):
    """Bytes: gate and up, read once, and their product."""
    moved = 3 * rows * sizes.mlp_width * sizes.dtype.itemsize
    gate_up = randn(num_sets(moved, device), rows, 2 * sizes.mlp_width)
    calls = [partial(silu_mul, one) for one in gate_up]
    assert_close(torch.stack([call() for call in calls]), silu_mul_torch(gate_up.double()))
    shape = dict(rows=rows, columns=sizes.mlp_width)
    measure(Work("SiLU x up", shape, calls, "copy", copies(moved, device), moved))


def _before_attention(x, residual, cos_sin, layer, pages, slots):
    """LLaDALayer.attend in plain PyTorch but for its attention -> q, and the new residual."""
    residual = residual.clone()
    normed = add_rms_norm_torch(x, residual, layer.attn_norm, layer.eps)
    qkv = F.linear(normed, layer.qkv_proj).unflatten(-1, (-1, layer.head_dim))
    return rope_store_kv_torch(qkv, cos_sin, *pages, slots), residual


def _after_attention(attention, residual, layer):
    """The second half -> the layer's output, and the new residual."""
    residual = residual.clone()
    normed = add_rms_norm_torch(F.linear(attention.flatten(1), layer.attn_out), residual, layer.ff_norm, layer.eps)
    return F.linear(silu_mul_torch(F.linear(normed, layer.gate_up_proj)), layer.ff_out), residual


@pytest.mark.filterwarnings("default")  # torch.compile itself uses deprecated functions
@pytest.mark.benchmark(group="kernels: layer")
def test_layer(measure, randn, device, sizes, rows):
    """A whole layer, on segments of 32 rows that see themselves. Bytes: the weights, the input and the output.

    Its output may be left in parts, which the next layer's norm adds up. It is compared with its timed baseline, in the
    same dtype. The sum replaces the residual, so it grows from call to call; only the first call's values are checked.
    """
    width, dtype = sizes.heads * sizes.head_dim, sizes.dtype
    shape = dict(d_model=width, n_heads=sizes.heads, n_kv_heads=sizes.heads, mlp_hidden_size=sizes.mlp_width)
    config = read_model_config(SHAPES["llada-8b"] | shape, "llada-8b")
    matrices = (4 * width + 3 * sizes.mlp_width) * width
    moved = (matrices + 4 * rows * width) * dtype.itemsize
    layers = [LLaDALayer(config, dtype, torch.device(device)) for _ in range(num_sets(moved, device))]
    for weight in (weight for layer in layers for weight in layer.parameters()):
        weight.copy_(randn(weight.shape) / weight.shape[-1] ** 0.5)
    slots = torch.arange(rows, device=device)
    page_tables = slots[: rows // PAGE_SIZE].view(rows // 32, -1)
    of_heads = sizes.heads, sizes.heads, sizes.head_dim
    table = segment_table(rows // 32, 32, 32, page_tables, slots, *of_heads)
    pages = torch.zeros(2, rows // PAGE_SIZE, PAGE_SIZE, sizes.heads, sizes.head_dim, dtype=dtype, device=device)
    cos_sin = rope_tables(sizes.head_dim, rows, 500_000.0, dtype, torch.device(device))
    x, residual = randn(2, rows, width)
    compiled = [torch.compile(half) if device == "cuda" else half for half in (_before_attention, _after_attention)]

    def beside(layer):
        q, total = compiled[0](x, residual, cos_sin, layer, pages, slots)
        return compiled[1](paged_attention(q, *pages, table), total, layer)

    def whole(layer, residual):
        return layer.finish(layer.attend(x, residual, cos_sin, pages, table), residual), residual

    calls = [partial(whole, layer, residual.clone()) for layer in layers]
    others = [partial(beside, layer) for layer in layers]
    for call, other in zip(calls, others, strict=True):
        (made, total), (expected, expected_total) = call(), other()
        assert_close((made.sum(0) if made.ndim == 3 else made).to(dtype), expected)
        assert_close(total, expected_total)
    held_against = "compile" if device == "cuda" else "torch"
    measure(Work("layer", dict(rows=rows), calls, held_against, others, moved, 2 * rows * matrices))
