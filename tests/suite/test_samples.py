"""--samples: a line for each answer, as it comes and with its grade, and what is no file for them."""

import json
import os
from collections import Counter
from types import SimpleNamespace

import pytest

from evals.files.outputs import samples_path
from evals.results.reader import BadFile
from evals.results.samples import Samples, of_run, read_samples
from evals.results.schema import Configuration
from evals.results.table import unextracted_lines
from evals.runs import resume
from tests.options import Options


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_answer_stands_in_the_file_with_what_it_was_an_answer_to(make_suite, tmp_path, chat_llm):
    path = tmp_path / "answers.jsonl"
    suite = make_suite(samples=str(path))
    runs = [suite.measure(case, None) for case in suite.settings.cases]
    rows = suite.settings.rows
    found = lines(path)
    assert [(one["mode"], one["id"]) for one in found] == [
        (c.mode, r["id"]) for c in suite.settings.cases for r in rows
    ]
    for number, one in enumerate(found):
        run, i = runs[number // len(rows)], number % len(rows)
        output, grade = run.outputs[i], run.grades[i]
        assert rows[i]["question"] in one["prompt"] and one["source"] == rows[i]["source"]
        assert chat_llm.tokenizer.encode(one["prompt"], add_special_tokens=False) == output.prompt_token_ids
        assert (one["text"], one["finish_reason"]) == (output.outputs[0].text, output.outputs[0].finish_reason)
        assert (one["extracted"], one["correct"], one["score"]) == (grade.extracted, grade.correct, grade.score)
        assert one["gold"] == rows[i].get("answers", rows[i]["answer"])
        assert (one["tokens"], one["forwards"]) == (len(output.outputs[0].token_ids), output.metrics.nfe)
        assert (one["block_length"], one["unmasking"]) == (8, "low_confidence")
    assert len({one["text"] for one in found}) > 3, "answers that are all alike show nothing"

    # what the report makes of it
    known = [Configuration(asked_block_length=8, **suite.extra_info(run)) for run in runs]
    assert [list(answers) for answers in of_run(read_samples(path), known)] == [[r["id"] for r in rows]] * 2
    other = known[1].model_copy(update={"rows": tuple((i, t, n + 1, c) for i, t, n, c in known[1].rows)})
    with pytest.raises(ValueError, match="of another run: block answered the row 'a' otherwise"):
        of_run(read_samples(path), [known[0], other])
    with pytest.raises(ValueError, match="none of them is a graded answer of"):
        of_run(read_samples(path), [known[0].model_copy(update={"asked_block_length": 4})])
    with pytest.raises(ValueError, match="none of them is a graded answer of"):
        of_run(read_samples(path), [known[0].model_copy(update={"block_add_threshold": 0.5})])
    # as an earlier version wrote them
    path.write_text("".join(json.dumps({k: v for k, v in o.items() if k != "variant"}) + "\n" for o in found))
    assert [len(answers) for answers in of_run(read_samples(path), known)] == [len(rows)] * 2


def test_an_answer_is_there_as_soon_as_it_is_finished(make_suite, tmp_path, monkeypatch):
    """Without a grade, beside the graded ones of what is through; what is resumed is there at once."""
    path, kept = tmp_path / "answers.jsonl", tmp_path / "kept.jsonl"
    path.write_text('{"id": "of an earlier run", "text": "", "gold": "", "forwards": 1}\n')
    suite = make_suite(samples=str(path), resume=str(kept))
    vanilla, block = suite.settings.cases
    assert len(lines(path)) == 1, "nothing is lost before there is something else"
    suite.measure(vanilla, None)
    add, seen = Samples.add, []

    def watch(self, *about):
        add(self, *about)
        seen.append([(one["mode"], one["id"], one["correct"] is None) for one in lines(path)])
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Samples, "add", watch)
    with pytest.raises(KeyboardInterrupt):
        suite.measure(block, None)
    graded = [("vanilla", row["id"], False) for row in suite.settings.rows]
    for number, there in enumerate(seen, 1):
        assert there[:7] == graded and [(m, g) for m, _, g in there[7:]] == [("block", True)] * number
    assert [json.loads(line)["id"] for line in kept.read_bytes().splitlines()][7:] == [i for _, i, _ in seen[-1][7:]]
    monkeypatch.undo()

    again = make_suite(samples=str(path), resume=str(kept))
    monkeypatch.setattr(Samples, "add", watch)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        again.measure(block, None)
    assert len(seen[-1]) == 3 and [i for _, i, _ in seen[-1]] == ["a", "b", "c"], "found, not generated"
    monkeypatch.undo()
    again.measure(block, None)
    again.measure(vanilla, None)
    assert Counter((one["mode"], one["correct"] is None) for one in lines(path)) == {
        ("block", False): 7,
        ("vanilla", False): 7,
    }


