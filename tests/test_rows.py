"""Reading rows: both forms, every malformed field named with its line, and prompts that are cut to fit."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from evals.questions.rows import encode, load_rows, rows_hash

GSM = {"id": "a", "source": "gsm8k", "question": "1 + 1?", "answer": "2"}
MATH = GSM | {"id": "m", "source": "math500"}
MMLU = {"id": "b", "source": "mmlu", "question": "Pick.", "answer": "C", "choices": ["w", "x", "y", "z"]}
QA = {
    "id": "c",
    "source": "longbench_hotpotqa",
    "question": "Who?",
    "answer": "Ann",
    "answers": ["Ann", "Anna"],
    "context": "Ann did.",
}


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", "utf-8")
    return path


def test_rows_are_read_as_they_are(tmp_path):
    drawn = GSM | {"id": "d", "revision": "openai/gsm8k@0f"}
    assert load_rows(write(tmp_path / "r", [GSM, "", MMLU, QA, drawn])) == [GSM, MMLU, QA, drawn]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = write(tmp_path / "r", [GSM, MMLU])
    expected = load_rows(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_rows(path) == expected


def test_line_separators_inside_a_string_do_not_end_the_row(tmp_path):
    row = GSM | {"question": "one\u2028two\x85three"}
    assert load_rows(write(tmp_path / "r", [json.dumps(row, ensure_ascii=False), MMLU])) == [row, MMLU]


def test_the_public_form(tmp_path):
    rows = [
        {"source": "gsm8k", "question": "q", "answer": "7", "choices": ""},
        {"source": "mmlu", "question": "q", "answer": "2", "choices": '["a", "b", "c", "d"]'},
        {"source": "longbench_hotpotqa", "question": "q", "answer": "Ann", "choices": ""},
        {"source": "math500", "question": "q", "answer": 5},
    ]
    gsm, mmlu, qa, math = load_rows(write(tmp_path / "r", rows))
    assert [row["id"] for row in (gsm, mmlu, qa, math)] == ["row-1", "row-2", "row-3", "row-4"]
    assert (mmlu["choices"], mmlu["answer"]) == (["a", "b", "c", "d"], "C")
    assert (qa["answers"], qa["context"]) == (["Ann"], "")
    assert math["answer"] == "5"


def test_source_skip_and_number(tmp_path):
    rows = [GSM | {"id": str(i), "source": ("gsm8k", "math500")[i % 2]} for i in range(10)]
    path = write(tmp_path / "r", rows)
    assert [row["id"] for row in load_rows(path, ["math500"], skip=1, number=2)] == ["3", "5"]
    assert [row["id"] for row in load_rows(path, None, skip=8)] == ["8", "9"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "r:2: not valid JSON"),
        (GSM | {"id": "b", "question": "\ud800?"}, "r:2: a string holds a lone surrogate"),
        (GSM | {"id": "b", "question": "\udc00"}, "r:2: a string holds a lone surrogate"),
        ('{"a": ' + "[" * 100_000, "r:2: not valid JSON: recursion limit exceeded"),
        (f'{{"a": {"[" * 900}{"]" * 900}}}', "r:2: not valid JSON: recursion limit exceeded"),
        (MMLU | {"choices": "[" * 900 + "]" * 900}, "field 'choices' is not a JSON list: not valid JSON: rec"),
        (f'{{"id": "b", "answer": 1{"0" * 5000}}}', "r:2: not valid JSON: number out of range"),
        (GSM | {"id": "b", "answer": 10**400}, "r:2: field 'answer' must be a number below 1e300, got 1000"),
        (GSM | {"id": "b", "answer": float("nan")}, "r:2: field 'answer' must be a number below 1e300, got nan"),
        (GSM | {"id": "b", "answer": float("inf")}, "r:2: field 'answer' must be a number below 1e300, got inf"),
        (GSM | {"id": "b", "answer": "three apples"}, "r:2: field 'answer' of a gsm8k row must be a number"),
        ("[1]", "r:2: a JSON object is expected, got list"),
        ({k: v for k, v in GSM.items() if k != "question"}, "r:2: field 'question' must be a string .*got None"),
        (GSM | {"id": "x", "answer": ""}, "r:2: field 'answer' must be a string that is not empty, got ''"),
        (GSM | {"id": "x", "answer": True}, "r:2: field 'answer' must be a string that is not empty, got True"),
        (GSM | {"id": 5}, "r:2: field 'id' must be a string .*got 5"),
        (GSM | {"id": "x", "source": "gsm9k"}, "r:2: field 'source' must be one of gsm8k, .*got 'gsm9k'"),
        (MMLU | {"choices": ["a"]}, "r:2: field 'choices' must be a list of 2 to 26 strings, got .'a'."),
        (MMLU | {"choices": ["a"] * 27}, "r:2: field 'choices' must be a list of 2 to 26 strings"),
        (MMLU | {"choices": ["a", "b"]}, "r:2: field 'answer' must be a letter from A to B, got 'C'"),
        (MMLU | {"choices": ["a"] * 10, "answer": "10"}, "r:2: field 'answer' must be a letter from A to J, got '10'"),
        (MMLU | {"choices": ["a"] * 10, "answer": "AB"}, "r:2: field 'answer' must be a letter from A to J, got 'AB'"),
        (MMLU | {"choices": None}, "r:2: field 'choices' must be a list of 2 to 26 strings, got None"),
        (MMLU | {"choices": "[1"}, "r:2: field 'choices' is not a JSON list"),
        (MMLU | {"answer": "E"}, "r:2: field 'answer' must be a letter from A to D, got 'E'"),
        (MMLU | {"answer": "4"}, "r:2: field 'answer' must be a letter from A to D, got '4'"),
        (QA | {"answers": []}, "r:2: field 'answers' must be a list of strings"),
        (MMLU | {"revision": 3}, "r:2: field 'revision' must be a string, got 3"),
        (QA | {"context": 3}, "r:2: field 'context' must be a string, got int"),
        (GSM, "r:2: the id 'a' is that of line 1 too"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path / "r", [GSM, row]))


def test_nothing_left_and_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="r: the file has no rows"):
        load_rows(write(tmp_path / "r", [""]))
    path = write(tmp_path / "r", [GSM])
    with pytest.raises(ValueError, match=r"of 1 rows none is left \(mmlu, the first 0 left out\)"):
        load_rows(path, ["mmlu"])
    with pytest.raises(ValueError, match="the first 1 left out"):
        load_rows(path, skip=1)
    with pytest.raises(ValueError, match="source must be one of .*got 'mmlu2'"):
        load_rows(path, ["mmlu2"])
    for name, message in [("nothing", "No such file"), ("n" * 256, "File name too long"), ("", "Is a directory")]:
        with pytest.raises(ValueError, match=f"cannot be read: .*{message}"):
            load_rows(tmp_path / name)
    with pytest.raises(ValueError, match="the dataset '/dev/zero' cannot be read: .*it is a device"):
        load_rows("/dev/zero")


def test_a_long_context_loses_its_middle(checkpoint):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    row = QA | {"context": "begin" + "m" * 500 + "close"}
    whole, was_cut = encode(row, tokenizer, 10_000)
    assert not was_cut
    cut, was_cut = encode(row, tokenizer, 300)
    assert was_cut and len(cut) == 300
    text = tokenizer.decode(cut)
    assert "begin" in text and "close" in text and row["question"] in text
    with pytest.raises(ValueError, match="row c: its prompt has .* tokens, more than the 20 that fit"):
        encode(row, tokenizer, 20)
    with pytest.raises(ValueError, match="row a: its prompt has"):
        encode(GSM, tokenizer, 20)


@pytest.mark.parametrize(
    "template, message",
    [("{{ raise_exception('not so') }}", "fails: .*not so"), ("{{ 1 if }}", "fails"), (" ", "makes an empty prompt")],
)
def test_a_chat_template_that_fails_is_told(checkpoint, template, message):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"the chat template of .* {message}"):
        encode(GSM, tokenizer, limit=1000)


def test_the_hash_is_of_every_word_of_the_rows():
    rows = [GSM, QA]
    assert rows_hash(rows) == rows_hash([dict(reversed(row.items())) for row in rows])
    changed = [[QA, GSM], [GSM], [GSM, QA | {"context": QA["context"] + "."}], [GSM | {"id": "z"}, QA]]
    assert rows_hash(rows) not in map(rows_hash, changed)
