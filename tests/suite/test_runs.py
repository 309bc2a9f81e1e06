"""Whole runs on a random checkpoint, in processes of their own."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from evals.report.command import main as report
from evals.results.comparison import SpeedUp
from evals.results.schema import Configuration
from evals.runs.configurations import KERNEL, STEP
from evals.runs.machine import device_name
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.test_rows import GSM, MATH, MMLU, QA, write


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
    options = [f"--model={folder}", "--mode=vanilla_llada,vanilla,block", "--steps-and-kernels"]
    code, text, benchmarks, result = run_suite(tmp_path, *options)
    assert code == 0, text
    kernels = {name: benchmarks.pop(name) for name in list(benchmarks) if KERNEL in benchmarks[name]["extra_info"]}
    steps = {name: benchmarks.pop(name) for name in list(benchmarks) if STEP in benchmarks[name]["extra_info"]}
    assert list(benchmarks) == [f"test_throughput[{mode}-8]" for mode in ("vanilla_llada", "vanilla", "block")]
    _check_kernels(kernels, text)
    _check_steps(steps, text)
    # each of 12 steps is a forward of all four rows
    assert benchmarks["test_throughput[vanilla_llada-8]"]["extra_info"]["forwards"] == 12
    info = benchmarks["test_throughput[block-8]"]["extra_info"]
    assert info["n"] == 4 and info["tokens"] <= 48 and info["nfe"] == info["steps"] >= info["tokens"]
    assert info["tokens_per_second"] == pytest.approx(info["tokens"] / info["seconds"])
    assert info["forwards"] < info["nfe"], "four requests share forwards"
    assert set(info["accuracy_by_source"]) == {"gsm8k", "math500", "mmlu", "longbench_hotpotqa"}
    assert set(info["longbench_f1_by_source"]) == {"longbench_hotpotqa"}
    assert info["weights"] == "checkpoint" and info["device"] == "cpu" and info["torch"] == torch.__version__
    assert info["quantization"] is None
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
    assert f"{standard['throughput'] / semi['throughput']:.2f} (" in lines[head + 1]
    assert all(len(line) <= 125 for line in lines[: head + 6])
    low, high = info["interval_over_vanilla"]
    assert low < block["throughput"] / semi["throughput"] < high and info["steady"] is None
    assert lines[head + 3].endswith(str(SpeedUp(block["throughput"] / semi["throughput"], (low, high))))
    assert benchmarks["test_throughput[vanilla-8]"]["extra_info"]["interval_over_vanilla"] is None
    assert info["first_seconds"] > 0 and info["load_seconds"] > 0 and info["graphs"] == info["graph_bytes"] == 0
    assert "loaded in " in text.split("= blockinfer =")[1] and "CUDA graphs" not in text

    answers = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert Counter(one["mode"] for one in answers) == {"vanilla_llada": 4, "vanilla": 4, "block": 4}
    block_rows = [[o["id"], o["tokens"], o["forwards"], o["correct"]] for o in answers if o["mode"] == "block"]
    assert block_rows == info["rows"] and f"\nanswers: {tmp_path}/samples.jsonl\n" in text
    often = info["unextracted_by_source"]
    assert ("block 8 low_confidence: in 1 of 1 answers to gsm8k the grader found nothing" in text) == often["gsm8k"]

    elsewhere = {"asked_block_length", "shards"}  # from the test's parameters, and from evals/results/merge.py
    assert set(Configuration.model_fields) - elsewhere <= set(info), "the report reads what the suite writes"
    assert report([str(tmp_path / "out.json"), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{info['tokens_per_second']:,.1f} tokens/s" in page
    assert f"{len(kernels) + len(steps)} other benchmarks of the file are not shown." in page


def test_a_run_on_two_ranks(tmp_path, folder):
    """Its tests have names of their own, its device is another, and its figures say so."""
    options = [f"--model={folder}", "--mode=block", "--tensor-parallel-size=2", "-k", "throughput or block-1x16-tp2"]
    code, text, benchmarks, _ = run_suite(tmp_path, *options)
    assert code == 0, text
    assert list(benchmarks) == ["test_throughput[block-8-tp2]", "test_step[block-1x16-tp2]"]
    assert all(benchmark["extra_info"]["tensor_parallel_size"] == 2 for benchmark in benchmarks.values())
    assert f"{device_name('cpu')}, 2 ranks" in text and "on the CPU, shared by 2 ranks, 4 rows" in text


def _check_kernels(kernels, text):
    """Each kernel is there, as the twin that it is, with figures that fit each other, and as a row of the table."""
    infos = [benchmark["extra_info"] for benchmark in kernels.values()]
    names = {"attention", "confidence", "RoPE + K/V store", "residual + RMSNorm", "SiLU x up", "product", "layer"}
    assert {info[KERNEL] for info in infos} == names
    for benchmark, info in zip(kernels.values(), infos, strict=True):
        assert info["implementation"] == "PyTorch twin" and info["device"] == device_name("cpu")
        assert "against_vanilla" not in info and benchmark["group"].startswith("kernels: ")
        seconds = benchmark["stats"]["median"]
        assert info["microseconds"] == pytest.approx(1e6 * seconds)
        assert info["tb_per_s"] == pytest.approx(info["bytes"] / seconds / 1e12)
        assert info["fraction_of_copy"] == pytest.approx(info["tb_per_s"] / info["copy_tb_per_s"])
        assert info["fraction"] > 0 and info["times_as_fast"] > 0
    lines = text.split("= kernels =")[1].splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("kernel "))
    assert lines[head - 2].startswith("PyTorch twin in float32, ")
    rows = lines[head + 1 : head + 1 + len(infos)]
    assert [row[:20].strip() for row in rows] == [info[KERNEL] for info in infos]
    assert all(len(line) <= 120 for line in lines[: head + 2 + len(infos)])


def _check_steps(steps, text):
    """Each case is there, with figures that fit each other, and as a row of the table; they are timed after the rows,
    and the kernels after them. What was asked for comes last of all tables."""
    assert len(steps) == 12 and {"test_step[block-1x16-threshold]", "test_ragged", "test_agreement"} <= steps.keys()
    files = [text.index(f"evals/test_{name}.py") for name in ("throughput", "accuracy", "steps", "kernels")]
    assert files == sorted(files)
    tables = [text.index(title) for title in (" benchmark 'throughput'", "= kernels =", "= steps =", "= blockinfer =")]
    assert tables == sorted(tables)
    for benchmark in steps.values():
        info = benchmark["extra_info"]
        assert info["ms_per_step"] == pytest.approx(1000 * info["seconds"] / info["forwards"])
        assert info["seconds"] == pytest.approx(benchmark["stats"]["median"], rel=0.05)
        assert info["tokens"] == round(info["requests"] * info["mean_new_tokens"]) and info["first_seconds"] > 0
        assert info["gpu"] is info["other_gb"] is None and info["weights"] == "checkpoint" and info["triton"]
        assert "against_vanilla" not in info and benchmark["group"].startswith("steps")
        assert info["least_read_ms"] > 0 and info["least_products_ms"] > 0 and info["keys"] >= info["model_rows"]
    # a block of eight takes eight steps at one token each, with the prompt in the first
    assert steps["test_step[block-1x16]"]["extra_info"]["forwards"] == 16
    assert steps["test_step[block-1x16]"]["extra_info"]["model_rows"] == 16 + 16 * 8 + 8
    assert steps["test_step[vanilla-1x16]"]["extra_info"]["model_rows"] == 16 * 32
    ragged, agreement = steps["test_ragged"]["extra_info"], steps["test_agreement"]["extra_info"]
    ratio = ragged["tokens_per_second"] / ragged["uniform_tokens_per_second"]
    assert ragged["times_uniform"] == pytest.approx(ratio)
    # in float32 next to nothing tips
    assert 0.5 <= agreement["share_of_sequences_equal"] and 0.9 <= agreement["share_of_tokens_equal"] <= 1
    lines = text.split("= steps =")[1].splitlines()
    rows = lines[3 : 3 + len(steps)]
    assert [row.split()[0] for row in rows] == [benchmark["extra_info"][STEP] for benchmark in steps.values()]
    assert all(len(line) <= 120 for line in lines[: 3 + len(steps)])


INTERRUPT = """
import os
import signal

