"""The sides' processes: what one does that is not right is told in a sentence, and is no verdict."""

import re
import shutil
import time

import pytest

from evals.gate import cases, side
from evals.gate.cases import PAIRS_A_ROUND, GateCase, Profile
from evals.gate.checkout import RunFailed
from evals.gate.command import main
from evals.gate.exits import FAILED
from evals.gate.side import Worker
from tests.gate.figures import ROOT

CASE = GateCase("block", 8, "low_confidence", max_tokens=8, rows=2, denoising_steps=2)

# A worker without an engine. head goes wrong in its second unit, base never.
PROGRAM = """
import json, os, sys, time

def say(text):
    os.write(1, text.encode())

sys.stdin.readline()
say("{}\\n")
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    reply = {"bytes": 1000}
    if request["call"] == "unit":
        reply = {"wall": 0.1, "cpu": 0.1, "tokens": 9, "nfe": 8, "answers": ["a", "b"]}
    if number == 1 and os.path.basename(os.getcwd()) != "base":
        print("a warning\\nand the last line", file=sys.stderr, flush=True)
        WRONG
    say(json.dumps(reply) + "\\n")
"""


@pytest.fixture
def go_wrong(repository, tmp_path, temporary, monkeypatch, capfd):
    """Runs the gate with a head that does what the given code says -> what the gate says."""
    monkeypatch.setitem(cases.PROFILES, "quick", Profile((CASE,), pairs=PAIRS_A_ROUND))

    def run(code):
        program = tmp_path / "program.py"
        program.write_text(PROGRAM.replace("WRONG", code))
        monkeypatch.setattr(side, "WORKER", program)
        assert main(["--base", "HEAD", "--profile", "quick"], root=repository) == FAILED
        (said,) = capfd.readouterr().err.splitlines()
        assert said.startswith("gate: head ")
        return said.removeprefix("gate: head ")

    return run


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("say('Loading 100 %\\n')", "wrote what is no reply, 'Loading 100 %'"),
        ("os.write(1, bytes([255, 254, 10]))", "wrote what is no reply, '\ufffd\ufffd'"),
        ("reply = [reply]", 'wrote what is no reply, \'[{"wall": 0.1, '),
        ("say('[' * 100000 + '\\n')", "wrote what is no reply, '[[[["),
        ("say('x' * 2**21)", "wrote a reply of more than 1048576 bytes, 'xxx"),
        # in one write: in two the second may come when the first was taken for the whole
        ("say(2 * (json.dumps(reply) + '\\n'))", 'wrote more than a reply, \'{"wall": 0.1, '),
        ("reply['answers'].pop()", "answered 1 of 2 requests in the case block-8-low_confidence"),
        ("reply['answers'] = [1, 2]", "wrote a reply that is none: answers.0: "),
        ("del reply['cpu']", "wrote a reply that is none: cpu: "),
        ("reply['more'] = 1", "wrote a reply that is none: more: "),
        ("reply['wall'] = '0.1'", "wrote a reply that is none: wall: "),
        ("reply['wall'] = float('nan')", 'wrote what is no reply, \'{"wall": NaN, '),
        ("reply['cpu'] = float('inf')", 'wrote what is no reply, \'{"wall": 0.1, "cpu": Infinity, '),
        ("reply['cpu'] = 0", "wrote a reply that is none: cpu: "),
        ("reply['wall'] = -0.1", "wrote a reply that is none: wall: "),
        ("reply['nfe'] = 0", "wrote a reply that is none: nfe: "),
        ("reply['nfe'] = 10**400", "wrote a reply that is none: nfe: "),
        ("reply['tokens'] = 9.5", "wrote a reply that is none: tokens: "),
        ("reply = {'unsupported': 'no such mode'}", "wrote a reply that is none: "),
        ("reply = {'error': 'ValueError: two\\nlines'}", "failed: 'ValueError: two lines'"),
        ("sys.exit(7)", "ended with code 7"),
        ("os.abort()", "was ended by SIGABRT"),
        ("say('{'); os._exit(0)", "ended with code 0 after '{'"),
    ],
)
def test_a_head_that_goes_wrong(go_wrong, code, message):
    said = go_wrong(code)
    assert said.startswith(message), said
    assert said.endswith("; it said last: and the last line") or "failed: " in said


