"""Submits run_benchmark.slurm to a SLURM of its own on this machine: controller, two nodes of one CPU, loopback only.

`nox -s slurm` runs it. Needs Debian's slurm-wlm and munge, but no configuration of theirs; everything is in a temporary
folder, and the daemons end with this process, also if it fails.
"""

import getpass
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "evals/slurm/run_benchmark.slurm"
OPTIONS = ["--device=cpu", "--mode=block", "--num-samples=8", "--max-tokens=128", "--batch-size=1"]

CONFIG = """\
ClusterName=check
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
FirstJobId={first_job}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def wait_for(what: str, condition: Callable[[], object], seconds: float) -> None:
    """Raises TimeoutError, naming `what`, when the seconds are over."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not after {seconds:.0f} s")
        time.sleep(0.05)


@contextmanager
def daemon(folder: Path, name: str, *command: str) -> Iterator[None]:
    """Runs in the foreground, as a child, until the block ends; its output is NAME.log in the folder."""
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        except BaseException:
            print(f"--- the end of {name}.log:\n" + (folder / f"{name}.log").read_text()[-1000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Two idle nodes; SLURM_CONF names their configuration."""
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    key, config = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    # logs of earlier checks keep their names
    values = dict(folder=folder, host=host, user=getpass.getuser(), ports=free_ports(3))
    config.write_text(CONFIG.format(**values, first_job=int(time.time()) % 60_000_000))
    os.environ |= {"SLURM_CONF": str(config), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    with ExitStack() as stack:
        munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files]
        stack.enter_context(daemon(folder, "munged", *munged))
        wait_for("munged", (folder / "munge.socket").exists, 20)
        stack.enter_context(daemon(folder, "slurmctld", "slurmctld", "-D"))
        for node in ("n1", "n2"):
            stack.enter_context(daemon(folder, node, "slurmd", "-D", "-N", node))
        wait_for("two idle nodes", lambda: run("sinfo", "--noheader", "--format=%T %D") == "idle 2\n", 60)
        try:
            yield
        finally:
            # their steps would outlive the daemons
            run("scancel", "--partition=all")
            wait_for("the end of all jobs", lambda: run("squeue", "--noheader") == "", 60)


def run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def submit(results: Path, number: int = 2) -> str:
    environment = os.environ | {"RESULTS": str(results), "PYTHON": sys.executable}
    command = ["sbatch", "--parsable", f"--ntasks={number}", SCRIPT, *OPTIONS]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def finish(job: str) -> tuple[str, str]:
    """-> the ended job's state and its log, which is printed too."""

    def state() -> str:
        fields = run("scontrol", "show", "job", job).split()
        return next(field.removeprefix("JobState=") for field in fields if field.startswith("JobState="))

    wait_for(f"the end of job {job}", lambda: state() not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), 300)
    log = (ROOT / "logs" / f"job_{job}.out").read_text()
    print(log, end="", flush=True)
    return state(), log


def kill_shard(results: Path, shard: str) -> None:
    """Kills the shard's pytest as soon as it has stored a generation."""
    kept = results / f"shard_{shard[0]}.jsonl"
    wait_for(f"a generation in {kept}", lambda: kept.exists() and b"\n" in kept.read_bytes(), 120)
    marks = {f"--shard={shard}".encode(), f"--resume={kept}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = set((process / "cmdline").read_bytes().split(b"\0"))
        except OSError:
            continue
        if marks <= arguments:
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise RuntimeError(f"no process of shard {shard} is running")


def info(path: Path) -> dict:
    (benchmark,) = json.loads(path.read_text())["benchmarks"]
    return benchmark["extra_info"]


def expect(condition: object, what: str) -> None:
    if not condition:
        raise AssertionError(what)
    print(f"ok: {what}", flush=True)


def check_whole(folder: Path, whole: Path) -> None:
    state, log = finish(submit(folder / "whole"))
    expect(state == "COMPLETED", "a job of two shards completes")
    merged, unsharded = info(folder / "whole" / "merged.json"), info(whole)
    expect(merged["rows"] == unsharded["rows"], "its merged rows, tokens and grades are the unsharded run's")
    expect(merged["tokens_per_second"] > 0, f"{merged['tokens_per_second']:.0f} tokens/s")
    state, log = finish(submit(folder / "whole"))
    expect(state == "FAILED" and "merged.json is there already" in log, "a finished run is not run again")


def check_killed(folder: Path, whole: Path) -> None:
    results = folder / "killed"
    job = submit(results)
    kill_shard(results, "2/2")
    state, log = finish(job)
    named = f"shard 2 of 2 died: see logs/job_{job}_shard_2.out" in log and "shard 1 of 2 died" not in log
    expect(state == "FAILED" and named, "a shard that is killed fails the job and is named, and no other is")
    first = (results / "shard_1.json").read_bytes()
    expect(not (results / "merged.json").exists(), "nothing is merged")
    state, log = finish(submit(results, 1))
    expect(state == "FAILED" and "remove it or set RESULTS" in log, "another number of shards is refused there")
    job = submit(results)
    state, log = finish(job)
    expect(state == "COMPLETED" and "shards to run: 2 of 2" in log, "the same command runs the killed shard alone")
    text = (ROOT / "logs" / f"job_{job}_shard_2.out").read_text()
    found = next(line for line in text.splitlines() if "generations found" in line)
    print(found)
    expect(": 0 of" not in found, "it goes on from what was kept")
    expect((results / "shard_1.json").read_bytes() == first, "the finished shard is kept")
    merged = info(results / "merged.json")
    expect(merged["rows"] == info(whole)["rows"], "rows, tokens and grades are the unsharded run's again")
    expect(merged["resumed"] > 0 and merged["tokens_per_second"] is None, "its speed is not reported")


def main() -> None:
    # as Ctrl-C does, so that the daemons end
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        whole = folder / "whole.json"
        command = [sys.executable, "-m", "pytest", "evals/test_throughput.py", *OPTIONS, "--output=/dev/null", "-q"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, f"--benchmark-json={whole}"], cwd=ROOT, env=environment, check=True)
        with cluster(folder):
            check_whole(folder, whole)
            check_killed(folder, whole)


if __name__ == "__main__":
    main()
