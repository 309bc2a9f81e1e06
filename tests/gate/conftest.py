"""A repository to gate, the folder of temporary files, and the worker whose clock is known."""

import shutil
import subprocess

import pytest

from evals.gate import measure
from evals.runs.git import git_environment
from tests.gate.figures import ROOT, Clockwork


@pytest.fixture
def clockwork(monkeypatch):
    monkeypatch.setattr(measure, "Worker", Clockwork)
    monkeypatch.setattr(Clockwork, "log", [])
    return Clockwork


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """A repository of one commit, of what the gate needs of this tree."""
    folder = tmp_path_factory.mktemp("repository")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("blockinfer", "evals"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "sample_200.jsonl", folder)
    (folder / ".gitignore").write_text("__pycache__/\n")
    commit = "-c user.name=gate -c user.email=gate@localhost commit --no-gpg-sign -m"
    for command in ("init", "add .", f"{commit} base"):
        subprocess.run(["git", *command.split()], cwd=folder, env=git_environment(), check=True, capture_output=True)
    return folder


@pytest.fixture
def clone(repository, tmp_path_factory):
    """A clone of the repository, to change."""
    folder = tmp_path_factory.mktemp("head") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(repository), str(folder)], env=git_environment(), check=True)
    return folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder that temporary files go to."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path
