"""Folders of the published layouts and of bare copies."""

import pytest

import evals.questions.build_sample
from evals.questions.build_sample import SETS
from tests.build_sample.public_sets import (
    FILES,
    NUMBER,
    gsm8k,
    longbench,
    longbench_wrapped,
    math500,
    mmlu,
    readme,
    write,
    write_lines,
    write_parquet,
)


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


@pytest.fixture
def read_only(monkeypatch):
    """Leaves out the sets that a test is not about."""

    def only(make):
        kept = [public for public in SETS if any(FILES[make].startswith(name) for name in public.repositories)]
        assert len(kept) == 1
        monkeypatch.setattr(evals.questions.build_sample, "SETS", kept)

    return only
