"""Ranks that have a GPU each, where a machine has two or more: what one rank makes, and how they end."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blockinfer import LLM, SamplingParams
from tests import test_equivalence as equivalence
from tests.checkpoints import write_checkpoint
from tests.comparison import NEAR_TIE, assert_equivalent
from tests.reference import Reference

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")]
SIZES = [2, pytest.param(4, marks=pytest.mark.skipif(GPUS < 4, reason="needs four CUDA devices"))]
# few graphs: rows, and masked rows, between and above them too
OPTIONS = dict(device="cuda", max_num_seqs=8, cudagraph_capture_sizes=[8, 32, 160])
EOS = 56


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shape = dict(d_model=128, n_heads=8, mlp_hidden_size=96, embedding_size=64, eos_token_id=EOS)
    return write_checkpoint(tmp_path_factory.mktemp("gpus"), **shape)


@pytest.fixture(scope="module")
def cases():
    equivalence.EOS["gpus"] = [EOS]
    draw = random.Random(0)
    kinds = [(mode, rule, index) for mode in equivalence.MODES for rule in equivalence.RULES for index in (1, 2, 3)]
    yield [equivalence.draw_case(draw, "gpus", *kind) for kind in kinds]
    del equivalence.EOS["gpus"]


@pytest.fixture(scope="module")
def expected(folder, cases):
    reference = Reference(folder)
    return [reference.generate(list(case.prompt), **case.reference_settings()) for case in cases]


@pytest.mark.parametrize("size", SIZES)
def test_float32_tokens_are_the_reference_s_but_for_near_ties(folder, cases, expected, size):
    with LLM(folder, dtype="float32", tensor_parallel_size=size, **OPTIONS) as llm:
        graphs = llm.stats.graphs
        outputs = equivalence.run(llm, cases)
        # sums do not go to NCCL where a GPU reaches the others' memory
        reached = all(torch.cuda.can_device_access_peer(0, other) for other in range(1, size))
        assert (llm.engine.model.ranks._buffer is not None) == reached
    assert graphs == 2 * len(OPTIONS["cudagraph_capture_sizes"])
    assert_equivalent([(e, o.outputs[0]) for e, o in zip(expected, outputs, strict=True)], margin=NEAR_TIE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype, quantization", [("bfloat16", None), ("float16", None), ("bfloat16", "fp8")])
def test_in_low_precision_most_tokens_are_those_of_one_rank(folder, cases, size, dtype, quantization):
    """float16 takes NCCL for its sums. In fp8 each rank rounds its part of a row by itself."""
    made = []
    greedy = [case for case in cases if dict(case.options)["temperature"] == 0]
    for ranks in (1, size):
        options = OPTIONS | dict(dtype=dtype, quantization=quantization, tensor_parallel_size=ranks)
        with LLM(folder, **options) as llm:
            made.append([output.outputs[0].token_ids for output in equivalence.run(llm, greedy)])
    equal = [a == b for one, several in zip(*made, strict=True) for a, b in zip(one, several, strict=False)]
    print(f"{dtype} {quantization}, {size} ranks: {sum(equal)} of {len(equal)} tokens")
    # a token in sixty would be right by chance
    assert sum(equal) >= (0.3 if quantization else 0.7) * len(equal)


def test_scores_log_probabilities_and_guidance(folder):
    params = SamplingParams(max_tokens=8, block_length=4, logprobs=2, cfg_scale=0.5, ignore_eos=True)
    found = []
    for size in (1, 2):
        with LLM(folder, dtype="float32", tensor_parallel_size=size, **OPTIONS) as llm:
            (score,) = llm.score([[1, 2, 3]], [[4, 5, 6]], use_tqdm=False)
            one = llm.generate([[1, 2, 3]], params, use_tqdm=False)[0].outputs[0]
            sure = [place[token] for place, token in zip(one.logprobs, one.token_ids, strict=True)]
            found.append([score.logprob, *(likely.logprob for likely in sure)])
    assert found[1] == pytest.approx(found[0], abs=1e-3)


BEGIN = """
import os, signal, sys, threading, time
from blockinfer import LLM, SamplingParams
params = SamplingParams(max_tokens=200, block_length=32, ignore_eos=True)
llm = LLM(sys.argv[1], device="cuda", dtype="bfloat16", tensor_parallel_size=2, cudagraph_capture_sizes=[8, 32])
engine = llm.engine  # held: its graphs have captured the ranks' communicator
llm.generate([[1]] * 8, params, use_tqdm=False)
print("ranks", *(process.pid for process in llm._leader._followers._processes), flush=True)
begin = time.monotonic()
"""
RUN = """
try:
    while True:
        llm.generate([[1]] * 8, params, use_tqdm=False)
except RuntimeError as error:
    print(error, flush=True)
"""
KILL = "threading.Timer(0.2, os.kill, (llm._leader._followers._processes[0].pid, signal.SIGKILL)).start()\n"
TIME = 'print("closed", time.monotonic() - begin, flush=True)\n'
AGAIN = """
llm = LLM(sys.argv[1], device="cuda", dtype="bfloat16", tensor_parallel_size=2, cudagraph_capture_sizes=[8, 32])
print("again", len(llm.generate([[1]], params, use_tqdm=False)[0].outputs[0].token_ids), flush=True)
llm.close()
"""
ENDS = {
    "close": ("llm.close()\n" + TIME, "closed"),
    "without close": (TIME, "closed"),
    "a rank is killed": (KILL + RUN + "llm.close()\n" + TIME, "rank 1 of 2 ended by SIGKILL"),
    "a rank is killed, and another LLM": (KILL + RUN + "llm.close()\n" + TIME + AGAIN, "again 200"),
    "a rank is killed, without close": (KILL + RUN + TIME, "rank 1 of 2 ended by SIGKILL"),
}


@pytest.mark.parametrize("how", ENDS)
def test_ends(folder, how):
    """In a process of their own, whose GPU may wait for ever for a rank that was killed."""
    text, said = ENDS[how]
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + text, str(folder)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    # NCCL may say something before
    ranks, *rest = out[out.index("ranks ") :].splitlines()
    assert process.returncode == 0 and said in "\n".join(rest), out
    assert float(next(line for line in rest if line.startswith("closed")).split()[1]) < 30, out
    assert len(ranks.split()) == 2 and not Path(f"/proc/{ranks.split()[1]}").exists(), out
