"""Rows, prompts and graders of one's own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from evals.questions.graders import grade, own
from evals.questions.prompts import INSTRUCTIONS, messages
from evals.questions.rows import encode, load_rows
from evals.questions.template import PromptTemplate
from evals.results.compare import differences, main
from evals.results.likelihood import letters
from evals.results.record import question
from evals.runs.settings import TINY_MODEL, read_settings
from tests.options import Options
from tests.test_rows import GSM, MATH, MMLU, QA, write

HERE = Path(__file__).parent
EXAMPLE = ("my_rows.jsonl", "my_prompt.jinja", "my_graders.py")
TEN = {"choices": [f"thing {i}" for i in range(10)]}
PRO = MMLU | TEN | {"id": "p", "source": "pro", "grader": "choice", "answer": "I"}
OWN = GSM | {"id": "o", "source": "mine"}


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The example's files in the working directory."""
    for name in EXAMPLE:
        shutil.copy(HERE / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    own.load.cache_clear()
    yield tmp_path
    own.load.cache_clear()
    sys.modules.pop("my_graders", None)


@pytest.fixture(scope="module")
def renderer():
    """One process for all templates."""
    renderer = PromptTemplate(HERE / "my_prompt.jinja")
    renderer.cpu_seconds = 1
    yield renderer
    renderer.close()


@pytest.fixture
def template(renderer, tmp_path, monkeypatch):
    """template(text) -> what --prompt makes of a file of it, called q.jinja."""

    def template(text):
        path = tmp_path / "q.jinja"
        path.write_text(text, encoding="utf-8")
        for name in ("path", "_text"):
            monkeypatch.setattr(renderer, name, getattr(PromptTemplate(path), name))
        return renderer

    return template


def test_the_example_runs(example):
    command = [sys.executable, "-m", "pytest", str(HERE.parents[1] / "evals"), "-p", "no:cacheprovider"]
    command += ["--dataset=my_rows.jsonl", "--prompt=my_prompt.jinja", "--mode=block", "--max-tokens=32"]
    command += ["--device=cpu", "--benchmark-json=out.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((example / "out.json").read_text())
    (benchmark,) = content["benchmarks"]
    info = benchmark["extra_info"]
    assert set(info["accuracy_by_source"]) == set(info["n_by_source"]) == {"pro", "sums", "haiku"}
    assert info["longbench_f1_by_source"] == {}
    assert info["prompts_version"] == PromptTemplate("my_prompt.jinja").version
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_MODEL)
    ask = PromptTemplate("my_prompt.jinja").messages
    asked = [encode(row, tokenizer, 1000, ask)[0] for row in load_rows("my_rows.jsonl")]
    assert info["mean_prompt_tokens"] == pytest.approx(sum(map(len, asked)) / 3)
    assert info["grader_versions"]["my_graders:lines"] == own.version("my_graders:lines")
    assert main(["out.json", "out.json"]) == 0
    info["prompts_version"] = 1
    Path("other.json").write_text(json.dumps(content))
    assert main(["other.json", "out.json"]) == 2


def test_the_example_s_prompts_and_grades(example):
    pro, sums, haiku = load_rows("my_rows.jsonl")
    ask = PromptTemplate("my_prompt.jinja").messages
    (message,) = ask(pro)
    lines = message["content"].split("\n")
    assert message["role"] == "user" and lines[0] == pro["question"] and len(lines) == 12
    assert lines[1] == "A) cow" and lines[10] == "J) seven" and lines[11].startswith("Think")
    assert ask(haiku)[0]["content"] == "Write a haiku about rain.\nState your answer: The answer is ..."
    answers = [(pro, "It is I.", "I think it is B."), (sums, "It is 42.", "43"), (haiku, "a\nb\nc", "a\nb")]
    for row, right, wrong in answers:
        assert grade(row, right).correct and not grade(row, wrong).correct, row


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (GSM | {"choices": ["x", "y"], "context": "c"}, [GSM["question"], INSTRUCTIONS["gsm8k"]]),
        (MATH, [MATH["question"], "Solve the problem step by step. Put the final answer in \\boxed{}."]),
        (MMLU, ["Pick.", "A. w\nB. x\nC. y\nD. z", INSTRUCTIONS["mmlu"]]),
        (QA, ["Ann did.", "Who?", INSTRUCTIONS["longbench_hotpotqa"]]),
        (MMLU | {"choices": ["w", "x"]}, ["Pick.", "A. w\nB. x", INSTRUCTIONS["mmlu"]]),
        (
            PRO,
            ["Pick.", "\n".join(f"{c}. thing {i}" for i, c in enumerate("ABCDEFGHIJ")), INSTRUCTIONS["mmlu"]],
        ),
        (OWN | {"grader": "number", "context": "c"}, ["c", "1 + 1?", INSTRUCTIONS["gsm8k"]]),
        (OWN | {"grader": "a.b:c", "choices": ["x", "y"]}, ["1 + 1?", "A. x\nB. y"]),
        (OWN | {"grader": "squad"}, ["1 + 1?", "Name the facts used, then end with: The answer is X."]),
    ],
)
def test_the_prompts_without_a_template(row, parts):
    assert messages(row) == [{"role": "user", "content": "\n\n".join(parts)}]


