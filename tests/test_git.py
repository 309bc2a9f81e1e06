"""Calls of git, also in a hook of git, whose environment names another repository or another index."""

import os
import runpy
import subprocess
from pathlib import Path

import pytest

from evals.runs.git import commit, git_environment

ROOT = Path(__file__).parent.parent


@pytest.fixture
def other(tmp_path):
    """A repository with one commit and no files."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    for command in (["init"], [*identity, "commit", "--no-gpg-sign", "--allow-empty", "-m", "other"]):
        subprocess.run(["git", *command], cwd=tmp_path, env=git_environment(), check=True, capture_output=True)
    return tmp_path


@pytest.fixture
def hook(monkeypatch, other):
    """The environment of a hook of that repository."""
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / "index"))
    monkeypatch.setenv("GIT_AUTHOR_NAME", "kept")


def test_git_sees_the_folder_it_is_called_in(hook, other):
    (other / "file").touch()
    done = subprocess.run(["git", "add", "."], cwd=other, env=git_environment(), capture_output=True)
    assert done.returncode == 0 and not (other / "index").exists()
    assert git_environment()["GIT_AUTHOR_NAME"] == "kept"


def test_a_run_names_its_own_commit(monkeypatch, request):
    here = commit()
    other = request.getfixturevalue("other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert commit() == here


def test_tests_and_evals_run_without_a_hooks_environment(hook):
    runpy.run_path(str(ROOT / "conftest.py"))
    assert not {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"} & os.environ.keys()
    assert os.environ["GIT_AUTHOR_NAME"] == "kept"


def test_no_git_is_needed_where_none_has_set_anything(monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "")
    assert git_environment() == dict(os.environ)
