"""The worktree: what it leaves behind, whose repository it is of, and what ends the gate."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evals.gate import checkout
from evals.gate.checkout import RunFailed, base_checkout, git
from evals.gate.exits import FAILED
from tests.gate.figures import ROOT

pytestmark = pytest.mark.usefixtures("heeding_signals")


def assert_nothing_is_left(repository, temporary):
    worktrees = git(repository, "worktree", "list", "--porcelain")
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
    real = git

    def interrupted(root, *arguments):
        done = real(root, *arguments)
        if arguments[:2] == ("worktree", "add"):
            real(root, "worktree", "lock", arguments[-2])
            Path(arguments[-2], ".git").unlink()
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(checkout, "git", interrupted)
    with pytest.raises(KeyboardInterrupt), base_checkout(repository, "HEAD"):
        pytest.fail("the checkout was not made")
    assert_nothing_is_left(repository, temporary)


def is_running(process):
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def gate(repository):
    """A gate that has started its workers, whose numbers are `children`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "evals", "gate", "--base", "HEAD"], cwd=repository, stderr=subprocess.PIPE, text=True
    )
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while len(children := workers.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children) == 2 and process.poll() is None
    process.children = children
    yield process
    process.stderr.close()
    # one that was not yet killed ends by itself, as its stdin has
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, children))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_gate_that_is_cancelled_leaves_nothing(repository, temporary, gate, sent):
    gate.send_signal(sent)
    assert gate.wait(20) == 128 + sent, gate.stderr.read()
    assert gate.stderr.read() == ""
    assert_nothing_is_left(repository, temporary)


def test_the_next_gate_removes_the_worktree_of_one_that_was_killed(repository, temporary, gate):
    gate.kill()
    gate.wait()
    assert git(repository, "worktree", "list", "--porcelain").count("worktree ") == 2
    with base_checkout(repository, "HEAD"):
        assert git(repository, "worktree", "list", "--porcelain").count("worktree ") == 2
    assert_nothing_is_left(repository, temporary)


def test_the_worktrees_of_others_stay(repository, temporary):
    """Of a gate that lives, and of who works in one."""
    git(repository, "worktree", "add", "--detach", str(temporary / "blockinfer-gate-mine"), "HEAD")
    try:
        with base_checkout(repository, "HEAD") as first:
            with base_checkout(repository, "HEAD") as second:
                assert (first / "evals").is_dir() and (second / "evals").is_dir()
            assert (first / "evals").is_dir() and not second.exists()
        assert (temporary / "blockinfer-gate-mine" / "evals").is_dir()
    finally:
        git(repository, "worktree", "remove", "--force", str(temporary / "blockinfer-gate-mine"))
    assert_nothing_is_left(repository, temporary)


def leave(body):
    program = f"import os, signal\nfrom evals.gate.exits import run_command\n{body}\nrun_command(main)"
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_does_not_end_the_tidying_up(first):
    body = f"""
def main():
    try:
        os.kill(os.getpid(), {first:d})
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("tidied up")
"""
    left = leave(body)
    assert (left.returncode, left.stdout, left.stderr) == (128 + first, "tidied up\n", "")


def test_a_signal_that_is_ignored_stays_so():
    body = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
def main():
    os.kill(os.getpid(), signal.SIGHUP)
    return 3
"""
    assert leave(body).returncode == 3


def test_a_crash_is_no_verdict():
    left = leave("def main(): raise ValueError('a crash')")
    assert left.returncode == FAILED and left.stderr.endswith("ValueError: a crash\n")


@pytest.fixture
def other(tmp_path_factory):
    """Another repository, of one commit, as one is in that is about to commit."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "file").write_text("mine")
    commit = "-c user.name=gate -c user.email=gate@localhost commit --no-gpg-sign -m other"
    for command in ("init", "add .", commit):
        git(folder, *command.split())
    return folder


def test_what_git_gives_to_a_hook_is_not_followed(repository, other, monkeypatch, temporary):
    index = (other / ".git" / "index").read_bytes()
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_PREFIX", "")
    with base_checkout(repository, "HEAD") as base:
        assert (base / "evals").is_dir() and checkout.short(base) == checkout.short(repository)
    assert checkout.short(repository) != checkout.short(other)
    assert (other / ".git" / "index").read_bytes() == index
    assert_nothing_is_left(repository, temporary)


def test_git_that_cannot_be_run(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    for _ in range(2):
        with pytest.raises(RunFailed, match="git cannot be run: "):
            git(repository, "status")
        # which asks git first
        monkeypatch.setenv("GIT_DIR", "x")
