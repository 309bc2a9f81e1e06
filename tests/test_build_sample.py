"""Drawing rows of the public sets: from local folders of the published layouts, with invented contents."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evals.build_sample
from evals.build_sample import SETS, build, main
from evals.graders import grade
from evals.record import environment
from evals.rows import SOURCES, load_rows
from tests.hub import COMMIT, hub

ROOT = Path(__file__).parent.parent
NUMBER = 12
# the prompt that Xnhyacinth/LongBench holds its records in
ORDER = "Answer the question based on the given passages. Only give me the answer and do not output any other words."


def gsm8k(i):
    solution = f"Half of {2 * i} is <<{2 * i}/2={i}>>{i}.\nWith 1,200 more: <<1200+{i}={1200 + i}>>{1200 + i}\n"
    return {"question": f"Ann has {2 * i} pears. How many?", "answer": f"{solution}#### {1200 + i:,}"}


def math500(i):
    record = {"problem": f"Find ${i}/2$.", "solution": f"It is $\\boxed{{\\frac{{{i}}}{{2}}}}$."}
    about = {"subject": "Algebra", "level": 1 + i % 5, "unique_id": f"test/algebra/{100 + i}.json"}
    return record | {"answer": f"\\frac{{{i}}}{{2}}"} | about


def mmlu(i):
    choices = [f"{i + k} legs" for k in range(4)]
    return {"question": f"A bug of sort {i}:", "subject": "zoology", "choices": choices, "answer": i % 4}


def longbench(i, question="question"):
    about = {"length": 10, "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": f"{i:024x}"}
    passages = f"Passage 1:\nBo\nBo {i} is from Rome.\nPassage 2:\nRome\nRome is in Italy {i}."
    return {question: f"Where is Bo {i} from?", "context": passages, "answers": [f"Italy {i}", "Italy"]} | about


def longbench_wrapped(i):
    record = longbench(i)
    context = f"{ORDER}\n\nThe following are given passages.\n{record['context']}\n\n{ORDER}\n\n"
    more = {"answer_prefix": "Answer:", "task": "hotpotqa", "max_new_tokens": 52}
    return record | {"context": context, "question": f"Question: {record['question']}\n"} | more


def readme(*configs):
    """A card as on the Hub: its configs, each with the files of its splits."""
    lines = ["---", "license: mit"] + ["configs:"] * bool(configs)
    for config in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [line for s in ("train", "test") for line in (f"  - split: {s}", f"    path: {config}/{s}-*")]
    return "\n".join([*lines, "---", "", "# A set"])


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_lines(path, records):
    write(path, "".join(json.dumps(record) + "\n" for record in records))


def write_parquet(path, records, features=None):
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(records, features=features).to_parquet(str(path))


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The four sets as they are on the Hub, beside splits and configs that must not be read."""
    import datasets

    folder = tmp_path_factory.mktemp("published")
    split = "{}-00000-of-00001.parquet"
    texts = {"question": datasets.Value("string"), "subject": datasets.Value("string")}
    letters = {"choices": datasets.List(datasets.Value("string")), "answer": datasets.ClassLabel(names=list("ABCD"))}
    for name, config, other, make, features in [
        ("openai/gsm8k", "main", "socratic", gsm8k, None),
        ("cais/mmlu", "all", "zoology", mmlu, datasets.Features(texts | letters)),
        ("Xnhyacinth/LongBench", "hotpotqa", "2wikimqa", longbench_wrapped, None),
    ]:
        write(folder / name / "README.md", readme(other, config))
        for c, s, start in [
            (config, "test", 0),
            (config, "train", 1000),
            (other, "test", 2000),
            (other, "train", 3000),
        ]:
            write_parquet(
                folder / name / c / split.format(s), [make(i) for i in range(start, start + NUMBER)], features
            )
    write(folder / "HuggingFaceH4/MATH-500/README.md", readme())
    write_lines(folder / "HuggingFaceH4/MATH-500/test.jsonl", [math500(i) for i in range(NUMBER)])
    return folder


