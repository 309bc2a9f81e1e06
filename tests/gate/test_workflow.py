"""The workflow on pull requests."""

import os
import subprocess

import pytest
import yaml

from tests.gate.figures import ROOT


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
