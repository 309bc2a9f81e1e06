"""evals/timing/kernels.py and evals/test_kernels.py: what a kernel's figures are, and that a wrong kernel has none."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from evals.results import compare
from evals.runs.configurations import KERNEL
from evals.test_kernels import KNOWN_ON_H200
from evals.timing import kernels
from evals.timing.kernels import Ceilings, Work, copies, figures, make_round, num_sets
from tests.report.sample import info

CEILINGS = Ceilings(copy=4e12, read=5e12, matmul=600e12, sustained_matmul=500e12)


def test_fractions_are_of_the_ceiling_that_comes_first():
    memory = Work("a", {}, [], "copy", [], moved=8_000_000)
    info = figures(memory, seconds=4e-6, beside_seconds=3e-6, ceilings=CEILINGS)
    assert info["tb_per_s"] == pytest.approx(2) and info["bound"] == "memory"
    assert info["fraction"] == info["fraction_of_copy"] == pytest.approx(0.5)
    assert info["fraction_of_read"] == pytest.approx(0.4) and info["times_as_fast"] == pytest.approx(0.75)
    assert info["tflop_per_s"] is info["fraction_of_matmul"] is None

    # 2 us of memory and 10 us of arithmetic at best
    product = memory._replace(flops=6_000_000_000)
    info = figures(product, seconds=20e-6, beside_seconds=3e-6, ceilings=CEILINGS)
    assert info["tflop_per_s"] == pytest.approx(300) and info["bound"] == "matmul"
    assert info["fraction"] == info["fraction_of_matmul"] == pytest.approx(0.5)
    assert info["fraction_of_copy"] == pytest.approx(0.1)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that counts what it is asked for and takes a millisecond to replay a graph. Its clock is the host's."""

    class Gpu:
        captured, replayed, now = 0, 0, 0.0
        L2_cache_size = 50_000_000

        def replay(self):
            self.replayed += 1
            self.now += 1e-3

    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: gpu.now)
    return gpu


def test_a_round_on_a_gpu_is_so_many_replays(gpu):
    made = []
    round = make_round([lambda i=i: made.append(i) for i in range(4)], "cuda")
    assert made == [0, 1, 2, 3] * 2, "once to warm up, once captured"
    gpu.replayed = 0
    # 5 ms at least, each replay of four calls
    assert round.seconds() == pytest.approx(1e-3 / 4)
    assert gpu.replayed == 5 and round.calls == 20 and len(made) == 8


def test_a_sustained_rate_is_measured_when_the_device_has_worked_for_long(gpu):
    assert kernels._median_seconds(lambda: None, "cuda", after=0.1) == pytest.approx(1e-3)
    # a replay to bring the graph over and one to time it; then 100 ms, and seven rounds of five
    assert gpu.replayed == 2 + 100 + 7 * 5


def test_buffers_come_to_four_times_the_cache(gpu):
    assert [num_sets(moved, "cuda") for moved in (1_000_000, 30_000_000, 10**9)] == [200, 7, 2]
    assert num_sets(1_000_000, "cpu") == 2


def test_copies_move_as_many_bytes():
    for moved in (512, 3000, 100_000):
        calls = copies(moved, "cpu")
        assert len(calls) == 2
        for call in calls:
            (source,), target = call.args, call()
            assert moved - 512 < source.nbytes + target.nbytes <= moved
            assert target.data_ptr() == call.func.__self__.data_ptr() != source.data_ptr()


def test_kernels_are_not_compared(tmp_path):
    """Other shapes on another device are neither cases that are gone nor new ones."""
    path = tmp_path / "out.json"
    infos = {
        "test_silu_mul[32]": {KERNEL: "SiLU x up", "dtype": "bfloat16"},
        "test_throughput[block-8]": info("block", peak_memory_gib=9.0),
    }
    benchmarks = [{"name": name, "extra_info": one} for name, one in infos.items()]
    path.write_text(json.dumps({"benchmarks": benchmarks, "datetime": "2030-01-01"}))
    assert list(compare.read(str(path))) == ["test_throughput[block-8]"]


# every kernel's result is a hundredth too large, or, of the store, not there; the attention of a layer and what it is
# held to differ
BREAKER = """
from blockinfer.kernels import activation, attention, confidence, kv_store, linear, norm, paged_attention

def breaks(module, name, change):
    right = getattr(module, name)
    setattr(module, name, lambda *args, **options: change(right(*args, **options), *args))

breaks(activation, "silu_mul", lambda out, *args: out * 1.01)
for name in ("linear", "linear_parts", "gated_linear"):
    breaks(linear, name, lambda out, *args: out * 1.01)
breaks(norm, "add_rms_norm", lambda out, *args: (out[0] * 1.01, out[1]))
breaks(attention, "attend", lambda out, *args: out * 1.02)
breaks(paged_attention, "paged_attention", lambda out, *args: out * 1.01)
breaks(confidence, "token_confidence", lambda out, *args: out._replace(others=out.others * 1.01))
breaks(kv_store, "rope_store_kv", lambda q, qkv, cos_sin, k_pages, *args: (k_pages.zero_(), q)[1])
"""


def test_a_wrong_kernel_has_no_figures(tmp_path):
    (tmp_path / "breaker.py").write_text(BREAKER)
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "evals/test_kernels.py", "-p", "breaker", "-p", "no:cacheprovider"]
    command += ["--device=cpu", f"--benchmark-json={file}", "--tb=line"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", str(tmp_path)])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert " 15 failed" in done.stdout and "passed" not in done.stdout
    # pytest-benchmark 5.2 opens it at the start
    assert not file.exists() or file.read_text() == ""
    assert "= kernels =" not in done.stdout


def test_each_known_time_is_of_a_test_on_a_gpu(tmp_path):
    """Else it would bound nothing."""
    (tmp_path / "as_on_a_gpu.py").write_text("from evals.test_kernels import SIZES\nSIZES['cpu'] = SIZES['cuda']\n")
    command = [sys.executable, "-m", "pytest", "evals/test_kernels.py", "-p", "as_on_a_gpu", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", str(tmp_path)])}
    done = subprocess.run(
        [*command, "--device=cpu", "--collect-only", "-q"], capture_output=True, text=True, timeout=300, env=environment
    )
    ids = {line.split("::")[1] for line in done.stdout.splitlines() if "::" in line}
    assert len(ids) > 30 and ids >= KNOWN_ON_H200.keys(), done.stdout + done.stderr