@pytest.fixture
def bare(tmp_path):
    """JSON lines without a card, LongBench as in THUDM's archive; each test may break its own copy."""
    folder = tmp_path / "bare"
    for name, config, other, make in [
        ("openai/gsm8k", "main", "socratic", gsm8k),
        ("cais/mmlu", "all", "zoology", mmlu),
    ]:
        for c, s, start in [(config, "test", 0), (config, "train", 1000), (other, "test", 2000)]:
            write_lines(folder / name / c / f"{s}.jsonl", [make(i) for i in range(start, start + NUMBER)])
    write_lines(folder / "HuggingFaceH4/MATH-500/test.jsonl", [math500(i) for i in range(NUMBER)])
    write(folder / "THUDM/LongBench/LongBench.py", "raise SystemExit")
    for name, start in [("hotpotqa", 0), ("hotpotqa_e", 1000)]:
        records = [longbench(i, "input") for i in range(start, start + NUMBER)]
        write_lines(folder / f"THUDM/LongBench/data/{name}.jsonl", records)
    return folder


# where a bare copy has each set's test split
FILES = {
    gsm8k: "openai/gsm8k/main/test.jsonl",
    math500: "HuggingFaceH4/MATH-500/test.jsonl",
    mmlu: "cais/mmlu/all/test.jsonl",
    longbench: "THUDM/LongBench/data/hotpotqa.jsonl",
}


@pytest.fixture
def read_only(monkeypatch):
    """Leaves out the sets that a test is not about."""

    def only(make):
        kept = [public for public in SETS if any(FILES[make].startswith(name) for name in public.repositories)]
        assert len(kept) == 1
        monkeypatch.setattr(evals.build_sample, "SETS", kept)

    return only


def replace(bare, make, records):
    """Puts other records into a set's test split, and takes its other splits away: a column has one type in all."""
    for file in (bare / FILES[make]).parent.iterdir():
        file.unlink()
    write_lines(bare / FILES[make], records)


def without(row, field):
    return {key: value for key, value in row.items() if key != field}


def test_published_layouts(published):
    rows = build(NUMBER, 0, published)
    assert len(rows) == 4 * NUMBER
    by_source = {
        source: sorted((r for r in rows if r["source"] == source), key=lambda r: r["id"]) for source in SOURCES
    }
    assert [without(by_source[source][7], "revision") for source in SOURCES] == [
        {
            "id": "gsm8k-test-00007",
            "source": "gsm8k",
            "question": "Ann has 14 pears. How many?",
            "answer": "1207",
        },
        {
            "id": "math500-test/algebra/107.json",
            "source": "math500",
            "question": "Find $7/2$.",
            "answer": "\\frac{7}{2}",
        },
        {
            "id": "mmlu-test-00007",
            "source": "mmlu",
            "question": "A bug of sort 7:",
            "answer": "D",
            "choices": ["7 legs", "8 legs", "9 legs", "10 legs"],
        },
        {
            "id": "longbench_hotpotqa-000000000000000000000007",
            "source": "longbench_hotpotqa",
            "question": "Where is Bo 7 from?",
            "answer": "Italy 7",
            "context": longbench(7)["context"],
            "answers": ["Italy 7", "Italy"],
        },
    ]


def test_bare_layouts_give_the_same_rows(published, bare):
    rows, same = build(5, 3, published), build(5, 3, bare)
    assert [without(row, "revision") for row in rows] == [without(row, "revision") for row in same]
    # of the content, not of the form that it is stored in
    assert [row["revision"] for row in rows[:3]] == [row["revision"] for row in same[:3]]
    assert [row["revision"].partition("@")[0] for row in rows[3:4] + same[3:4]] == [
        "Xnhyacinth/LongBench",
        "THUDM/LongBench",
    ]


def test_the_first_rows_are_balanced(published):
    rows = build(NUMBER, 0, published)
    assert [row["source"] for row in rows] == list(SOURCES) * NUMBER
    assert len({row["id"] for row in rows}) == 4 * NUMBER


def test_the_seed_decides_and_a_smaller_draw_is_the_beginning_of_a_larger_one(published, tmp_path):
    def lines(*options):
        main(["--out", str(tmp_path / "rows"), "--from", str(published), *options])
        return (tmp_path / "rows").read_bytes().splitlines(keepends=True)

    first = lines("--seed=5", "--per-source=6")
    assert first == lines("--seed=5", "--per-source=6")
    assert first[:12] == lines("--seed=5", "--per-source=3")
    other = lines("--seed=6", "--per-source=6")
    assert all(other[k::4] != first[k::4] for k in range(4))
    places = [[json.loads(line)["id"][-5:] for line in first[k::4]] for k in (0, 2)]
    assert places[0] != places[1], "each set has its own draw"


