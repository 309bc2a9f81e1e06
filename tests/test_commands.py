"""`python -m evals COMMAND`: what cannot be used is named in a sentence, with exit code 2 and no traceback."""

import pytest

from evals.__main__ import main
from evals.gate.exits import run_command

TINY = "evals/llada_tiny"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("study {0}/no --out {0}", "no' is no folder; a checkpoint's folder or a Hub name is expected"),
        (f"study {TINY} --out {{0}} --rows 0", "argument --rows: must be at least 1, got 0"),
        (f"study {TINY} --out {{0}} --max-num-seqs x", "argument --max-num-seqs: must be an integer, got 'x'"),
        ("quantized-loss {0}", "there is no config.json; a checkpoint in the Hugging Face format is expected"),
        (f"quantized-loss {TINY} --rows -1", "argument --rows: must be at least 1, got -1"),
        ("evaluate-tiny {0}", "holds no small model: [Errno 2] No such file or directory"),
        (f"evaluate-tiny {TINY} --split test", "argument --split: invalid choice: 'test'"),
        (f"evaluate-tiny {TINY} --rows 0", "argument --rows: must be at least 1, got 0"),
        ("train-tiny --out {0} --steps 0", "argument --steps: must be at least 1, got 0"),
        ("train-tiny --out {0} --rows -1", "argument --rows: must be at least 1, got -1"),
        ("train-tiny --out {0} --minutes nan", "argument --minutes: must be at least 0.1 and finite, got nan"),
        ("stages --batch 0", "argument --batch: must be at least 1, got 0"),
        ("report", "the following arguments are required: results\n"),
    ],
)
def test_bad_arguments(command, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(command.format(tmp_path).split())
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_a_sentence_that_ends_a_command_is_a_failure(capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def fail():
        raise SystemExit("study: no")

    with pytest.raises(SystemExit) as left:
        run_command(fail)
    assert left.value.code == 2 and capsys.readouterr().err == "study: no\n"
