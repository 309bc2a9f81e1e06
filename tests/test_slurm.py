"""The logic of evals/slurm/run_benchmark.slurm, with stand-ins for srun and for the interpreter."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path("evals/slurm/run_benchmark.slurm")

# runs its command once for every task, as srun does, on a node with one place for each
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    echo "srun $1" >>"$CALLS"
    shift
done
for ((i = 0; i < tasks; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" || code=$?
done
exit "${code:-0}"
"""

# writes what pytest or -m evals merge would; a shard in $DIES leaves half a file
PYTHON = """#!/usr/bin/env bash
echo "gpu=${CUDA_VISIBLE_DEVICES:-} threads=$OMP_NUM_THREADS world=${WORLD_SIZE:-} $*" >>"$CALLS"
[[ $2 == pytest ]] || { echo "$*" >"$4"; exit 0; }
for option in "$@"; do
    case $option in
    --shard=*) shard=${option#*=} ;;
    --benchmark-json=*) file=${option#*=} ;;
    esac
done
echo "pytest's words on $shard, $# arguments"
echo half >"$file"
[[ " ${DIES:-} " == *" $shard "* ]] && exit 137
echo "$shard" >"$file"
"""


@pytest.fixture
def job(tmp_path, pytestconfig):
    """job(*options, **environment) -> exit code, output, the lines that say what was called."""
    root = tmp_path / "checkout"
    (root / "logs").mkdir(parents=True)
    (root / SCRIPT).parent.mkdir(parents=True)
    shutil.copy(pytestconfig.rootpath / SCRIPT, root / SCRIPT)
    for name, text in (("srun", SRUN), ("python", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(*options, **environment):
        calls.write_text("")
        slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(root), "SLURM_NTASKS": "3"}
        mine = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "CALLS": str(calls)}
        unset = ("RESULTS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_CPUS_PER_TASK")
        inherited = {key: value for key, value in os.environ.items() if key not in unset}
        # sbatch runs a copy
        copy = shutil.copy(root / SCRIPT, tmp_path / "slurm_script")
        done = subprocess.run(
            ["bash", copy, *options], env=inherited | slurm | mine | environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    run.root = root
    return run


def shards_in(calls):
    return [word.removeprefix("--shard=") for line in calls for word in line.split() if word.startswith("--shard=")]


def test_every_task_runs_a_shard_and_they_are_merged_in_order(job):
    code, text, calls = job("--model", "a b", "--mode=block", SLURM_CPUS_PER_TASK="4")
    assert code == 0, text
    assert shards_in(calls) == ["1/3", "2/3", "3/3"] and "shards to run: 1 2 3 of 3" in text
    assert {"srun --ntasks=3", "srun --kill-on-bad-exit=0", "srun --wait=0", "srun --cpus-per-task=4"} <= set(calls)
    one = next(line for line in calls if "--shard=1/3" in line)
    assert (
        one.startswith("gpu= threads=4 world= -m pytest evals/test_throughput.py")
        and " --model a b --mode=block " in one
    )
    results = "results/slurm"
    assert one.endswith(
        f"--resume={results}/shard_1.jsonl --output=/dev/null --benchmark-json={results}/shard_1.json.part"
    )
    files = [f"{results}/shard_{i}.json" for i in (1, 2, 3)]
    assert calls[-1].endswith(f"-m evals merge {results}/merged.json {' '.join(files)}")
    assert [(job.root / file).read_text() for file in files] == ["1/3\n", "2/3\n", "3/3\n"]
    assert (job.root / "logs/job_7_shard_2.out").read_text() == "pytest's words on 2/3, 12 arguments\n"
    assert not list(job.root.glob("results/slurm/*.part"))


def test_a_shard_that_died_is_named_and_only_it_runs_again(job):
    code, text, calls = job("--mode=block", DIES="2/3")
    assert code == 1 and "shard 2 of 3 died: see logs/job_7_shard_2.out" in text and text.count(" died") == 1
    assert shards_in(calls) == ["1/3", "2/3", "3/3"] and not any("-m evals merge" in line for line in calls)
    results = job.root / "results/slurm"
    assert not (results / "shard_2.json").exists() and not (results / "merged.json").exists()

    code, text, calls = job("--mode=block")
    assert code == 0 and "shards to run: 2 of 3" in text, text
    assert shards_in(calls) == ["2/3"] and "srun --ntasks=1" in calls
    assert (results / "merged.json").exists()
    log = (job.root / "logs/job_7_shard_2.out").read_text()
    assert log.count("pytest's words on 2/3") == 2, "a job that was requeued keeps its number and its log"


def test_a_merge_that_failed_is_made_up_for_without_a_shard(job):
    job()
    (job.root / "results/slurm/merged.json").unlink()
    code, text, calls = job()
    assert code == 0 and "shards to run: none of 3" in text and len(calls) == 1 and "-m evals merge" in calls[0]


def test_a_job_that_a_hook_of_git_submits_is_of_its_own_folder(job):
    """The repository that the hook is of is this one."""
    code, text, _ = job(GIT_DIR=str(Path(__file__).parents[1] / ".git"))
    assert code == 0 and "job 7: commit unknown, 3 shards" in text


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--mode=vanilla"], {}, "results/slurm holds commit unknown, 3 shards, options: '--mode=block'; remove it or"),
        (["--mode=block"], {"SLURM_NTASKS": "4"}, "this is commit unknown, 4 shards"),
        (["--mode=block", "--shard=1/2"], {}, "--shard=1/2 is set by this script"),
        (["--mode=block", "--output", "x"], {}, "--output is set by this script"),
        (["--mode=block", "--resume=x"], {}, "--resume=x is set by this script"),
        (["--mode=block", "--benchmark-json=x"], {}, "--benchmark-json=x is set by this script"),
        (["--mode=block"], {"SLURM_SUBMIT_DIR": "/"}, "submit it from the repository's root, not from /"),
        (["--mode=block"], {"SLURM_JOB_ID": ""}, "this is a job; submit it: sbatch"),
    ],
)
def test_what_is_refused(job, options, environment, message):
    job("--mode=block", DIES="1/3")
    code, text, calls = job(*options, **environment)
    assert code == 2 and message in text
    assert not calls


