"""The gate: its statistics where the truth is known, its rules, what it refuses, what it leaves behind, a real run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from evals.gate import cases, experiment, measure
from evals.gate.__main__ import main
from evals.gate.cases import LEAST_PAIRS, PROFILES, GateCase, Profile
from evals.gate.judge import CANNOT_TELL, FAILED, PASSES, REGRESSION, Ratio, exit_code, judge, nfe_fault, typical_ratio
from evals.gate.measure import Measurement, RunFailed, Unit, base_checkout
from evals.gate.worker import SLOWDOWN

ROOT = Path(__file__).parent.parent
STATIC = GateCase("block", 32, "low_confidence", max_tokens=64, rows=4)
FREE = GateCase("block", 32, "threshold", max_tokens=64, rows=4)
LIMIT = 0.05


def heavy_tailed(seed, slowdown, scale):
    """40 pairs of times, of rows of different lengths; a burst makes every fifth unit up to six times as long."""
    rng = np.random.default_rng(seed)
    work = rng.uniform(0.1, 0.4, 40)
    sides = []
    for factor in (1.0, 1 + slowdown):
        burst = np.where(rng.random(40) < 0.2, rng.uniform(1, 6, 40), 1)
        sides.append(work * factor * burst * np.exp(scale * rng.standard_t(2, 40)))
    return sides


def test_ratio_of_steady_pairs():
    ratio = typical_ratio([0.1, 0.2, 0.4] * 14, [0.11, 0.22, 0.44] * 14)
    assert (ratio.typical, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    assert ratio.is_slower(0.05) and not ratio.is_slower(0.11) and ratio.can_tell(0.05)
    assert str(ratio) == "1.100 (1.100-1.100)"


def test_interval_of_the_median_on_known_quantiles():
    # for ratios exp(1/100) .. exp(41/100) the binomial(41, 1/2) puts the median's 95 % interval at the 15th and 27th
    ratio = typical_ratio([1.0] * 41, np.exp(np.arange(1, 42) / 100))
    assert np.log([ratio.typical, ratio.low, ratio.high]) == pytest.approx([0.21, 0.15, 0.27], abs=0.0101)


def test_alarms_and_misses_under_heavy_tailed_noise():
    same, slow = ([typical_ratio(*heavy_tailed(seed, s, 0.02)) for seed in range(100)] for s in (0.0, 0.1))
    assert sum(ratio.is_slower(LIMIT) for ratio in same) <= 1
    assert sum(ratio.is_slower(LIMIT) for ratio in slow) >= 85
    assert sum(ratio.low <= 1 <= ratio.high for ratio in same) >= 90
    assert sum(ratio.low <= 1.1 <= ratio.high for ratio in slow) >= 90


def test_interval_too_wide_to_tell():
    assert Ratio(1.0, 0.96, 1.05).can_tell(0.05) and not Ratio(1.0, 0.95, 1.06).can_tell(0.05)
    assert not typical_ratio(*heavy_tailed(0, 0.1, 0.4)).can_tell(LIMIT)


class Clockwork(measure.Worker):
    """A side without a process. Both share a clock that slows down by a hundredth with every unit."""

    log: list[str] = []
    more_forwards = 0

    def __init__(self, side, root, slowdown=0.0):
        self.side, self.factor = side, 1 + slowdown

    def ask(self, **request):
        self.request = request

    def reply(self):
        if "params" not in self.request:
            return {}
        self.log.append(self.side)
        seconds = self.factor * 1.01 ** len(self.log)
        rows = self.request["rows"]
        nfe = 4 + (self.side == "head") * self.more_forwards
        return {"wall": seconds, "cpu": seconds, "tokens": 9, "nfe": nfe, "answers": [str(row) for row in rows]}

    def close(self):
        pass


@pytest.fixture
def clockwork(monkeypatch):
    monkeypatch.setattr(measure, "Worker", Clockwork)
    monkeypatch.setattr(Clockwork, "log", [])
    return Clockwork


def test_drift_favours_neither_side(clockwork, repository):
    pairs = measure.measure(repository, "HEAD", [FREE], 40, slowdown=0.1).pairs[FREE]
    assert clockwork.log[2:6] == ["base", "head", "head", "base"] and len(clockwork.log) == 82
    verdict = judge(FREE, pairs, LIMIT)
    assert verdict.wall.typical == pytest.approx(1.1, abs=0.001) and verdict.wall.is_slower(LIMIT)
    # both sides were asked the same rows, others in every pair until all 200 were
    assert all(base.answers == head.answers for base, head in pairs)
    assert len({answer for base, _ in pairs for answer in base.answers}) == 160


def units(seconds, nfe=100, answers=("a", "b")):
    return [Unit(wall, cpu, 50, nfe, list(answers)) for wall, cpu in seconds]


STEADY = [(1.0, 1.0)] * 40
WILD = [(1.0 + 9 * (i % 2), 1.0) for i in range(40)]


def pairs_of(head, base=STEADY, **figures):
    return list(zip(units(base), units(head, **figures), strict=True))


def test_either_clock_fails_head():
    for head, clock in (([(1.1, 1.0)] * 40, "wall time"), ([(1.0, 1.1)] * 40, "CPU time")):
        verdict = judge(STATIC, pairs_of(head), LIMIT)
        assert [text.partition(" is ")[0] for text in verdict.regressions] == [clock]
        assert verdict.regressions[0].endswith("1.100 times (95 % interval 1.100 to 1.100) base's, beyond 1.05")
        assert not judge(STATIC, pairs_of(head), 0.11).regressions
    assert exit_code([judge(STATIC, pairs_of([(0.5, 0.5)] * 40), LIMIT)]) == PASSES


def test_an_unsteady_clock_leaves_it_to_the_other():
    verdict = judge(STATIC, pairs_of(WILD), LIMIT)
    assert verdict.notes == ["wall time was too unsteady to tell; the other clock decides"]
    assert exit_code([verdict]) == PASSES
    slow = judge(STATIC, pairs_of([(wall, 1.1) for wall, _ in WILD]), LIMIT)
    assert exit_code([slow]) == REGRESSION


def test_two_unsteady_clocks_cannot_tell():
    verdict = judge(STATIC, pairs_of([(wall, wall) for wall, _ in WILD]), LIMIT)
    assert exit_code([verdict]) == CANNOT_TELL and "both clocks" in verdict.unclear[0]
    regression = judge(STATIC, pairs_of([(1.1, 1.1)] * 40), LIMIT)
    assert exit_code([verdict, regression]) == REGRESSION


@pytest.mark.parametrize("rule", ["low_confidence", "random", "sequential"])
def test_forwards_of_a_schedule_may_not_rise_at_all(rule):
    assert nfe_fault(rule, 1000, 1000) is None and nfe_fault(rule, 1000, 900) is None
    assert nfe_fault(rule, 1000, 1001) == "1001 forwards where there were 1000 (+0.1%), and none more is allowed"


@pytest.mark.parametrize("rule", ["threshold", "factor", "entropy"])
def test_forwards_of_the_other_rules_may_rise_by_a_hundredth(rule):
    assert nfe_fault(rule, 1000, 1010) is None
    assert nfe_fault(rule, 1000, 1011) == "1011 forwards where there were 1000 (+1.1%), and 1% more is allowed"


def test_a_rise_of_forwards_is_accepted_where_it_is_named():
    assert judge(STATIC, pairs_of(STEADY, nfe=101), LIMIT).regressions == [
        "4040 forwards where there were 4000 (+1.0%), and none more is allowed; if that is intended: "
        "--accept nfe=block-32-low_confidence"
    ]
    accepted = judge(STATIC, pairs_of(STEADY, nfe=101), LIMIT, accept_nfe=True)
    assert not accepted.regressions and accepted.notes[0].endswith("none more is allowed: accepted")
    unneeded = judge(STATIC, pairs_of(STEADY), LIMIT, accept_nfe=True)
    assert unneeded.notes == ["its forwards did not rise, so --accept was not needed"]
    # forwards alone are accepted, not time
    assert judge(STATIC, pairs_of([(1.1, 1.0)] * 40), LIMIT, accept_nfe=True).regressions


def test_other_tokens_are_told_and_not_judged():
    verdict = judge(STATIC, pairs_of(STEADY, answers=("a", "c")), LIMIT)
    assert verdict.notes == ["40 of 80 answers differ (2000 and 2000 tokens); this is not judged"]
    assert exit_code([verdict]) == PASSES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --base"),
        (["--margin", "0"], "argument --margin: must be a percentage above 0, got '0'"),
        (["--margin", "nan"], "argument --margin: must be a percentage above 0, got 'nan'"),
        (["--margin", "5%"], "argument --margin: must be a percentage above 0, got '5%'"),
        (["--pairs", "39"], "argument --pairs: must be an integer of at least 40, got '39'"),
        (["--profile", "fast"], "argument --profile: invalid choice: 'fast'"),
        (["--accept", "time=block-32-threshold"], "argument --accept: must be nfe=CASE, got 'time=block-32-threshold'"),
        (["--accept", "nfe="], "argument --accept: must be nfe=CASE, got 'nfe='"),
        (["--accept", "nfe=block-32-treshold"], "has no case 'block-32-treshold'; did you mean 'block-32-threshold'?"),
        (["--accept", "nfe=block-32-factor", "--profile", "quick"], "the profile quick has no case 'block-32-factor'"),
    ],
)
def test_bad_usage(arguments, message, capsys):
    base = ["--base", "HEAD"] if arguments else []
    with pytest.raises(SystemExit) as stopped:
        main(base + arguments)
    assert stopped.value.code == FAILED and message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["fast", "-0.1", "nan", "11"])
def test_a_slowdown_that_is_no_share_is_refused(monkeypatch, capsys, value):
    monkeypatch.setenv(SLOWDOWN, value)
    with pytest.raises(SystemExit):
        main(["--base", "HEAD"])
    assert f"must be a share from 0 to 10, such as 0.1; got '{value}'" in capsys.readouterr().err


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """A repository of one commit, of what the gate needs of this tree."""
    folder = tmp_path_factory.mktemp("repository")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("blockinfer", "evals"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "sample_200.jsonl", folder)
    (folder / ".gitignore").write_text("__pycache__/\n")
    for command in ("init", "add .", "-c user.name=gate -c user.email=gate@localhost commit --no-gpg-sign -m base"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder that temporary files go to."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def assert_nothing_is_left(repository, temporary):
    worktrees = measure.git(repository, "worktree", "list", "--porcelain")
    assert worktrees.count("worktree ") == 1 and not (repository / ".git" / "worktrees").exists()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RunFailed])
def test_the_worktree_goes_whatever_happens(repository, temporary, error):
    with pytest.raises(error), base_checkout(repository, "HEAD") as path:
        assert (path / "evals" / "gate").is_dir()
        (path / "blockinfer" / "changed").write_text("changed")
        raise error
    assert_nothing_is_left(repository, temporary)


def test_a_worktree_that_was_half_made_goes_too(repository, temporary, monkeypatch):
    real = measure.git

    def interrupted(root, *arguments):
        done = real(root, *arguments)
        if arguments[:2] == ("worktree", "add"):
            real(root, "worktree", "lock", arguments[-2])
            Path(arguments[-2], ".git").unlink()
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(measure, "git", interrupted)
    with pytest.raises(KeyboardInterrupt), base_checkout(repository, "HEAD"):
        pytest.fail("the checkout was not made")
    assert_nothing_is_left(repository, temporary)


def is_running(process):
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_gate_that_is_cancelled_leaves_nothing(repository, temporary, sent):
    gate = subprocess.Popen(
        [sys.executable, "-m", "evals.gate", "--base", "HEAD"], cwd=repository, stderr=subprocess.PIPE, text=True
    )
    workers = f"/proc/{gate.pid}/task/{gate.pid}/children"
    deadline = time.monotonic() + 60
    while len(children := Path(workers).read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children) == 2 and gate.poll() is None
    gate.send_signal(sent)
    assert gate.wait(20) == 128 + sent, gate.stderr.read()
    gate.stderr.close()
    # one that was not yet killed ends by itself, as its stdin has
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, children))
    assert_nothing_is_left(repository, temporary)


def test_a_commit_that_is_not_there(repository, tmp_path, capsys):
    assert main(["--base", "no-such-branch"], root=repository) == FAILED
    assert "--base no-such-branch names no commit of" in capsys.readouterr().err
    shutil.copy(ROOT / "sample_200.jsonl", tmp_path)
    assert main(["--base", "HEAD"], root=tmp_path) == FAILED
    assert "not a git repository" in capsys.readouterr().err


TINY = (
    GateCase("block", 8, "low_confidence", max_tokens=8, rows=1, denoising_steps=2),
    GateCase("block", 8, "threshold", max_tokens=8, rows=1),
)


def test_a_real_run(repository, temporary, tmp_path_factory, monkeypatch, capsys):
    """head's engine is given a third more work, and its threshold another default, which takes more forwards."""
    monkeypatch.setitem(cases.PROFILES, "quick", Profile(TINY, pairs=12))
    monkeypatch.setenv(SLOWDOWN, "0.35")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    head = tmp_path_factory.mktemp("head") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(repository), str(head)], check=True)
    rules = head / "blockinfer" / "decoding" / "unmasking.py"
    text = rules.read_text()
    assert text.count("default=0.9)") == 1
    rules.write_text(text.replace("default=0.9)", "default=1.0)"))
    assert main(["--base", "HEAD", "--profile", "quick"], root=head) == REGRESSION
    printed = capsys.readouterr().out
    base, worked_on = re.match(r"base (\w+), head (\w+\+); 12 pairs a case, margin 5 %", printed).groups()
    assert worked_on == base + "+" and "head is slowed down by 35 %" in printed
    for case in TINY:
        (ratio,) = re.findall(rf"REGRESSION {case.id}: CPU time is (\S+) times", printed)
        assert 1.2 < float(ratio)
    assert 1.2 < float(re.search(r"REGRESSION block-8-low_confidence: CPU time is (\S+) times", printed)[1]) < 1.5
    rises = re.findall(r"REGRESSION (\S+): \d+ forwards where there were \d+", printed)
    assert rises == ["block-8-threshold"] and printed.endswith("head fails\n")
    assert_nothing_is_left(head, temporary)