from evals.timing import kernels
from blockinfer import LLM

function, calls = {where}, iter(range(1000))

def interrupted(*args, **options):
    if next(calls) == {call}:
        {action}
    return function(*args, **options)

{where} = interrupted
"""
ACTIONS = {2: "raise KeyboardInterrupt", 143: "os.kill(os.getpid(), signal.SIGTERM)"}


@pytest.fixture
def interrupt(tmp_path, monkeypatch):
    """interrupt(call, code) -> options with which this call of a function ends the run, by what has that exit code."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".", str(tmp_path)]))

    def write_plugin(call, code, where="LLM.generate"):
        (tmp_path / "interrupt.py").write_text(INTERRUPT.format(call=call, action=ACTIONS[code], where=where))
        return ["-p", "interrupt"]

    return write_plugin


@pytest.mark.parametrize("code", ACTIONS)
def test_an_interrupt_loses_no_configuration_that_is_through(tmp_path, folder, interrupt, code):
    """After the warm-ups and the runs of the first rule's configurations, and the first warm-up of the second's."""
    options = [f"--model={folder}", "--mode=vanilla,block", "--unmasking=low_confidence,random", *interrupt(3, code)]
    found, text, benchmarks, result = run_suite(tmp_path, *options)
    assert found == code and ("Terminated: SIGTERM" in text) == (code == 143) and "Traceback" not in text
    names = [f"test_throughput[{mode}-8-low_confidence]" for mode in ("vanilla", "block")]
    assert list(benchmarks) == names
    assert result["vanilla"]["total_tokens"] == benchmarks[names[0]]["extra_info"]["tokens"]
    assert result["comparison_over_vanilla"]["throughput_speedup_interval"]
    assert "= blockinfer =" in text
    assert report([str(tmp_path / "out.json"), "-o", str(tmp_path / "report.html")]) == 0


