"""Drawing rows of the public sets: from local folders of the published layouts, with invented contents."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch

from evals.questions.build_sample import build, main
from evals.questions.graders import GRADER_VERSIONS, grade
from evals.questions.prompts import PROMPTS_VERSION
from evals.questions.rows import SOURCES, load_rows
from evals.results.record import environment
from tests.build_sample.public_sets import NUMBER, gsm8k, longbench, mmlu, replace, without, write_lines


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
        about.tensor_parallel_size = 1
        about.rows, about.grader_versions, about.prompts_version = rows, GRADER_VERSIONS, PROMPTS_VERSION
        return environment(about, torch.float32)["dataset_revisions"]

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