def test_a_case_that_base_does_not_take(clockwork, repository, monkeypatch, capsys):
    def reply(self):
        unknown = self.side == "base" and self.request.get("params", {}).get("unmasking") == "threshold"
        return {"unsupported": "no such rule"} if unknown else Clockwork.answer(self)

    monkeypatch.setattr(Clockwork, "answer", Clockwork.reply, raising=False)
    monkeypatch.setattr(Clockwork, "reply", reply)
    assert main(["--base", "HEAD", "--profile", "quick", "--margin", "50"], root=repository) == PASSES
    said = "block-32-threshold: base does not take it, so it is not judged: no such rule"
    assert said in capsys.readouterr().out
    monkeypatch.setitem(cases.PROFILES, "quick", Profile((FREE,), LEAST_PAIRS))
    assert main(["--base", "HEAD", "--profile", "quick"], root=repository) == FAILED
    assert "base takes none of the cases" in capsys.readouterr().out


def test_the_options_decide(clockwork, repository, monkeypatch, capsys):
    def gate(*options):
        return main(["--base", "HEAD", "--profile", "quick", *options], root=repository)

    assert gate() == PASSES
    monkeypatch.setenv(SLOWDOWN, "0.1")
    assert gate() == REGRESSION and gate("--margin", "12") == PASSES
    monkeypatch.setenv(SLOWDOWN, "0")
    monkeypatch.setattr(Clockwork, "more_forwards", 1)
    accept = [f"--accept=nfe={case.id}" for case in PROFILES["quick"].cases]
    assert gate() == REGRESSION and gate(*accept[1:]) == REGRESSION and gate(*accept) == PASSES
    capsys.readouterr()
    monkeypatch.setattr(Clockwork, "log", [])
    assert gate(*accept, "--pairs", "41") == PASSES and "; 41 pairs a case, " in capsys.readouterr().out
    assert len(Clockwork.log) == 3 * 2 * (1 + 41)