LOSE = """
import os, shutil
from blockinfer import LLM

generate = LLM.generate

def loses(*args, **options):
    shutil.rmtree(os.environ["LOST"], ignore_errors=True)
    return generate(*args, **options)

LLM.generate = loses
"""


def test_an_output_that_can_no_longer_be_written_costs_neither_the_other_nor_the_tables(tmp_path, folder, monkeypatch):
    (tmp_path / "lose.py").write_text(LOSE)
    (lost := tmp_path / "lost").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".", str(tmp_path)]))
    monkeypatch.setenv("LOST", str(lost))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    options = [f"--model={folder}", "--mode=block", "-p", "lose", "-k=throughput", f"--output={lost}/file"]
    options.append(f"--samples={lost}/answers")
    code, text, benchmarks, result = run_suite(tmp_path, *options)
    assert code == 1 and "1 passed" in text and "Traceback" not in text
    assert list(benchmarks) == ["test_throughput[block-8]"] and result is None
    shown, told = text.split("= what was lost =")
    assert "= blockinfer =" in shown and " benchmark 'throughput'" in shown and "written to " not in shown
    assert f"--samples {lost}/answers: 4 answers could not be written: No such file or directory" in told
    assert f"--output: '{lost}/file' cannot be written: there is no folder '{lost}'; it is in '" in told
    kept = Path(told.split("it is in '")[1].split("' instead")[0])
    assert kept.parent == tmp_path and json.loads(kept.read_text())["blockinfer"]["total_tokens"] > 0