def test_a_resume_file_without_ids_is_read(make_suite, tmp_path):
    kept = tmp_path / "kept.jsonl"
    suite = make_suite(resume=str(kept), mode=["block"])
    suite.measure(suite.settings.cases[0], None)
    older = []
    for line in lines(kept):
        del line["id"], line["sha256"]
        older.append(json.dumps(line | {"sha256": resume._hash(line)}) + "\n")
    kept.write_text("".join(older))
    assert "7 of 7 generations found" in (line := make_suite(resume=str(kept), mode=["block"]).resume_line())
    assert "damaged" not in line


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({}, "samples.jsonl"),
        ({"output": "a/results.json"}, "a/samples.jsonl"),
        ({"output": os.devnull}, None),
        ({"benchmark_json": "b/out.json", "output": "a/results.json"}, "b/samples.jsonl"),
        ({"benchmark_json": "b/out.json", "output": os.devnull}, "b/samples.jsonl"),
        ({"benchmark_json": "b/out.json", "shard": (2, 4)}, "b/samples-2-4.jsonl"),
        ({"benchmark_json": "b/out.json", "samples": "c.jsonl", "shard": (2, 4)}, "c.jsonl"),
        ({"benchmark_json": "b/out.json", "samples": os.devnull}, None),
        ({"output": os.devnull, "samples": "c.jsonl"}, "c.jsonl"),
    ],
)
def test_where_the_answers_are_written(given, path):
    assert samples_path(Options(**given).getoption) == path


@pytest.mark.parametrize(
    "content", ["notes\n", '{"question": "a row of a dataset"}\n', '[{"id": 1}]', '{"id": "a", "source": "mmlu"}\n']
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "samples.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="--samples .*samples.jsonl: it holds something else than answers"):
        Samples(path)
    assert path.read_text() == content


def test_what_can_no_longer_be_written_is_counted_and_the_rest_is_there(make_suite, tmp_path):
    path = tmp_path / "answers.jsonl"
    suite = make_suite(samples=str(path))
    vanilla, block = suite.settings.cases
    path.rename(tmp_path / "elsewhere")
    suite.measure(vanilla, None)
    said = f"--samples {path}: 7 answers could not be written: No such file or directory"
    assert suite.samples.told_lost() == said
    path.touch()
    suite.measure(block, None)
    said = f"--samples {path}: 14 answers could not be written: it was removed while the run wrote to it"
    assert suite.samples.told_lost() == said and not path.read_bytes()


def test_a_full_disk_costs_the_answers_that_it_has_no_room_for(make_suite, tmp_path):
    path = tmp_path / "answers.jsonl"
    suite = make_suite(samples=str(path))
    vanilla, block = suite.settings.cases
    file = suite.samples._file
    with open("/dev/full", "ab", buffering=0) as full:
        suite.samples._file = SimpleNamespace(write=full.write, truncate=file.truncate, fileno=file.fileno)
        suite.measure(vanilla, None)
    assert suite.samples.told_lost().endswith(": 7 answers could not be written: No space left on device")
    suite.samples._file = file
    suite.measure(block, None)
    assert [one["mode"] for one in lines(path)] == ["block"] * 7 and suite.samples.lost == 7


def test_two_runs_cannot_write_to_one_file(tmp_path):
    path = tmp_path / "samples.jsonl"
    with (
        Samples(path),
        pytest.raises(ValueError, match="--samples .*samples.jsonl: another run is writing to it; wait"),
    ):
        Samples(path)
    with Samples(path):
        pass


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 2 is no answer of the suite: id: Field required"),
        ("{", "line 2 is no answer of the suite: EOF"),
        ("\xff", "line 2 is no answer of the suite"),
    ],
)
def test_a_damaged_line_is_named(make_suite, tmp_path, line, message):
    path = tmp_path / "answers.jsonl"
    suite = make_suite(samples=str(path), mode=["block"])
    suite.measure(suite.settings.cases[0], None)
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line.encode("latin-1") + b"\n" + b"".join(others))
    with pytest.raises(BadFile, match=message):
        read_samples(path)
    path.write_bytes(first + others[0][:-9])
    assert len(read_samples(path)) == 1, "a kill may cut the last line short"


@pytest.mark.parametrize(("number", "is_told"), [(1, False), (2, True)])
def test_many_answers_with_nothing_to_judge_are_told(make_suite, number, is_told):
    """More than a tenth: 2 of 11."""
    suite = make_suite(mode=["block"])
    run = suite.measure(suite.settings.cases[0], None)
    row, output, grade = suite.settings.rows[0], run.outputs[0], run.grades[0]
    suite.settings.rows[:], run.outputs[:] = [row] * 11, [output] * 11
    run.grades[:] = [grade._replace(extracted=None if i < number else "5") for i in range(11)]
    told = f"block 8 low_confidence: in {number} of 11 answers to gsm8k the grader found nothing to judge"
    assert unextracted_lines([run], suite.settings) == [told] * is_told
    info = suite.extra_info(run)
    assert info["unextracted_by_source"] == {"gsm8k": number}
    assert Configuration(**info).often_unextracted() == [("gsm8k", number, 11)] * is_told
