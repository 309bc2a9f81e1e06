"""How the ranks end: with the LLM, with its process, and where one of them dies."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from blockinfer import LLM, SamplingParams
from blockinfer.parallel import engine
from blockinfer.parallel.followers import Followers

LONG = SamplingParams(max_tokens=200, block_length=8, ignore_eos=True)
SHORT = SamplingParams(max_tokens=8, block_length=8)


def open_llm(folder, size=2):
    return LLM(folder, device="cpu", dtype="float64", tensor_parallel_size=size)


def pids(llm):
    return [process.pid for process in llm._leader._followers._processes]


def assert_gone(pids):
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a rank is left"
        time.sleep(0.05)


def test_a_rank_that_dies_is_named_and_the_next_llm_works(shared_folders):
    with open_llm(shared_folders["dense"], 3) as llm:
        expected = llm.generate([[1, 2]], SHORT, use_tqdm=False)[0].outputs
        with pytest.raises(ValueError, match="another LLM with tensor_parallel_size is open in this process"):
            open_llm(shared_folders["dense"])
        ranks = pids(llm)
        threading.Timer(0.3, os.kill, (ranks[1], signal.SIGKILL)).start()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 2 of 3 ended by SIGKILL; this LLM is of no more use"):
            llm.generate([[1, 2, 3]] * 8, LONG, use_tqdm=False)
        assert time.monotonic() - start < 30
        # at once, and without a rank to ask
        with pytest.raises(RuntimeError, match="rank 2 of 3 ended by SIGKILL"):
            llm.generate([[1]], SHORT, use_tqdm=False)
        assert not llm.engine.has_unfinished()
    llm.close()
    assert_gone(ranks)
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([[1]], SHORT)
    with open_llm(shared_folders["dense"]) as llm:
        assert llm.generate([[1, 2]], SHORT, use_tqdm=False)[0].outputs == expected
        ranks = pids(llm)
    llm.close()
    assert_gone(ranks)


def test_a_rank_that_is_gone_at_the_end(shared_folders, monkeypatch):
    """Which nobody has seen yet."""
    monkeypatch.setattr(Followers, "_watch", lambda *about: None)
    for _ in range(2):
        llm = open_llm(shared_folders["dense"])
        (rank,) = llm._leader._followers._processes
        rank.kill()
        rank.wait()
        llm.close()


def test_a_rank_that_cannot_begin(shared_folders, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ChildProcessError, match="rank 1 of 2 ended with status 1 before it could begin"):
        open_llm(shared_folders["dense"])


def test_a_rank_that_dies_while_it_loads(shared_folders, monkeypatch):
    load = engine.load

    def kill_and_load(prepared, ranks):
        (child,) = {int(path.name) for path in Path("/proc").glob("[0-9]*") if is_rank(path)}
        os.kill(child, signal.SIGKILL)
        return load(prepared, ranks)

    monkeypatch.setattr(engine, "load", kill_and_load)
    with pytest.raises(ChildProcessError, match="rank 1 of 2 ended by SIGKILL"):
        open_llm(shared_folders["dense"])


def is_rank(process):
    """Whether it is one that this process started."""
    try:
        mine = f"\nPPid:\t{os.getpid()}\n" in (process / "status").read_text()
        return mine and b"blockinfer.parallel" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_a_rank_that_cannot_load_says_why(shared_folders, tmp_path, monkeypatch):
    """It is started where the model is not."""
    monkeypatch.chdir(shared_folders["dense"].parent)
    start = Followers._start

    def start_elsewhere(self, rank, on_gpu):
        with contextlib.chdir(tmp_path):
            return start(self, rank, on_gpu)

    monkeypatch.setattr(Followers, "_start", start_elsewhere)
    with pytest.raises(ValueError, match=r"rank 1 of 2: the checkpoint './dense' is no folder"):
        open_llm("./dense")


def script(folder, text):
    """A user's script, without `if __name__`, which begins with an LLM of two ranks and prints their processes."""
    begin = f"""
        import os, signal, sys, threading
        from blockinfer import LLM, SamplingParams
        llm = LLM({str(folder)!r}, device="cpu", dtype="float64", tensor_parallel_size=2)
        long = SamplingParams(max_tokens=200, block_length=8, ignore_eos=True)
        print(*(process.pid for process in llm._leader._followers._processes), flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(begin) + textwrap.dedent(text)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


UNDER_WAY = "llm.engine.add_request([1, 2, 3], long)\nassert not llm.engine.step() and llm.engine.has_unfinished()"
# ten seconds after which it would no longer wait
CLOSED = "\nimport time\nbegin = time.monotonic()\nllm.close()\nassert time.monotonic() - begin < 9"
ENDS = {
    "without close": ("llm.generate([[1]], use_tqdm=False)", 0, ""),
    # the others have been told of steps that nobody will make
    "with a request under way": (UNDER_WAY, 0, ""),
    "closed with a request under way": (UNDER_WAY + CLOSED, 0, ""),
    "by Ctrl-C": (
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "llm.generate([[1, 2, 3]] * 64, long, use_tqdm=False)",
        -signal.SIGINT,
        "KeyboardInterrupt",
    ),
    "killed in a step": (
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "llm.generate([[1, 2, 3]] * 64, long, use_tqdm=False)",
        -signal.SIGKILL,
        "",
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_the_ranks_end_with_their_process(shared_folders, heeding_signals, how):
    text, code, said = ENDS[how]
    process = script(shared_folders["dense"], text)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert said in err if said else not err
    assert_gone(map(int, out.split()))


HELD = """
import ctypes
from blockinfer.parallel.__main__ import _end_with_parent
_end_with_parent()
print("held", flush=True)
ctypes.PyDLL(None).sleep(60)  # without letting other threads run
"""


def test_a_rank_that_a_library_holds_ends_too():
    process = subprocess.Popen([sys.executable, "-c", HELD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"held\n"
        process.stdin.close()
        try:
            assert process.wait(20) == -signal.SIGIO
        finally:
            process.kill()


OUTSIDE = """
import os, sys
from blockinfer import LLM, SamplingParams
for _ in range(2):  # the ranks that are there serve one LLM after another
    with LLM(sys.argv[1], device="cpu", dtype="float64", tensor_parallel_size=2) as llm:
        rank = int(os.environ["RANK"])
        (output,) = llm.generate([[1, 2, 3 + rank]], SamplingParams(max_tokens=8, block_length=8), use_tqdm=False)
        print(rank, output.outputs[0].token_ids, flush=True)