def test_own_rows_are_read(tmp_path):
    rows = [OWN | {"grader": "math"}, PRO, GSM | {"grader": "number"}, OWN | {"id": "q", "grader": "squad"}]
    rows += [OWN | {"id": f"f{i}", "grader": name} for i, name in enumerate(("a:b", "a.b", "a.b_2.c:d"))]
    path = write(tmp_path / "r", rows)
    read = load_rows(path)
    assert read == rows[:3] + [rows[3] | {"answers": ["2"], "context": ""}] + rows[4:]
    assert [row["id"] for row in load_rows(path, ["pro"])] == ["p"]
    with pytest.raises(ValueError, match="source must be one of gsm8k, .*, mine, pro, got 'prp'"):
        load_rows(path, ["prp"])
    assert load_rows(write(tmp_path / "r", [PRO | {"answer": 8}])) == [PRO]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (OWN, "r:1: field 'source' must be one of gsm8k, .*, or the row name its grader in .*, got 'mine'"),
        (
            OWN | {"grader": "numbr"},
            "r:1: field 'grader' must be one of number, .*package.module:function, got 'numbr'",
        ),
        (OWN | {"grader": "a:b:c"}, "r:1: field 'grader' must be one of .*, got 'a:b:c'"),
        (OWN | {"grader": ["number"]}, r"r:1: field 'grader' must be one of .*, got \['number'\]"),
        (GSM | {"grader": "math"}, "r:1: field 'grader' of a gsm8k row must be left out or 'number', got 'math'"),
        (OWN | {"grader": "number", "source": "all"}, "r:1: field 'source' must be at most 60 .* not 'all'.*got 'all'"),
        (OWN | {"grader": "number", "source": "a,b"}, "r:1: field 'source' must be at most 60 letters, .*got 'a,b'"),
        (OWN | {"grader": "number", "source": "x" * 61}, "r:1: field 'source' must be at most 60 letters"),
        (OWN | {"grader": "number", "answer": "two"}, "r:1: field 'answer' of a mine row must be a number, got 'two'"),
        (OWN | {"grader": "choice"}, "r:1: field 'choices' must be a list of 2 to 26 strings, got None"),
        (OWN | {"grader": "a:b", "choices": [1, 2]}, "r:1: field 'choices' must be a list of 2 to 26 strings"),
        (OWN | {"grader": "math", "context": 3}, "r:1: field 'context' must be a string, got int"),
        (PRO | {"answer": "K"}, "r:1: field 'answer' must be a letter from A to J, got 'K'"),
    ],
)
def test_a_malformed_row_of_one_s_own_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path / "r", [row]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ question }}\n{% for", "q.jinja:2: row p: TemplateSyntaxError: "),
        ("{{ question }}\n\n{{ quesiton }}", "q.jinja:3: row p: UndefinedError: 'quesiton' is undefined"),
        ("{% if 1 %}\n{{ 1 / 0 }}{% endif %}", "q.jinja:2: row p: ZeroDivisionError: "),
        ("{{ answer }}", "q.jinja:1: row p: UndefinedError: 'answer' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "q.jinja:1: row p: SecurityError: "),
        ("{{ choices.clear() }}", "q.jinja:1: row p: SecurityError: "),
        ("{% include '/etc/passwd' %}", "q.jinja:1: row p: TypeError: no loader"),
        ("{{ 'x' * 10 ** 11 }}", "q.jinja.*: row p: it needs more than 512 MiB of memory"),
        ("{% set x = 7 ** (7 ** 9) %}{{ x }}", "q.jinja: row p: it took more than 1 s of CPU time"),
        ("", "q.jinja: row p: it makes an empty prompt of it"),
        ("{% if 0 %}{{ question }}{% endif %} \n", "q.jinja: row p: it makes an empty prompt of it"),
    ],
)
def test_a_template_that_fails_is_named_with_its_line(template, text, message):
    ours = template(text)
    with pytest.raises(ValueError, match=rf"--prompt .*{message}") as error:
        ours.messages(PRO | {"answers": ["I"]})
    assert "\n" not in str(error.value)


def test_a_template_sees_the_fields_that_a_row_lacks(template):
    ours = template("\ufeff{{ context }}{{ choices | length }}{{ letters }} {{ source }}, {{ year }}: {{ question }}\n")
    assert ours.messages(GSM | {"year": 1999})[0]["content"] == "0 gsm8k, 1999: 1 + 1?"


def test_a_template_s_context_is_cut_too(template, checkpoint):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    ours = template("Read: {{ context }} Then say: {{ question }}")
    cut, was_cut = encode(QA | {"context": "begin" + "m" * 500 + "close"}, tokenizer, 300, ours.messages)
    text = tokenizer.decode(cut)
    assert was_cut and len(cut) == 300 and "Read: begin" in text and "close Then say: Who?" in text


