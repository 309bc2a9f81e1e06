"""The suite itself: its options, the cases they make, and a whole run on a random checkpoint."""

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from evals import test_accuracy
from evals.graders import Grade
from evals.paired import losses
from evals.record import Run, is_enough, standard_error
from evals.report.__main__ import main as report
from evals.report.results import Configuration
from evals.settings import SAMPLE, read_settings
from evals.suite import Suite
from evals.test_accuracy import FLOORS
from evals.wilson import wilson_interval
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.test_rows import GSM, MMLU, QA, write

MATH = GSM | {"id": "m", "source": "math500"}


@pytest.fixture
def settings(pytestconfig, tmp_path):
    """read_settings of the command line's defaults on a CPU, with some options changed."""
    dataset = write(tmp_path / "rows.jsonl", [GSM, MATH, MMLU, QA])

    class Config:
        def __init__(self, **changed):
            self.changed = {"dataset": str(dataset), "device": "cpu"} | changed

        def getoption(self, name):
            key = name.removeprefix("--").replace("-", "_")
            return self.changed[key] if key in self.changed else pytestconfig.getoption(name)

    return lambda **changed: read_settings(Config(**changed))


def test_defaults_on_a_cpu(settings):
    s = settings()
    assert s.is_tiny and not s.is_dummy and s.batch_size == 8 and len(s.rows) == 4
    assert [(c.mode, c.block_length) for c in s.cases] == [("vanilla_llada", 32), *((m, 32) for m in MODES)]
    assert {c.params.denoising_steps for c in s.cases} == {32, 128} and not s.several_rules


def test_standard_decoding_is_one_block_with_as_many_steps_in_all(settings):
    (case,) = settings(mode=["vanilla_llada"], max_tokens=100, block_length=[32], denoising_steps=8).cases
    # three blocks of 32 in 8 steps, and one of 4 in 1
    assert (case.params.mode, case.params.block_length, case.params.denoising_steps) == ("vanilla", 100, 25)


def test_standard_decoding_is_measured_once_where_block_lengths_make_no_difference(settings):
    cases = settings(block_length=[8, 32, 64], mode=["vanilla_llada", "block"]).cases
    # 128 steps in all at 8 and 32, 64 at 64
    assert [c.block_length for c in cases if c.mode == "vanilla_llada"] == [8, 64]
    modes = ["vanilla", "vanilla_llada", "block"]
    assert [c.mode for c in settings(mode=modes).cases] == modes
    assert [c.block_length for c in cases if c.mode == "block"] == [8, 32, 64]


def test_a_rule_is_passed_only_what_it_reads(settings):
    cases = settings(unmasking=["all"], mode=["block"], threshold=0.7).cases
    assert [c.unmasking for c in cases] == list(RULES)
    by_rule = {c.unmasking: c.params for c in cases}
    assert {rule for rule, p in by_rule.items() if p.threshold == 0.7} == {"threshold"}
    assert {rule for rule, p in by_rule.items() if p.denoising_steps is None} == {"threshold", "factor", "entropy"}
    limited = settings(unmasking=["threshold"], denoising_steps=4).cases
    assert {c.params.denoising_steps for c in limited} == {4, 16}


