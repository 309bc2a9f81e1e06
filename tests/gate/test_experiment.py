"""The experiment with the gate itself."""

import json

import pytest

from evals.gate import experiment, measure
from evals.gate.cases import PROFILES
from evals.gate.judge import FAILED, PASSES
from evals.gate.measure import Measurement
from tests.gate.figures import STATIC, pairs_of


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