def _settings(tmp_path, rows, **changed):
    return read_settings(Options(**{"dataset": str(write(tmp_path / "r", rows)), "device": "cpu"} | changed))


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        ("no_such_module:f", "the grader 'no_such_module:f' cannot be imported: ModuleNotFoundError: No module named"),
        ("my_graders.nothing", "the grader 'my_graders.nothing' cannot be found: my_graders has no function 'nothing'"),
        ("my_graders:__name__", "my_graders has no function '__name__'"),
        ("bad_graders:f", "the grader 'bad_graders:f' cannot be imported: ZeroDivisionError: division by zero"),
        ("leaving_graders:f", "the grader 'leaving_graders:f' cannot be imported: SystemExit: 3"),
        ("json:loads", "the grader 'json:loads' must be a function of .row, text.: TypeError: too many positional"),
    ],
)
def test_a_grader_that_is_not_there_is_a_usage_error(example, grader, message):
    (example / "bad_graders.py").write_text("1 / 0\n")
    (example / "leaving_graders.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(pytest.UsageError, match=message):
        _settings(example, [OWN | {"grader": grader}])
    # with random weights nothing is judged
    assert _settings(example, [OWN | {"grader": grader}], load_format="dummy", model="llada-8b")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("nothing.jinja", "--prompt 'nothing.jinja' cannot be read: No such file"),
        (".", "--prompt '.' cannot be read: Is a directory"),
        ("/dev/zero", "--prompt '/dev/zero' cannot be read: it is a device"),
        ("q.jinja", "--prompt q.jinja:1: row o: UndefinedError: 'quesiton' is undefined"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_a_usage_error(example, prompt, message):
    (example / "q.jinja").write_text("{{ quesiton }}")
    with pytest.raises(pytest.UsageError, match=message):
        _settings(example, [OWN | {"grader": "math"}], prompt=prompt)


def test_the_prompt_is_not_written_over(example):
    with pytest.raises(pytest.UsageError, match="--output: 'my_prompt.jinja' cannot be written: it is read too"):
        _settings(example, [GSM], prompt="my_prompt.jinja", output="my_prompt.jinja")


def test_a_result_holds_whose_prompts_and_graders_it_is_of(example):
    rows = [OWN | {"grader": "my_graders:lines"}, *(OWN | {"id": str(i), "grader": "math"} for i in range(3))]
    settings = _settings(example, rows, prompt="my_prompt.jinja", shard=(2, 2))
    # the same in every shard
    assert "my_graders:lines" in settings.grader_versions and settings.prompts_version.startswith("sha256:")
    asked = [{"prompts_version": s.prompts_version} for s in (settings, _settings(example, rows))]
    assert differences(asked[1], asked[0]) == [f"prompts_version was 1, is {settings.prompts_version}"]
    assert "prompts_version" in question(settings.cases[0], settings, 0, asked[0])
    before = own.version("my_graders:lines")
    (example / "my_graders.py").write_text("def lines(row, text):\n    return True\n")
    assert own.version("my_graders:lines") != before


def _judged(monkeypatch, function, row=OWN):
    monkeypatch.setattr(own, "load", lambda name: function)
    return grade(row | {"grader": "a:b"}, "text")


@pytest.mark.parametrize(
    ("returned", "correct", "score"),
    [(True, True, 1.0), (False, False, 0.0), (0.5, False, 0.5), (1, True, 1.0), (0, False, 0.0)],
)
def test_what_a_function_returns(monkeypatch, returned, correct, score):
    assert _judged(monkeypatch, lambda row, text: returned)[:3] == (correct, score, None)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        *((lambda *_, bad=bad: bad, f"must .* a number from 0 to 1, got {bad!r}") for bad in (None, "yes", 2, -1)),
        (lambda row, text: float("nan"), "must return True, False or a number from 0 to 1, got nan"),
        (lambda row, text: row["missing"], "failed: KeyError: 'missing'"),
        (lambda row, text: sys.exit(3), "failed: SystemExit: 3"),
        (lambda row, text: [None for _ in iter(int, 1)], "took more than 0.2 s"),
    ],
)
def test_a_function_that_fails_is_named_with_its_row(monkeypatch, function, message):
    monkeypatch.setattr(own, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=f"row o: the grader 'a:b' {message}"):
        _judged(monkeypatch, function)


def test_a_function_cannot_change_its_row(monkeypatch):
    row = OWN | {"more": [1]}
    assert _judged(monkeypatch, lambda row, text: row.pop("id") and not row["more"].clear(), row).correct
    assert row == OWN | {"more": [1]}


def test_a_letter_of_ten_by_likelihood(chat_llm):
    ask = lambda row: [{"role": "user", "content": "Which?"}]  # noqa: E731
    ten, four, other = letters(chat_llm, [PRO, MMLU, MMLU | {"question": "Other?"}], ask)
    assert len(ten.logprobs) == 10 and len(four.logprobs) == 4
    assert four.logprobs == other.logprobs == pytest.approx(ten.logprobs[:4])
