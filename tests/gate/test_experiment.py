"""The experiment with the gate itself."""

import json

import pytest

from evals.gate import checkout, experiment
from evals.gate.cases import PROFILES, Worse
from evals.gate.exits import FAILED, PASSES
from evals.gate.measure import Measurement
from evals.gate.outcomes import Run, table
from tests.gate.figures import FREE, STATIC, rounds_of


@pytest.fixture
def run_experiment(repository, tmp_path, monkeypatch):
    asked = []

    def fake(root, ref, cases, pairs, worse):
        assert (root, ref, cases, pairs) == (repository, "HEAD", PROFILES["quick"].cases, PROFILES["quick"].pairs)
        asked.append(str(worse))
        if len(asked) == 6:
            raise KeyboardInterrupt
        commit = checkout.short(repository)
        found = Measurement(commit, commit + run.changed, held=(1000, 1000), seconds=60.0)
        for case in (STATIC, FREE):
            found.rounds[case] = rounds_of([(1 + worse.work(case), 1 + worse.work(case))] * 40)
            found.peaks[case] = 1000, int(1000 * (1 + worse.memory))
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
    assert run_experiment.asked == ["0 %", "10 %", "30 %"] * 3 + ["30 %"]
    table = capsys.readouterr().out.splitlines()[-5:]
    same, slow = (f"{ratio:.3f} ({ratio:.3f}-{ratio:.3f})" for ratio in (1, 1.1))
    assert table[2] == f"| 0 % | 3 | 0 | 0 | 0 | 0 | 0 | 0 | {same} | {same} | {same} | 60 |"
    assert table[3] == f"| 10 % | 3 | 3 | 3 | 3 | 0 | 0 | 0 | {slow} | {slow} | {same} | 60 |"
    first = json.loads(run_experiment.path.read_text().splitlines()[0])
    assert first["exit_code"] == PASSES and first["cases"][STATIC.id]["cpu"]["ratio"] == [1.0, 1.0, 1.0]


def test_a_slowdown_in_one_place_and_memory_have_rows_of_their_own(run_experiment, capsys):
    assert run_experiment("--runs", "1", "--slowdown", "0,0.1:threshold,0.1:memory,0.1:vanilla") == 0
    table = capsys.readouterr().out.splitlines()[-6:]
    same, slow = (f"{ratio:.3f} ({ratio:.3f}-{ratio:.3f})" for ratio in (1, 1.1))
    assert table[2] == f"| 0 % | 1 | 0 | 0 | 0 | 0 | 0 | 0 | {same} | {same} | {same} | 60 |"
    assert table[3] == f"| 10 % in memory | 1 | 1 | 0 | 0 | 1 | 0 | 0 | {same} | {same} | 1.100 (1.000-1.100) | 60 |"
    assert table[4] == f"| 10 % in threshold | 1 | 1 | 1 | 1 | 0 | 0 | 0 | {slow} | {slow} | {same} | 60 |"
    assert table[5].startswith("| 10 % in vanilla | 1 | 0 |")


def test_alarms_of_other_cases_are_counted(run_experiment, capsys):
    run_experiment("--runs", "1", "--slowdown", "0.1:threshold")
    run = json.loads(run_experiment.path.read_text())
    run["cases"][STATIC.id]["wall"]["slower"] = True
    rows = table([Run.model_validate_json(json.dumps(run))])
    assert rows[-1].startswith("| 10 % in threshold | 1 | 1 | 1 | 1 | 0 | 1 | 0 |")


def test_the_experiment_refuses_runs_of_another_commit_and_a_changed_checkout(run_experiment, repository, capsys):
    run_experiment("--runs", "1", "--slowdown", "0")
    lines = run_experiment.path.read_text()
    run_experiment.path.write_text(lines.replace('"profile":"quick"', '"profile":"full"'))
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
    assert run_experiment("--runs", "1") == FAILED and run_experiment.path.read_text() == ""
    assert "the checkout is no longer at " in capsys.readouterr().err


def test_slowdowns():
    assert experiment._slowdowns("0") == [Worse()]
    assert experiment._slowdowns("0,0.05,0.1:entropy") == [Worse(), Worse(0.05), Worse(0.1, "entropy")]


@pytest.mark.parametrize(
    "arguments", [["--slowdown", "5%"], ["--slowdown", "0,-1"], ["--slowdown", "1:x"], ["--runs", "0"], ["--runs", "x"]]
)
def test_bad_usage_of_the_experiment(arguments, capsys):
    with pytest.raises(SystemExit):
        experiment.main(arguments)
    assert f"argument {arguments[0]}: must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"where":""', '"were":""', "where Field required"),
        ('"seconds":60.0', '"seconds":NaN', "seconds Input should be less than"),
        ('"seconds":60.0', '"seconds":-1', "seconds Input should be greater than 0"),
        ('"exit_code":0', '"exit_code":7', "exit_code Input should be less than or equal to 3"),
        ('"cases":{', '"cases":{"x":1,', "cases.x "),
        ('"held":[1000,', '"held":[0,', "held.0 "),
    ],
)
def test_a_line_that_is_no_run_is_named(run_experiment, capsys, old, new, message):
    run_experiment("--runs", "1", "--slowdown", "0")
    line = run_experiment.path.read_text()
    assert line.count(old) == 1
    run_experiment.path.write_text(line.replace(old, new))
    capsys.readouterr()
    assert run_experiment("--runs", "1") == FAILED
    (said,) = capsys.readouterr().err.splitlines()
    assert "runs.jsonl:1 is not a run (" in said and message in said and said.endswith("): remove the line")


def test_an_output_that_cannot_be_written_is_refused_at_the_start(run_experiment, tmp_path, capsys):
    for output in (tmp_path, tmp_path / "nofolder" / "x.jsonl"):
        assert run_experiment("--output", str(output)) == FAILED
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("experiment: ") and str(output) in said
    assert run_experiment.asked == []