def test_a_run_that_is_merged_is_not_run_again(job):
    job()
    code, text, calls = job()
    assert code == 2 and "results/slurm/merged.json is there already" in text and not calls
    code, text, calls = job("--mode=block", RESULTS="results/other")
    assert code == 0 and (job.root / "results/other/merged.json").exists()


@pytest.mark.parametrize(
    ("visible", "taken"),
    [("4,5", ["4", "5", "4"]), ("4", ["4", "4", "4"]), ("", ["", "", ""]), ("GPU-a,GPU-b,c", ["GPU-a", "GPU-b", "c"])],
)
def test_a_task_takes_one_gpu_where_it_is_given_several(job, visible, taken):
    _, _, calls = job(CUDA_VISIBLE_DEVICES=visible)
    gpus = [line.split()[0].removeprefix("gpu=") for line in calls if "pytest" in line]
    assert gpus == taken


@pytest.mark.parametrize("options", [["--tensor-parallel-size=2"], ["--tensor-parallel-size", "2"]])
@pytest.mark.parametrize(
    ("visible", "taken"),
    [("4,5,6,7", ["4,5", "6,7", "4,5"]), ("4,5", ["4,5"] * 3), ("a,b,c", ["a,b", "c,a", "b,c"]), ("", [""] * 3)],
)
def test_a_task_takes_the_gpus_of_its_ranks(job, options, visible, taken):
    code, text, calls = job(*options, CUDA_VISIBLE_DEVICES=visible, RANK="0", WORLD_SIZE="3")
    assert code == 0, text
    lines = [line for line in calls if "pytest" in line]
    assert [line.split()[0].removeprefix("gpu=") for line in lines] == taken
    # the ranks that the cluster names are not the suite's
    assert all("world= " in line and " ".join(options) in line for line in lines)


def test_a_number_of_ranks_that_is_none(job):
    code, text, calls = job("--tensor-parallel-size", "two")
    assert code == 2 and "--tensor-parallel-size must be a positive integer, got two" in text and not calls