def test_half_a_reply_and_then_nothing_ends(go_wrong, monkeypatch):
    monkeypatch.setattr(side, "PATIENCE", 1)
    start = time.monotonic()
    said = go_wrong("say(json.dumps(reply)[:8]); time.sleep(60)")
    assert said == "did not answer within 1 s but for '{\"wall\":'; it said last: and the last line"
    assert time.monotonic() - start < 10


def test_a_process_that_closes_its_pipe_and_goes_on_ends(go_wrong, monkeypatch):
    monkeypatch.setattr(side, "PATIENCE", 1)
    assert go_wrong("os.close(1); time.sleep(60)").startswith("closed its pipe; ")


def test_a_process_that_reads_nothing_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(side, "PATIENCE", 1)
    monkeypatch.setattr(side, "WORKER", tmp_path / "program.py")
    (tmp_path / "program.py").write_text("import time; time.sleep(60)")
    with Worker("head", tmp_path) as worker, pytest.raises(RunFailed, match="head read no request for 1 s"):
        worker.ask(conversations=["x" * 2**20])


def test_what_git_gives_to_a_hook_is_not_handed_on(tmp_path, monkeypatch):
    """A worker may ask git as well: which commit it is, say."""
    monkeypatch.setenv("GIT_DIR", "elsewhere")
    monkeypatch.setattr(side, "WORKER", tmp_path / "program.py")
    (tmp_path / "program.py").write_text("import json, os; print(json.dumps({'git': os.environ.get('GIT_DIR')}))")
    with Worker("head", tmp_path) as worker:
        assert worker.reply() == {"git": None}


def test_what_a_worker_has_started_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(side, "WORKER", tmp_path / "program.py")
    program = "import subprocess, sys, time\nchild = subprocess.Popen(['sleep', '60'])\n"
    (tmp_path / "program.py").write_text(program + "print('{\"child\": %d}' % child.pid, flush=True)\ntime.sleep(60)")
    with Worker("head", tmp_path) as worker:
        child = worker.reply()["child"]
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


def is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("blockinfer/__init__.py", "raise RuntimeError('broken on purpose')", "RuntimeError: broken on purpose"),
        ("blockinfer/__init__.py", "import os; os._exit(7)", "head ended with code 7"),
        ("evals/llada_tiny", None, "FileNotFoundError: this checkout has no evals/llada_tiny"),
        ("blockinfer", None, "ImportError: this checkout has no package blockinfer, and "),
    ],
)
def test_a_side_that_breaks_is_named(clone, temporary, file, text, message):
    if text is None:
        shutil.rmtree(clone / file)
    else:
        (clone / file).write_text(text)
    with Worker("head", clone) as worker, pytest.raises(RunFailed, match=re.escape(message)):
        worker.ask(conversations=[], batch_size=1)
        worker.reply()
    assert list(temporary.iterdir()) == []


def test_the_memory_of_tensors_is_known_to_the_byte():
    conversation = [{"role": "user", "content": "What is 2 + 3?"}]
    request = {"call": "peak", "params": CASE.params, "rows": [0, 1]}
    with Worker("head", ROOT) as worker:
        worker.ask(conversations=[conversation] * 2, batch_size=2)
        assert worker.reply() == {}
        first, held = worker.memory(**request), worker.memory(call="held")
        assert worker.memory(**request) == first > 100_000 and worker.memory(call="held") == held > 13_000_000
        assert worker.memory(**request, more_memory=0.5) == pytest.approx(1.5 * first, rel=1e-3)
        assert worker.memory(call="held", more_memory=0.5) == pytest.approx(1.5 * held, rel=1e-3)
        assert worker.memory(call="held") == held