"""


def test_ranks_that_torchrun_started(shared_folders, tmp_path):
    """Two groups of two, each with a part of the requests."""
    path = tmp_path / "outside.py"
    path.write_text(OUTSIDE)
    folder = shared_folders["dense"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(path), folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with LLM(folder, device="cpu", dtype="float64") as llm:
        (a,), (b,) = [o.outputs for o in llm.generate([[1, 2, 3], [1, 2, 5]], SHORT, use_tqdm=False)]
    assert sorted(done.stdout.splitlines()) == sorted([f"0 {a.token_ids}", f"2 {b.token_ids}"] * 2)


def test_ranks_that_the_environment_names(shared_folders, tmp_path):
    """As with srun; where the first one fails, the others do not stay."""
    path = tmp_path / "outside.py"
    path.write_text(OUTSIDE + "raise SystemExit('an error')\n")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, str(path), shared_folders["dense"]]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ranks = [subprocess.Popen(command, env=os.environ | address | {"RANK": str(i)}, **pipes) for i in range(2)]
    (out, err), (nothing, _) = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 0] and "an error" in err
    assert len(out.splitlines()) == 2 and nothing == ""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_ranks_that_cannot_be_split_into_groups(shared_folders, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide WORLD_SIZE=4"):
        open_llm(shared_folders["dense"], 3)


def test_a_family_that_ranks_cannot_share():
    with pytest.raises(ValueError, match="tensor_parallel_size is not implemented for LLaDAMoEModelLM; leave it at 1"):
        LLM("llada-moe-7b", load_format="dummy", device="cpu", tensor_parallel_size=2)