def test_a_seed_draws_the_same_rows_in_every_version(published):
    rows = build(4, 0, published)
    assert [row["id"][-2:] for row in rows[0::4]] == ["10", "07", "03", "05"]
    lines = "".join(json.dumps(gsm8k(i), sort_keys=True) + "\n" for i in range(NUMBER))
    assert rows[0]["revision"] == f"openai/gsm8k@sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def test_the_suite_reads_and_grades_the_rows_and_stores_their_revisions(published, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    main(["--out", str(path), "--from", str(published), "--per-source", "4"])
    rows = load_rows(path)
    assert rows == build(4, 0, published)
    for row in rows:
        assert grade(row, f"The answer is {row['answer']}.").correct, row
        assert not grade(row, "The answer is E.").correct, row
    printed = capsys.readouterr().out
    revisions = sorted({row["revision"] for row in rows})
    assert len(revisions) == 4 and all(revision in printed for revision in revisions)

    def stored(rows):
        about = SimpleNamespace(device="cpu", is_tiny=True, load_format="auto", is_dummy=False, dataset=str(path))
        return environment(SimpleNamespace(**vars(about), rows=rows), torch.float32)["dataset_revisions"]

    assert stored(rows) == revisions
    assert stored(load_rows(path, ["mmlu"])) == [rows[2]["revision"]]
    assert stored([without(row, "revision") for row in rows]) == []


def test_a_revision_is_of_the_rows_of_the_split(bare):
    before = build(1, 0, bare)
    write_lines(bare / "openai/gsm8k/main/train.jsonl", [gsm8k(5)])
    assert build(1, 0, bare) == before
    write_lines(bare / "openai/gsm8k/main/test.jsonl", [gsm8k(i) for i in range(1, NUMBER + 1)])
    changed = [new["revision"] != old["revision"] for new, old in zip(build(1, 0, bare), before, strict=True)]
    assert changed == [True, False, False, False]


def test_a_copy_of_mmlu_with_letters(bare):
    before = build(NUMBER, 0, bare)
    records = [mmlu(i) for i in range(NUMBER)]
    replace(bare, mmlu, [r | {"answer": "ABCD"[r["answer"]]} for r in records])
    assert [row["answer"] for row in build(NUMBER, 0, bare)] == [row["answer"] for row in before]


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("So <<3*4=12>>12.\n#### 12", "12"),
        ("#### 1,234,567", "1234567"),
        ("#### -3", "-3"),
        ("#### 4.50 ", "4.50"),
        ("Row #### 1\n#### 2\n", "2"),
    ],
)
def test_the_answer_of_gsm8k(bare, read_only, solution, answer):
    read_only(gsm8k)
    replace(bare, gsm8k, [{"question": "How many?", "answer": solution}])
    assert build(1, 0, bare)[0]["answer"] == answer


@pytest.mark.parametrize(
    ("make", "field", "value", "message"),
    [
        (gsm8k, "answer", "12", "openai/gsm8k: row 3 .*'answer' must end with '#### ' and a number, got '12'"),
        (gsm8k, "answer", "So\n#### twelve", "row 3 .*'answer' must end with '#### ' and a number"),
        (gsm8k, "answer", "#### 1\n#### ", "row 3 .*'answer' must end with '#### ' and a number"),
        (gsm8k, "answer", None, "row 3 .*'answer' must be a string that is not empty, got None"),
        (gsm8k, "question", " ", "row 3 .*'question' must be a string that is not empty, got ' '"),
        (math500, "problem", "", "HuggingFaceH4/MATH-500: row 3 .*'problem' must be a string that is not empty"),
        (math500, "answer", None, "row 3 .*'answer' must be a string that is not empty, got None"),
        (math500, "unique_id", None, "row 3 .*'unique_id' must be a string that is not empty, got None"),
        (math500, "unique_id", math500(4)["unique_id"], "2 rows drawn have the same field 'unique_id': .*104.json"),
        (mmlu, "choices", ["a", "b"], "cais/mmlu: row 3 .*'choices' must be a list of 4 strings, got .'a', 'b'"),
        (mmlu, "choices", None, "row 3 .*'choices' must be a list of 4 strings, got None"),
        (mmlu, "answer", 4, "row 3 .*'answer' must be a number from 0 to 3 or a letter from A to D, got 4"),
        (mmlu, "answer", -1, "row 3 .*'answer' must be a number from 0 to 3 or .*got -1"),
        (mmlu, "answer", None, "row 3 .*'answer' must be a number from 0 to 3 or .*got None"),
        (longbench, "context", "", "THUDM/LongBench: row 3 .*'context' must be a string that is not empty"),
        (longbench, "context", ORDER + " P", "row 3 .*'context' begins with .* must end with it"),
        (longbench, "answers", [], "row 3 .*'answers' must be a list of strings that are not empty, got \\[\\]"),
        (longbench, "answers", ["Italy", ""], "row 3 .*'answers' must be a list of strings that are not empty"),
        (longbench, "answers", None, "row 3 .*'answers' must be a list of strings that are not empty, got None"),
        (longbench, "_id", " ", "row 3 .*'_id' must be a string that is not empty"),
        (longbench, "input", None, "row 3 .*'question' must be a string that is not empty, got None"),
    ],
)
def test_a_malformed_record_is_named(bare, read_only, make, field, value, message):
    read_only(make)
    records = [longbench(i, "input") if make is longbench else make(i) for i in range(NUMBER)]
    records[3][field] = value
    replace(bare, make, records)
    with pytest.raises(ValueError, match=message):
        build(NUMBER, 0, bare)


