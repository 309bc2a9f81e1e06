"""What GPUs add to how ranks end: graphs that hold a communicator, and a GPU that waits for a rank that is gone."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from blockinfer.kernels.ranks import RankGroup
from blockinfer.parallel import group as groups
from blockinfer.parallel.followers import Followers
from blockinfer.parallel.group import Group
from tests.parallel.test_ends import assert_gone, free_port, open_llm, pids


class Graph:
    """A captured one, in the order of what ends."""

    def __init__(self, ended):
        self.ended = ended

    def reset(self):
        self.ended.append("graph")


@pytest.fixture
def ended(monkeypatch):
    ended, destroy = [], dist.destroy_process_group
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (ended.append("group"), destroy()))
    return ended


@pytest.mark.parametrize("how", ["close", "without close"])
def test_graphs_end_before_the_communicator_that_they_captured(shared_folders, ended, how):
    """Also where somebody holds them, as an error's traceback does: NCCL would wait for ever."""
    llm = open_llm(shared_folders["dense"])
    runner = llm.engine.runner
    for graphs in (runner._layers, runner._layers_with_wide, runner._reveal):
        graphs._captured[10**9] = [Graph(ended)]
    if how == "close":
        llm.close()
    else:
        llm._leader._abandon()
    assert ended == ["graph"] * 3 + ["group"]


def test_a_rank_without_memory_for_the_engine_says_so_before_any_sum(shared_folders, monkeypatch):
    """While the others do not wait in one yet."""
    start = Followers._start
    low = "import blockinfer.engine.engine as e, runpy; e.num_pages = lambda *a: 10**13; import blockinfer.parallel"

    def start_without_memory(self, rank, on_gpu):
        monkeypatch.setattr(sys, "executable", str(executable))
        return start(self, rank, on_gpu)

    executable = shared_folders["dense"].parent / "python"
    executable.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} -P -c "{low}.__main__ as m; m.main()" "$@"\n')
    executable.chmod(0o700)
    monkeypatch.setattr(Followers, "_start", start_without_memory)
    with pytest.raises(ValueError, match="rank 1 of 2: the KV cache of .* cannot be allocated"):
        open_llm(shared_folders["dense"])


def test_a_gpu_that_waits_for_a_rank_that_is_gone(shared_folders, monkeypatch):
    """Nothing waits for it: its memory is left behind, and the next LLM of this process is refused."""
    llm = open_llm(shared_folders["dense"])
    group, ranks = llm._leader._group, pids(llm)
    memory = torch.zeros(3)
    let_go = []
    group.ranks._buffer = SimpleNamespace(_buffer=memory, let_go=lambda *rest: let_go.append(rest))
    before = sys.getrefcount(memory)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(query=lambda: False))
    monkeypatch.setattr(torch.cuda, "device", lambda gpu: open(os.devnull))
    monkeypatch.setattr(groups, "_DONE", 0.05)
    monkeypatch.setattr(Group, "stuck", None)
    # what it is after a failure, on a GPU
    group.on_gpu, group.failure = True, "rank 1 of 2 ended by SIGKILL"
    llm.close()
    assert_gone(ranks)
    assert len(let_go) == 1
    # one holds it no more, and one for good
    assert group.ranks._buffer is None and sys.getrefcount(memory) == before
    with pytest.raises(ValueError, match="rank 1 of 2 ended by SIGKILL, for which a GPU of this process waits still"):
        open_llm(shared_folders["dense"])
    dist.is_initialized() and dist.destroy_process_group()


def test_memory_is_given_back_where_the_gpu_is_done():
    ranks = RankGroup.__new__(RankGroup)
    memory = torch.zeros(3)
    ranks._buffer = SimpleNamespace(_buffer=memory)
    before = sys.getrefcount(memory)
    ranks.release()
    assert ranks._buffer is None and sys.getrefcount(memory) == before - 1


OUTSIDE = """
import os, signal, sys
from blockinfer import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cpu", dtype="float64", tensor_parallel_size=2)
llm.generate([[1, 2]], SamplingParams(max_tokens=8, block_length=8), use_tqdm=False)
if sys.argv[2] == "dropped":
    llm.engine.add_request([1], SamplingParams(max_tokens=64, block_length=8))
    llm.engine.step()
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
while sys.argv[2] == "the other is killed":
    print("here", file=sys.stderr, flush=True)
    llm.generate([[1, 2]], SamplingParams(max_tokens=64, block_length=8), use_tqdm=False)
"""


@pytest.mark.parametrize("how", ["without close", "dropped", "killed", "the other is killed"])
def test_ranks_that_were_there_end_with_the_first(shared_folders, tmp_path, how):
    path = tmp_path / "outside.py"
    path.write_text(OUTSIDE)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, str(path), shared_folders["dense"], how]
    ranks = [
        subprocess.Popen(command, env=os.environ | address | {"RANK": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    if how == "the other is killed":
        assert ranks[0].stderr.readline() == "here\n"
        ranks[1].kill()
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    if how == "the other is killed":
        assert "RuntimeError: rank 1 of 2 has ended; this LLM is of no more use" in said[0], said
        assert ranks[0].returncode == 1, said
    elif how == "dropped":
        # with a request under way: the other waits in a step
        assert [rank.returncode for rank in ranks] == [0, 1] and said[0] == "", said
        assert "blockinfer: " in said[1] and "has ended" in said[1] and "Traceback" not in said[1]
    elif how == "killed":
        assert [rank.returncode for rank in ranks] == [-signal.SIGKILL, 1]
        assert "blockinfer: " in said[1] and "has ended" in said[1] and "Traceback" not in said[1]
    else:
        assert [rank.returncode for rank in ranks] == [0, 0] and said == ["", ""]