def test_what_was_stopped_before_anything_was_through_says_what_would_have_been_kept(tmp_path, folder, interrupt):
    code, text, benchmarks, result = run_suite(
        tmp_path, f"--model={folder}", "--mode=vanilla,block", *interrupt(1, 143)
    )
    assert code == 143 and not benchmarks and result is None and "Traceback" not in text
    assert "stopped before a configuration was through; with --resume FILE its answers would be kept" in text


def test_sigterm_loses_no_step_and_no_kernel_that_is_through(tmp_path, folder, interrupt, code=143):
    # two calls a case, the second one timed; the third case's was interrupted
    options = [f"--model={folder}", "-k=test_step", *interrupt(5, code)]
    found, text, benchmarks, _ = run_suite(tmp_path, *options)
    assert found == code and "= steps =" in text and "Traceback" not in text
    assert list(benchmarks) == ["test_step[block-1x16]", "test_step[block-1x64]"]
    assert all(benchmark["extra_info"]["ms_per_step"] > 0 for benchmark in benchmarks.values())

    options = ["-k=test_attention", *interrupt(2, code, "kernels.figures")]
    found, text, benchmarks, _ = run_suite(tmp_path, *options)
    assert found == code and "= kernels =" in text and "Traceback" not in text
    assert len(benchmarks) == 2 and all(b["extra_info"]["microseconds"] > 0 for b in benchmarks.values())


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ([], True),
        (["--steps-and-kernels"], False),
        (["evals/test_steps.py::test_ragged", "evals/test_kernels.py"], False),
        (["-k=test_step or test_attention"], False),
    ],
)
def test_steps_and_kernels_are_left_out_on_a_cpu_unless_they_are_asked_for(tmp_path, options, left_out):
    _, text, _, _ = run_suite(tmp_path, "--collect-only", "-q", "--mode=block", *options)
    for name in ("test_steps.py::", "test_kernels.py::"):
        assert (name not in text) == left_out
    assert ("test_throughput.py::" in text) != any(option.startswith("-k=") for option in options)


def test_dummy_weights_have_no_accuracy(tmp_path, folder):
    """Here in fp8, which the file and the table name."""
    options = [
        f"--model={folder}",
        "--load-format=dummy",
        f"--tokenizer={folder}",
        "--mode=block",
        "--quantization=fp8",
    ]
    code, text, benchmarks, result = run_suite(tmp_path, *options)
    assert code == 0, text
    assert "(random weights), float32 and fp8, " in text
    assert benchmarks["test_throughput[block-8]"]["extra_info"]["quantization"] == "fp8"
    assert result["blockinfer"]["accuracy"] is None and result["vanilla_llada"] is result["comparison"] is None
    assert result["blockinfer"]["total_tokens"] == 4 * 12
    assert "random weights" in text and "5 skipped" in text


def test_a_model_that_is_not_there_ends_the_run_with_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    code, text, _, result = run_suite(tmp_path, f"--model={tmp_path / 'empty'}", "--mode=block")
    assert code == 4 and "there is no config.json" in text and "Traceback" not in text and result is None


def test_test_ids(tmp_path, folder):
    options = ["--collect-only", "-q", "--mode=block", "--block-length=8,32", "--unmasking=all", "-k=threshold"]
    options += ["--block-add-threshold=0.5", "--entropy-threshold=0.1"]
    _, text, _, _ = run_suite(tmp_path, f"--model={folder}", *options)
    ids = [line.split("::")[1] for line in text.splitlines() if "::" in line]
    assert ids[:2] == ["test_throughput[block-8-threshold-add0.5]", "test_throughput[block-32-threshold-add0.5]"]
    assert ids[2] == "test_throughput[block-8-entropy_threshold-0.1-add0.5]"
    assert ids[4] == "test_throughput[block-8-scheduled_threshold-add0.5]"
    assert ids[6] == "test_accuracy[gsm8k-block-8-threshold-add0.5]"


def test_a_bad_option_ends_the_run_with_one_line(tmp_path):
    code, text, _, result = run_suite(tmp_path, "--mode=blok")
    assert code == 4 and "ERROR: --mode must be" in text and "Traceback" not in text and result is None


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
