"""The small model's checkpoint: its tokenizer, its format, what it answers, and the study of it."""

import dataclasses
import json
import random
import sys
from contextlib import nullcontext
from xml.etree import ElementTree

import pytest
from safetensors import safe_open

from blockinfer import LLM, SamplingParams
from evals.llada_tiny import measured, quantized, study
from evals.llada_tiny.problems import SOURCES, problem
from evals.llada_tiny.study import Result, markdown, summary, svg
from evals.llada_tiny.tokenizer import MASK, chat_text
from evals.questions.graders import grade
from evals.questions.prompts import messages
from evals.runs.settings import TINY_MODEL


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ["A plain line.", "x = 3^2, 10% of 50", "Zürich, naïve, 東京, 🙂", "tabs\tand\n\nlines  ", "<b>&amp;"]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *ids]
    assert [len(tokenizer(str(n), add_special_tokens=False).input_ids) for n in (7, 42, 1999)] == [1, 2, 4]


def test_training_and_evaluation_see_the_same_prompt(tokenizer):
    rng = random.Random(3)
    for source in SOURCES:
        row = problem(source, rng, "train")
        assert chat_text(row) == tokenizer.apply_chat_template(
            messages(row), tokenize=False, add_generation_prompt=True
        )


def test_the_checkpoint_is_in_the_published_format(tokenizer):
    config = json.loads((TINY_MODEL / "config.json").read_text())
    assert config["architectures"] == ["LLaDAModelLM"]
    assert config["vocab_size"] == len(tokenizer)
    for name, token in [("bos", "<|startoftext|>"), ("eos", "<|endoftext|>"), ("mask", MASK)]:
        assert config[f"{name}_token_id"] == tokenizer.convert_tokens_to_ids(token)
    with safe_open(TINY_MODEL / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "model.transformer.wte.weight" in names and "model.transformer.blocks.0.q_proj.weight" in names
    assert len(names) == 2 + 9 * config["n_layers"]
    assert sum(path.stat().st_size for path in TINY_MODEL.rglob("*") if path.is_file() and path.suffix != ".pyc") < 16e6


def test_the_model_solves_what_it_was_trained_for():
    """Problems of the validation split, which is neither the sample nor the training data."""
    rng = random.Random(4)
    rows = [problem(source, rng, "validation") for source in SOURCES for _ in range(4)]
    with LLM(str(TINY_MODEL)) as llm:
        params = SamplingParams(max_tokens=96, unmasking="threshold")
        outputs = llm.chat([messages(row) for row in rows], params, use_tqdm=False)
    right = sum(grade({"id": "x", **row}, out.outputs[0].text).correct for row, out in zip(rows, outputs, strict=True))
    assert right >= 13, [out.outputs[0].text for out in outputs]


def test_the_study_s_table_and_drawing():
    half, quarter = [True, True, False, False], [False, False, False, True]
    results = [
        Result("vanilla", "threshold 0.9", dict.fromkeys(SOURCES, half), 4.0, 5.0, 80),
        Result("block", "threshold 0.9", dict.fromkeys(SOURCES, quarter), 8.0, 9.0, 40),
    ]
    row = "| `block` | threshold 0.9 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | 8.00 | 9.00 | 25.0 (8, 4) |  |"
    assert row in markdown(results, 4)
    assert summary(results).splitlines()[0] == "| rule | `vanilla` | `block` |"
    assert summary(results).splitlines()[2:] == ["| threshold 0.9 | 50.0, 4.00 | 25.0, 8.00 |"]
    marks = ElementTree.fromstring(svg(results)).findall(".//{*}circle[{*}title]")
    (x, y), (faster, lower) = ((float(m.get("cx")), float(m.get("cy"))) for m in marks)
    assert faster > x and lower > y


def test_what_fp8_loses_is_measured_on_the_same_problems(tmp_path, capsys):
    out = tmp_path / "loss.json"
    quantized.main([str(TINY_MODEL), "--rows", "1", "--mode", "block", "--out", str(out)])
    lines, pairs = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert [line.split(" | ")[1] for line in lines[2:]] == ["low_confidence 32 steps", "threshold 0.9"]
    for pair in pairs:
        assert pair["n"] == 4 == sum(map(len, pair["plain"]["right"].values()))
        wrong = [dict.fromkeys(SOURCES, [True]), dict.fromkeys(SOURCES, [False])]
        before, after = (dataclasses.replace(Result(**pair["plain"]), right=right) for right in wrong)
        row = quantized.table_row(before, after)
        assert "| 100.0 | 0.0 | 100.0 (" in row and "| 4, 0 |" in row


def test_fp8_is_what_is_measured(monkeypatch):
    loaded = []
    monkeypatch.setattr(measured, "LLM", lambda *a, **o: loaded.append(o.get("quantization")) or nullcontext())
    monkeypatch.setattr(
        quantized, "measure", lambda llm, rows, mode, *_: Result(mode, "", {"mmlu": [True]}, 1.0, 1.0, 1)
    )
    quantized.main([str(TINY_MODEL), "--rows", "1"])
    assert loaded == [None, "fp8"]


def test_the_labels_of_two_rules_at_one_place_are_apart():
    right = dict.fromkeys(SOURCES, [True, False])
    results = [Result("block", rule, right, 17.0, 17.0, 9) for rule in ("factor 1", "threshold 0.95")]
    lines = {t.text: float(t.get("y")) for t in ElementTree.fromstring(svg(results)).iterfind(".//{*}text")}
    assert abs(lines["factor 1"] - lines["threshold 0.95"]) >= 12


LENGTH = ["--block-length", "16"]


def test_a_study_in_parts_is_that_of_the_whole(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "RULES", study.RULES[3:5])

    def run(out, *options):
        command = ["study", str(TINY_MODEL), "--rows", "2", "--out", str(tmp_path / out), *options]
        monkeypatch.setattr(sys, "argv", command)
        study.main()
        return (tmp_path / out / "study.md").read_text()

    whole = run("whole", "--mode", "vanilla,block", *LENGTH)
    run("one", "--mode", "vanilla", *LENGTH)
    one = tmp_path / "one" / "study.json"
    assert run("both", "--mode", "block", *LENGTH, "--add", str(one)) == whole
    kept = json.loads(one.read_text())
    (tmp_path / "cut.json").write_text(json.dumps(kept | {"results": kept["results"][:1]}))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "other.json").write_text(json.dumps(kept | {"results": [kept["results"][0] | {"right": 3}]}))
    for options, message in (
        (["--rows", "1", "--add", str(one)], "is of another rows and other block length than this study"),
        (["--several-blocks", "--add", str(one)], "is of another rules than this study"),
        (["--add", str(tmp_path / "one" / "study.md")], "study.md is not the study.json of a study"),
        ([*LENGTH, "--mode", "block", "--add", str(tmp_path / "cut.json")], "cut.json is of a study that was cut off"),
        ([*LENGTH, "--mode", "block,vanilla", "--add", str(one)], "vanilla at 16 would be there twice"),
        ([*LENGTH, "--mode", "block", "--add", str(one), str(one)], "vanilla at 16 would be there twice"),
        (["--mode", "block,black"], "black is none of vanilla"),
        (["--add", str(tmp_path / "deep.json")], "deep.json is not the study.json of a study (recursion limit"),
        (["--add", str(tmp_path / "other.json")], "other.json is not the study.json of a study (1 validation error"),
        (["--mode", "block", "--add", str(one), "--out", str(one.parent)], "study.json' cannot be written: it is read"),
        (["--out", str(one)], "study.json' cannot be written: File exists"),
        (["--block-length", "8,16"], "--block-length: only --several-blocks takes more than one, got 8,16"),
        (["--block-length", "0"], "--block-length must be numbers of positions, a comma list, each once, got '0'"),
        (["--several-blocks", "--block-length", "8,8"], "a comma list, each once, got '8,8'"),
        (["--out", ""], "argument --out: must not be empty, got ''"),
    ):
        with pytest.raises(SystemExit):
            run("other", *options)
        assert message in capsys.readouterr().err
