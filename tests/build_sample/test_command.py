"""The command: from the Hub, and what it refuses."""

import os
import re
import subprocess
import sys

import pytest

import evals.questions.build_sample
from evals.questions.build_sample import build, main
from evals.questions.rows import load_rows
from tests.build_sample.public_sets import FILES, ROOT, gsm8k, mmlu, without, write, write_lines
from tests.hub import COMMIT, hub


def run(*options, cwd, **environment):
    command = [sys.executable, "-m", "evals", "build-sample", *options]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=variables)


def test_from_the_hub(published, tmp_path):
    out = tmp_path / "rows.jsonl"
    # not to be taken for the Hub's
    write_lines(tmp_path / "openai/gsm8k/test.jsonl", [gsm8k(i) for i in range(500, 510)])
    with hub(published) as address:
        done = run(f"--out={out}", "--per-source=4", cwd=tmp_path, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    rows, local = load_rows(out), build(4, 0, published)
    assert [without(row, "revision") for row in rows] == [without(row, "revision") for row in local]
    names = ["openai/gsm8k", "HuggingFaceH4/MATH-500", "cais/mmlu", "Xnhyacinth/LongBench"]
    assert [row["revision"] for row in rows[:4]] == [f"{name}@{COMMIT}" for name in names]


def test_a_set_that_the_hub_does_not_give(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = run(f"--out={out}", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 2 and not out.exists() and len(done.stderr.splitlines()) == 1
    assert "openai/gsm8k: the split test of config main could not be loaded from the Hugging Face Hub" in done.stderr
    assert done.stderr.endswith("With a copy of the set in DIR/openai/gsm8k, pass --from DIR\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{0}/no/rows.jsonl"], "--out: '.*/no/rows.jsonl' cannot be written: there is no folder '.*/no'"),
        (["--out", "{0}"], "--out: '.*' cannot be written: it is a folder"),
        (["--out", "/dev/null"], "--out: '/dev/null' cannot be written: it is a device"),
        (["--out", "{0}/file", "--from", "{0}"], "--out: '.*/file' cannot be written: it is read too"),
        (["--out", ""], "argument --out: must not be empty, got ''"),
        (["--out", "{0}/rows", "--from", ""], "argument --from: must not be empty, got ''"),
        (["--out", "{0}/rows", "--per-source", "0"], "argument --per-source: must be at least 1, got 0"),
        (["--out", "{0}/rows", "--from", "{0}/no"], "--from must be a folder, got .*/no'"),
        (["--out", "{0}/rows", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        ([], "the following arguments are required: --out"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(options, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(evals.questions.build_sample, "build", lambda *_: pytest.fail("the sets were read"))
    with pytest.raises(SystemExit) as error:
        main([option.format(tmp_path) for option in options])
    assert error.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_an_error_is_one_line_and_leaves_the_file_as_it_was(bare, tmp_path):
    out = tmp_path / "rows"
    out.write_text("before")
    write(bare / FILES[mmlu], "")
    with pytest.raises(SystemExit, match="build_sample: cais/mmlu: .*"):
        main(["--out", str(out), "--from", str(bare), "--per-source=1"])
    assert out.read_text() == "before"


def test_the_library_is_needed_for_drawing_alone(published, tmp_path):
    script = "import sys; sys.modules['datasets'] = None; import evals.conftest; "
    script += "from evals.questions.build_sample import main; "
    script += f"main(['--out', {str(tmp_path / 'rows')!r}, '--from', {str(published)!r}])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "drawing rows needs datasets: pip install 'blockinfer[test]'" in done.stderr
