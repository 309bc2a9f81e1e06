"""mmlu's rows by the likelihood of the letter, if --mmlu likelihood asks for it, beside them by generation."""

import pytest

from evals.results.likelihood import about, figures, letters


@pytest.mark.benchmark(group="likelihood")
def test_mmlu(benchmark, suite):
    rows = [row for row in suite.settings.rows if row["source"] == "mmlu"]
    if not rows or suite.settings.is_dummy:
        pytest.skip("no mmlu rows are evaluated" if not rows else "random weights answer at random")
    if not suite.llm.tokenizer.encode(" A", add_special_tokens=False):
        pytest.skip("the tokenizer has no letters")
    benchmark.extra_info.update(about(rows, suite.environment))
    outputs = benchmark.pedantic(letters, args=(suite.llm, rows, suite.settings.ask), rounds=3, warmup_rounds=1)
    seconds = benchmark.stats.stats.median if benchmark.enabled else None
    generated = list(suite.runs.values())
    benchmark.extra_info.update(figures(rows, outputs, seconds, generated, suite.settings.rows))
    assert len(outputs) == len(rows) and all(sum(output.probabilities) > 0.999 for output in outputs)
