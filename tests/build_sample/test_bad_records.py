"""Records and folders that are not what they should be."""

import shutil

import pytest

from evals.questions.build_sample import build
from tests.build_sample.public_sets import (
    FILES,
    NUMBER,
    ORDER,
    gsm8k,
    longbench,
    math500,
    mmlu,
    readme,
    replace,
    without,
    write,
    write_lines,
)


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