def test_skip_vanilla_and_dummy(settings):
    assert [c.mode for c in settings(skip_vanilla=True).cases] == [m for m in MODES if m != "vanilla"]
    dummy = settings(load_format="dummy", model="llada-8b")
    assert dummy.is_dummy and not dummy.is_tiny and dummy.tokenizer.endswith("llada_tiny")
    assert all(c.params.ignore_eos for c in dummy.cases)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": ["all", "block"]}, "--mode: 'all' stands alone, got all, block"),
        ({"benchmark_json": "/no/such/out.json"}, "--benchmark-json must be a file in a folder that exists, got"),
        ({"mode": ["blok"]}, "--mode must be 'all' or names of vanilla_llada, .*got 'blok'; did you mean 'block'?"),
        ({"unmasking": ["greedy"]}, "--unmasking must be 'all' or names of .*got 'greedy'"),
        ({"source": ["mlu"]}, "source must be one of gsm8k, .*got 'mlu'"),
        ({"dtype": "int8"}, "--dtype must be one of auto, float.*got 'int8'"),
        (
            {"output": "no/such/folder.json"},
            "--output must be a file in a folder that exists, got 'no/such/folder.json'",
        ),
        ({"device": "tpu"}, "--device must be auto, cpu or cuda, got 'tpu'"),
        ({"dataset": "nothing.jsonl"}, "the dataset 'nothing.jsonl' cannot be read"),
        ({"skip_sample": 4}, "of 4 rows none is left"),
        ({"threshold": 0.5}, "--threshold is read by --unmasking threshold alone, got low_confidence"),
        ({"unmasking": ["threshold"], "threshold": 2.0}, "threshold must be between 0.0 and 1.0, got 2.0"),
        ({"mode": ["vanilla"], "skip_vanilla": True}, "--skip-vanilla leaves no mode"),
    ],
)
def test_bad_options(settings, changed, message):
    with pytest.raises(pytest.UsageError, match=message):
        settings(**changed)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--block-length=0", "argument --block-length: must be at least 1 and finite, got 0"),
        ("--block-length=8,x", "argument --block-length: must be an integer, got 'x'"),
        ("--block-length=8,8", "argument --block-length: names a value twice: '8,8'"),
        ("--block-length=,", "argument --block-length: must be a comma list of at least one value"),
        ("--max-tokens=0", "argument --max-tokens: must be at least 1 and finite, got 0"),
        ("--num-samples=-1", "argument --num-samples: must be at least 1 and finite, got -1"),
        ("--load-format=pt", "argument --load-format: invalid choice: 'pt'"),
    ],
)
def test_options_that_do_not_parse(pytestconfig, option, message, capsys):
    with pytest.raises((pytest.UsageError, SystemExit), match=message) as error:
        pytestconfig._parser.parse([option])
    assert error.value is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("suite"), vocab_size=300, max_sequence_length=1024)
    write_tokenizer(folder)
    return folder