def test_a_small_model_that_changed_is_told(clockwork, repository, tmp_path, capsys):
    head = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(repository), str(head)], check=True)
    model = head / "evals" / "llada_tiny"
    (model / "config.json").write_text("{}")
    (model / "tokenizer_config.json").unlink()
    main(["--base", "HEAD", "--profile", "quick"], root=head)
    assert "the small models differ: config.json, tokenizer_config.json\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("blockinfer/__init__.py", "raise RuntimeError('broken on purpose')", "RuntimeError: broken on purpose"),
        ("blockinfer/__init__.py", "import os; os._exit(7)", "head ended with code 7"),
        ("evals/llada_tiny", None, "FileNotFoundError: this checkout has no evals/llada_tiny"),
        ("blockinfer", None, "ImportError: this checkout has no package blockinfer, and "),
    ],
)
def test_a_side_that_breaks_is_named(repository, temporary, tmp_path_factory, capsys, file, text, message):
    head = tmp_path_factory.mktemp("head") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(repository), str(head)], check=True)
    if text is None:
        shutil.rmtree(head / file)
    else:
        (head / file).write_text(text)
    with measure.Worker("head", head) as worker, pytest.raises(RunFailed, match=re.escape(message)):
        worker.ask(conversations=[], batch_size=1)
        worker.reply()
    assert list(temporary.iterdir()) == []


