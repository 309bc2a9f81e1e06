"""The command: what it refuses, what it leaves behind, a real run, what its options decide."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evals.gate import cases, measure
from evals.gate.__main__ import main
from evals.gate.cases import LEAST_PAIRS, PROFILES, GateCase, Profile
from evals.gate.judge import FAILED, PASSES, REGRESSION, judge
from evals.gate.measure import RunFailed, base_checkout
from evals.gate.worker import SLOWDOWN
from tests.gate.figures import FREE, LIMIT, ROOT, Clockwork


def test_drift_favours_neither_side(clockwork, repository):
    pairs = measure.measure(repository, "HEAD", [FREE], 40, slowdown=0.1).pairs[FREE]
    assert clockwork.log[2:6] == ["base", "head", "head", "base"] and len(clockwork.log) == 82
    verdict = judge(FREE, pairs, LIMIT)
    assert verdict.wall.typical == pytest.approx(1.1, abs=0.001) and verdict.wall.is_slower(LIMIT)
    # both sides were asked the same rows, others in every pair until all 200 were
    assert all(base.answers == head.answers for base, head in pairs)
    assert len({answer for base, _ in pairs for answer in base.answers}) == 160


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


@pytest.fixture
def heeding_ctrl_c():
    """Of a job in a shell's background SIGINT is ignored, and in what it starts as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_ctrl_c")
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
    monkeypatch.setitem(cases.PROFILES, "quick", Profile(TINY, pairs=24))
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
    base, worked_on = re.match(r"base (\w+), head (\w+\+); 24 pairs a case, margin 5 %", printed).groups()
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