def run_suite(tmp_path, *options):
    """`pytest evals` in a process of its own -> exit code, output, benchmarks by test id, the comparison file."""
    rows = write(tmp_path / "rows.jsonl", [GSM, MATH, MMLU, QA])
    json_file, output = tmp_path / "out.json", tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "evals", "-p", "no:cacheprovider", f"--benchmark-json={json_file}"]
    command += [f"--dataset={rows}", f"--output={output}", "--device=cpu", "--max-tokens=12", "--block-length=8"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    benchmarks = (
        json.loads(json_file.read_text())["benchmarks"] if json_file.exists() and json_file.stat().st_size else []
    )
    result = json.loads(output.read_text()) if output.exists() else None
    return done.returncode, done.stdout + done.stderr, {b["name"]: b for b in benchmarks}, result


def test_a_whole_run(tmp_path, folder):
    code, text, benchmarks, result = run_suite(tmp_path, f"--model={folder}", "--mode=vanilla_llada,vanilla,block")
    assert code == 0, text
    assert list(benchmarks) == [f"test_throughput[{mode}-8]" for mode in ("vanilla_llada", "vanilla", "block")]
    # each of 12 steps is a forward of all four rows
    assert benchmarks["test_throughput[vanilla_llada-8]"]["extra_info"]["forwards"] == 12
    info = benchmarks["test_throughput[block-8]"]["extra_info"]
    assert info["n"] == 4 and info["tokens"] <= 48 and info["nfe"] == info["steps"] >= info["tokens"]
    assert info["tokens_per_second"] == pytest.approx(info["tokens"] / info["seconds"])
    assert info["forwards"] < info["nfe"], "four requests share forwards"
    assert set(info["accuracy_by_source"]) == {"gsm8k", "math500", "mmlu", "longbench_hotpotqa"}
    assert info["weights"] == "checkpoint" and info["device"] == "cpu" and info["torch"] == torch.__version__
    assert benchmarks["test_throughput[vanilla_llada-8]"]["extra_info"]["block_length"] == 12

    block, standard, semi = result["blockinfer"], result["vanilla_llada"], result["vanilla"]
    assert block["throughput"] == pytest.approx(block["total_tokens"] / block["total_time"])
    assert result["comparison"]["throughput_speedup"] == pytest.approx(block["throughput"] / standard["throughput"])
    assert result["comparison_over_vanilla"]["time_speedup"] == pytest.approx(semi["total_time"] / block["total_time"])
    assert 0 <= block["accuracy"] <= 100
    lines = text.split("= blockinfer =")[1].splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("mode "))
    assert [line.split()[:2] for line in lines[head + 1 : head + 4]] == [
        ["vanilla_llada", "8"],
        ["vanilla", "8"],
        ["block", "8"],
    ]
    assert lines[head + 1].endswith("1.00" + f"{standard['throughput'] / semi['throughput']:>11.2f}")
    assert all(len(line) <= 115 for line in lines[: head + 6])

    elsewhere = {"asked_block_length", "shards"}  # from the test's parameters, and from evals/merge.py
    assert set(Configuration.model_fields) - elsewhere <= set(info), "the report reads what the suite writes"
    assert report([str(tmp_path / "out.json"), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{info['tokens_per_second']:,.1f} tokens/s" in page


def test_dummy_weights_have_no_accuracy(tmp_path, folder):
    options = [
        f"--model={folder}",
        "--load-format=dummy",
        f"--tokenizer={folder}",
        "--mode=block",
        "--benchmark-disable",
    ]
    code, text, benchmarks, result = run_suite(tmp_path, *options)
    assert code == 0, text
    assert result["blockinfer"]["accuracy"] is None and result["vanilla_llada"] is result["comparison"] is None
    assert result["blockinfer"]["total_tokens"] == 4 * 12
    assert "random weights" in text and "5 skipped" in text


def test_a_model_that_is_not_there_ends_the_run_with_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    code, text, _, result = run_suite(tmp_path, f"--model={tmp_path / 'empty'}", "--mode=block")
    assert code == 4 and "there is no config.json" in text and "Traceback" not in text and result is None


def test_test_ids(tmp_path, folder):
    options = ["--collect-only", "-q", "--mode=block", "--block-length=8,32", "--unmasking=all", "-k=threshold"]
    _, text, _, _ = run_suite(tmp_path, f"--model={folder}", *options)
    ids = [line.split("::")[1] for line in text.splitlines() if "::" in line]
    assert ids[:2] == ["test_throughput[block-8-threshold]", "test_throughput[block-32-threshold]"]
    assert ids[2] == "test_accuracy[gsm8k-block-8-threshold]"


def test_a_bad_option_ends_the_run_with_one_line(tmp_path):
    code, text, _, result = run_suite(tmp_path, "--mode=blok")
    assert code == 4 and "ERROR: --mode must be" in text and "Traceback" not in text and result is None


def test_wilson_interval_meets_published_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, 15 of 148, 0 of 20
    for correct, number, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        assert wilson_interval(correct, number) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("source", ["gsm8k", "math500", "mmlu"])
@pytest.mark.parametrize("mode", ["vanilla_llada", "dual_cache", "block"])
def test_the_floors_catch_an_engine_that_answers_wrongly(settings, source, mode):
    """Of 8 rows: the floor's share right passes, one row less fails."""
    s = settings(dataset=str(SAMPLE), num_samples=32)
    case = next(c for c in s.cases if c.mode == mode)
    enough = math.ceil(FLOORS[source] * 8)
    assert 2 < enough < 6

    def suite(right):
        correct = iter([True] * right + [False] * 8)
        grades = [Grade(row["source"] == source and next(correct), 0.0) for row in s.rows]
        run = Run(case, [], grades, [1.0], 1, None)
        return SimpleNamespace(settings=s, result=lambda _: run, runs={})

    test_accuracy.test_accuracy(suite(enough), case, source)
    with pytest.raises(AssertionError, match=f"{100 * (enough - 1) / 8:.0f}% of 8 right"):
        test_accuracy.test_accuracy(suite(enough - 1), case, source)


def test_the_floors_are_for_the_small_model_on_its_own_rows_at_one_token_a_step(settings, tmp_path):
    def floors(**changed):
        changed = {"dataset": str(SAMPLE), "num_samples": 32, "mode": ["block"]} | changed
        return {test_accuracy.has_floor(s, case) for s in [settings(**changed)] for case in s.cases}

    assert floors() == floors(mode=["all"]) == floors(block_length=[8, 32]) == {True}
    assert floors(model="other") == floors(max_tokens=64) == floors(denoising_steps=4) == {False}
    assert floors(unmasking=["threshold"]) == {False}
    other = tmp_path / SAMPLE.name
    other.write_bytes(SAMPLE.read_bytes())
    assert floors(dataset=str(other)) == {False}


def test_a_model_without_a_tokenizer_ends_the_run_with_one_line(tmp_path):
    folder = write_checkpoint(tmp_path / "bare")
    code, text, _, result = run_suite(tmp_path, f"--model={folder}", "--mode=block")
    assert code == 4 and "has no tokenizer to ask the rows with; pass --tokenizer" in text
    assert "Traceback" not in text and result is None


@pytest.mark.parametrize("tokens", ["1000", "1024", "5000"])
def test_max_tokens_that_leave_no_room_end_the_run_with_one_line(tmp_path, folder, tokens):
    code, text, _, result = run_suite(tmp_path, f"--model={folder}", "--mode=block", f"--max-tokens={tokens}")
    assert code == 4 and "takes 1024 tokens in all" in text and "--max-tokens" in text
    assert "Traceback" not in text and result is None


def test_a_configuration_that_fails_is_not_run_again_for_every_source(settings):
    calls = []

    def fails(*args, **options):
        calls.append(1)
        raise FloatingPointError("broken")

    s = settings(mode=["block"])
    engine = SimpleNamespace(config=SimpleNamespace(max_model_len=512, dtype=torch.float32), tokenizer=None)
    suite = object.__new__(Suite)
    suite.llm, suite.settings, suite.runs, suite.failed, suite.found, suite.prompts = engine, s, {}, {}, {}, [{}]
    suite.kept = None
    for run in (lambda: suite.measure(s.cases[0], SimpleNamespace(pedantic=fails)), lambda: suite.result(s.cases[0])):
        with pytest.raises(FloatingPointError, match="broken"):
            run()
    assert calls == [1]


@pytest.mark.parametrize(("lost", "fails"), [(0, False), (3, False), (4, True), (8, True)])
@pytest.mark.parametrize("source", ["mmlu", "all"])
def test_a_loss_against_vanilla_is_judged_on_the_same_rows(settings, source, lost, fails):
    """Of 8 rows, three lost may be chance at a true loss of 3 points; four are not."""
    dataset_rows = [MMLU | {"id": f"r{i}"} for i in range(8)]
    s = settings(mode=["vanilla", "block"], unmasking=["threshold"])
    s = dataclasses.replace(s, rows=dataset_rows)
    vanilla, block = s.cases
    grades = {vanilla: [Grade(True, 1.0)] * 8, block: [Grade(i >= lost, 0.0) for i in range(8)]}
    runs = {case: Run(case, [], grades[case], [1.0], 1, None) for case in s.cases}
    suite = SimpleNamespace(settings=s, result=runs.__getitem__, runs=runs)
    if not fails:
        test_accuracy.test_accuracy(suite, block, source)
    else:
        with pytest.raises(AssertionError, match=f"{lost} answers lost and 0 won of 8 against vanilla: with 95 %"):
            test_accuracy.test_accuracy(suite, block, source)
    lines = losses(list(runs.values()), s.max_accuracy_loss)
    assert len(lines) == 2 and lines[1].split()[:5] == ["block", "32", "threshold", str(lost), "0"]
    assert lines[1].endswith("rows to rule out 3")


@pytest.mark.parametrize(
    ("seconds", "budget", "error", "enough"),
    [
        ([1.0], 0.0, 0.01, True),
        ([1.0], 60.0, 0.01, False),
        ([1.0, 1.0], 60.0, 0.01, False),
        ([1.0, 1.0, 1.0], 60.0, 0.01, True),
        ([1.0, 1.2, 1.4], 60.0, 0.01, False),
        ([1.0, 1.2, 1.4], 60.0, 0.1, True),
        ([1.0, 1.2, 1.4], 4.0, 0.01, True),
    ],
)
def test_rounds_go_on_until_the_mean_is_known_or_the_time_is_over(seconds, budget, error, enough):
    assert is_enough(seconds, budget, error) == enough


def test_the_standard_error_is_a_share_of_the_mean():
    assert standard_error([2.0]) is None
    assert standard_error([2.0, 4.0]) == pytest.approx(1 / 3)


def test_repeated_rounds_are_all_stored(tmp_path, folder):
    code, text, benchmarks, _ = run_suite(
        tmp_path, f"--model={folder}", "--mode=vanilla,block", "--max-seconds=2", "--relative-error=0"
    )
    assert code == 0, text
    for name in ("test_throughput[vanilla-8]", "test_throughput[block-8]"):
        info, stats = benchmarks[name]["extra_info"], benchmarks[name]["stats"]
        assert info["rounds"] == stats["rounds"] >= 3 and stats["total"] <= 2.5
        assert info["seconds"] == pytest.approx(stats["median"], rel=0.05)
        assert info["relative_error"] > 0
    against = benchmarks["test_throughput[block-8]"]["extra_info"]["against_vanilla"]
    assert against["n"] == 4 and against["loss"] == (against["lost"] - against["won"]) / 4
    assert against["loss_at_least"] <= against["loss"] <= against["loss_at_most"]
    assert benchmarks["test_throughput[vanilla-8]"]["extra_info"]["against_vanilla"] is None