@pytest.fixture
def run_experiment(repository, tmp_path, monkeypatch):
    asked = []

    def fake(root, ref, cases, pairs, slowdown):
        assert (root, ref, cases, pairs) == (repository, "HEAD", PROFILES["quick"].cases, 40)
        asked.append(slowdown)
        if len(asked) == 6:
            raise KeyboardInterrupt
        commit = measure.short(repository)
        found = Measurement(commit, commit + run.changed, seconds=60.0)
        found.pairs[STATIC] = pairs_of([(1 + slowdown, 1 + slowdown)] * pairs)
        return found

    monkeypatch.setattr(experiment, "measure", fake)
    path = tmp_path / "runs.jsonl"

    def run(*arguments):
        return experiment.main(["--output", str(path), *arguments], root=repository)

    run.asked, run.path, run.changed = asked, path, ""
    return run


def test_the_experiment_goes_on_where_it_was_killed(run_experiment, capsys):
    with pytest.raises(KeyboardInterrupt):
        run_experiment("--runs", "3", "--slowdown", "0,0.1,0.3")
    assert len(run_experiment.path.read_text().splitlines()) == 5
    assert run_experiment("--runs", "3", "--slowdown", "0,0.1,0.3") == 0
    # in turn; the sixth was killed and is made again
    assert run_experiment.asked == [0.0, 0.1, 0.3, 0.0, 0.1, 0.3, 0.0, 0.1, 0.3, 0.3]
    table = capsys.readouterr().out.splitlines()[-5:]
    assert table[2] == "| 0 % | 3 | 0 | 0 | 0 | 0 | 1.000 (1.000-1.000) | 1.000 (1.000-1.000) | 60 |"
    assert table[3] == "| 10 % | 3 | 3 | 3 | 3 | 0 | 1.100 (1.100-1.100) | 1.100 (1.100-1.100) | 60 |"
    first = json.loads(run_experiment.path.read_text().splitlines()[0])
    assert first["exit_code"] == PASSES and first["cases"][STATIC.id]["cpu"]["ratio"] == [1.0, 1.0, 1.0]