@pytest.mark.parametrize(
    ("make", "column"),
    [(gsm8k, "answer"), (math500, "unique_id"), (mmlu, "choices"), (longbench, "context"), (longbench, "question")],
)
def test_a_missing_column_is_named(bare, read_only, make, column):
    read_only(make)
    replace(bare, make, [without(make(i), column) for i in range(NUMBER)])
    with pytest.raises(ValueError, match=f"/.*: there is no column '{column}' among [a-z]"):
        build(1, 0, bare)


def test_too_few_rows(published):
    with pytest.raises(ValueError, match="openai/gsm8k: 13 rows were asked for, its test split has 12"):
        build(NUMBER + 1, 0, published)


def test_a_local_set_that_cannot_be_read(published, bare):
    def message():
        with pytest.raises(ValueError) as error:
            build(1, 0, bare)
        return str(error.value)

    longbench_folder = bare / "THUDM/LongBench"
    shutil.rmtree(longbench_folder / "data")
    assert "Dataset scripts are no longer supported" in message() and str(longbench_folder) in message()
    shutil.rmtree(longbench_folder)
    assert "there is no folder" in message()
    assert all(str(bare / name) in message() for name in ("Xnhyacinth/LongBench", "THUDM/LongBench"))
    write_lines(bare / FILES[mmlu], [mmlu(0) | {"other": 1}])
    assert message().startswith("cais/mmlu: ") and "\n" not in message()
    write(bare / FILES[mmlu], "{\n")
    assert (
        message().startswith("cais/mmlu: the split test of config all could not be read from") and "JSON" in message()
    )
    (bare / FILES[math500]).rename((bare / FILES[math500]).with_name("train.jsonl"))
    assert "MATH-500: the split test could not be read from" in message() and 'Unknown split "test"' in message()
    shutil.copytree(published / "openai/gsm8k", bare / "openai/gsm8k", dirs_exist_ok=True)
    write(bare / "openai/gsm8k/README.md", readme("socratic"))
    assert "BuilderConfig 'main' not found" in message()


def run(*options, cwd, **environment):
    command = [sys.executable, "-m", "evals.build_sample", *options]
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
    assert done.returncode == 1 and not out.exists() and len(done.stderr.splitlines()) == 1
    assert "openai/gsm8k: the split test of config main could not be loaded from the Hugging Face Hub" in done.stderr
    assert done.stderr.endswith("With a copy of the set in DIR/openai/gsm8k, pass --from DIR\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{0}/no/rows.jsonl"], "--out must be a file in a folder that exists, got .*/no/rows.jsonl"),
        (["--out", "{0}"], "--out must be a file in a folder that exists"),
        (["--out", "{0}/rows", "--per-source", "0"], "--per-source must be at least 1, got 0"),
        (["--out", "{0}/rows", "--from", "{0}/no"], "--from must be a folder, got .*/no'"),
        (["--out", "{0}/rows", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        ([], "the following arguments are required: --out"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evals.build_sample, "build", lambda *_: pytest.fail("the sets were read"))
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
    script = "import sys; sys.modules['datasets'] = None; import evals.conftest; from evals.build_sample import main; "
    script += f"main(['--out', {str(tmp_path / 'rows')!r}, '--from', {str(published)!r}])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "drawing rows needs datasets: pip install 'blockinfer[test]'" in done.stderr
