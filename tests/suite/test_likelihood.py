"""--mmlu likelihood: four-choice rows by the letter's likelihood, beside generation."""

import math
from types import SimpleNamespace

import pytest

from blockinfer import SamplingParams
from evals.questions.graders import Grade
from evals.questions.rows import encode_for_letter
from evals.results.likelihood import about, figures, letters, table
from evals.runs.configurations import has_figures, is_configuration
from evals.runs.run import Run
from evals.runs.settings import Case
from tests.suite.test_runs import folder, run_suite  # noqa: F401 - a fixture
from tests.test_rows import GSM, MMLU


def test_a_letter_s_log_probability_is_its_score_behind_the_prompt(chat_llm):
    rows = [MMLU, MMLU | {"question": "Which one?"}]
    outputs = letters(chat_llm, rows)
    for row, output in zip(rows, outputs, strict=True):
        ids = encode_for_letter(row, chat_llm.tokenizer)
        text = chat_llm.tokenizer.decode(ids)
        assert text.endswith("assistant<|end_header_id|>\n\nThe answer is") and row["question"] in text
        alone = [
            chat_llm.score([ids], [chat_llm.tokenizer.encode(f" {c}", add_special_tokens=False)], use_tqdm=False)[0]
            for c in "ABCD"
        ]
        assert output.logprobs == pytest.approx([score.logprob for score in alone], abs=1e-9)
        assert math.fsum(output.probabilities) == pytest.approx(1)


def test_figures_and_their_table():
    """Of three rows, one of which is of another source, and two configurations, one timed on these rows alone."""
    rows = [MMLU, MMLU | {"id": "b2", "answer": "A"}, GSM]
    outputs = [SimpleNamespace(best=2, nfe=1), SimpleNamespace(best=1, nfe=4)]
    case = Case("block", 8, "low_confidence", SamplingParams())
    run = Run(case, [], [Grade(True, 1.0), Grade(True, 1.0), Grade(False, 0.0)], [9.0], 5, None)
    info = about(rows[:2], {"device": "cpu"}) | figures(rows[:2], outputs, 0.5, [run], rows)
    assert (info["right"], info["accuracy"], info["forwards_by_request"], info["n"]) == (1, 0.5, 5, 2)
    assert info["generation"][0]["right"] == 2 and info["generation"][0]["seconds"] is None
    assert has_figures(info) and not is_configuration(info) and not has_figures(about(rows[:2], {}))
    alone = figures(rows[:2], outputs, 0.5, [Run(case, [], run.grades[:2], [9.0], 5, None)], rows[:2])
    assert alone["generation"][0]["seconds"] == 9.0
    lines = table([info])
    assert lines[0].split() == "by the letter's likelihood 1 of 2 right, 50 % (9-91), 0.5 s".split()
    assert lines[1].split() == "by generation, block-8-low_confidence 2 of 2 right, 100 % (34-100)".split()


def test_the_suite_measures_it_where_it_is_asked_for(tmp_path, folder):  # noqa: F811
    code, text, benchmarks, _ = run_suite(tmp_path, f"--model={folder}", "--mode=block", "--mmlu=likelihood")
    assert code == 0, text
    assert sorted(benchmarks) == ["test_mmlu", "test_throughput[block-8]"]
    info = benchmarks["test_mmlu"]["extra_info"]
    assert (info["likelihood"], info["n"]) == ("mmlu", 1) and info["right"] in (0, 1) and info["seconds"] > 0
    (generated,) = info["generation"]
    assert generated["configuration"] == "block-8-low_confidence" and generated["right"] in (0, 1)
    assert "by the letter's likelihood" in text and "by generation, block-8-low_confidence" in text