def test_the_experiment_refuses_runs_of_another_commit_and_a_changed_checkout(run_experiment, repository, capsys):
    run_experiment("--runs", "1", "--slowdown", "0")
    lines = run_experiment.path.read_text()
    run_experiment.path.write_text(lines.replace('"profile": "quick"', '"profile": "full"'))
    assert run_experiment("--runs", "1") == FAILED
    assert "holds runs with profile full, this is quick: give another --output" in capsys.readouterr().err
    run_experiment.path.write_text(lines + lines[:20])
    assert run_experiment("--runs", "1") == FAILED
    assert "runs.jsonl:2 is not a run" in capsys.readouterr().err
    changed = repository / "evals" / "__init__.py"
    changed.write_text("changed = True\n")
    try:
        assert run_experiment("--runs", "1") == FAILED
    finally:
        changed.write_text("")
    assert "the checkout has changes" in capsys.readouterr().err
    run_experiment.path.unlink()
    run_experiment.changed = "+"
    assert run_experiment("--runs", "1") == FAILED and not run_experiment.path.exists()
    assert "the checkout is no longer at " in capsys.readouterr().err


@pytest.mark.parametrize(("text", "shares"), [("0", [0.0]), ("0,0.05,0.1", [0.0, 0.05, 0.1])])
def test_shares(text, shares):
    assert experiment._shares(text) == shares


@pytest.mark.parametrize("arguments", [["--slowdown", "5%"], ["--slowdown", "-1"], ["--runs", "0"], ["--runs", "x"]])
def test_bad_usage_of_the_experiment(arguments, capsys):
    with pytest.raises(SystemExit):
        experiment.main(arguments)
    assert f"argument {arguments[0]}: must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("", ""),
        ("Faster.\r\nAccept: nfe=block-32-threshold\r\nIt looks further ahead.", "--accept=nfe=block-32-threshold"),
        ("Accept: nfe=a-1-b\nAccept: nfe=c-2-d", "--accept=nfe=a-1-b --accept=nfe=c-2-d"),
        ("Accept: nfe=$(touch pwned)", ""),
    ],
)
def test_the_workflow_gates_the_pull_request(tmp_path, body, expected):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "gate.yml").read_text())
    steps = workflow["jobs"]["gate"]["steps"]
    assert steps[0]["with"]["fetch-depth"] == 0
    stub = tmp_path / "nox"
    stub.write_text('#!/bin/sh\necho "$@"\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BASE": "release/1", "BODY": body}
    # as GitHub runs it
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", steps[-1]["run"]]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["-s", "gate", "--", "--base", "origin/release/1", *expected.split()]
    assert [path.name for path in tmp_path.iterdir()] == ["nox"]
