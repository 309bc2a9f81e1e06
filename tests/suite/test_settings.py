"""The options of the suite, and the cases that they make."""

from pathlib import Path

import pytest

from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from evals.runs.settings import SAMPLE, TINY_MODEL


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
    assert {rule for rule, p in by_rule.items() if p.threshold == 0.7} == {"threshold", "scheduled_threshold"}
    unlimited = {"threshold", "factor", "entropy", "entropy_threshold"}
    assert {rule for rule, p in by_rule.items() if p.denoising_steps is None} == unlimited
    limited = settings(unmasking=["threshold"], denoising_steps=4).cases
    assert {c.params.denoising_steps for c in limited} == {4, 16}


def test_skip_vanilla_and_dummy(settings):
    assert [c.mode for c in settings(skip_vanilla=True).cases] == [m for m in MODES if m != "vanilla"]
    dummy = settings(load_format="dummy", model="llada-8b")
    assert dummy.is_dummy and not dummy.is_tiny and dummy.tokenizer.endswith("llada_tiny")
    assert all(c.params.ignore_eos for c in dummy.cases)


def test_what_stands_on_the_tests_command_line_is_for_the_evals_alone(settings, pytestconfig, monkeypatch):
    """As `pytest tests evals --num-samples 2` has it."""
    for name, value in [("num_samples", 2), ("mode", ["block"]), ("block_length", [8])]:
        monkeypatch.setattr(pytestconfig.option, name, value)
    assert len(settings().rows) == 4 and [c.block_length for c in settings().cases] == [32] * 6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": ["all", "block"]}, "--mode: 'all' stands alone, got all, block"),
        ({"benchmark_json": Path("/no/such/out.json")}, "--benchmark-json: '.*' cannot be written: there is no folder"),
        ({"benchmark_json": Path("")}, "--benchmark-json must name a file, got a folder"),
        (
            {"benchmark_json": Path("a"), "output": "a"},
            "--benchmark-json: 'a' cannot be written: it is read too, as 'a'",
        ),
        ({"output": str(SAMPLE), "dataset": str(SAMPLE)}, "--output: '.*' cannot be written: it is read too"),
        (
            {"output": f"{TINY_MODEL}/config.json"},
            "--output: '.*' cannot be written: it is read too, as '.*llada_tiny'",
        ),
        ({"output": "a", "benchmark_compare": "a"}, "--output: 'a' cannot be written: it is read too"),
        ({"samples": str(SAMPLE), "dataset": str(SAMPLE)}, "--samples: '.*' cannot be written: it is read too"),
        ({"samples": "evals"}, "--samples: 'evals' cannot be written: it is a folder"),
        ({"samples": "a", "benchmark_json": Path("a")}, "--samples: 'a' cannot be written: it is read too"),
        ({"samples": "a", "resume": "a"}, "--samples: 'a' cannot be written: it is read too"),
        ({"samples": "no/a"}, "--samples: 'no/a' cannot be written: there is no folder"),
        ({"resume": "/dev/null"}, "--resume: '/dev/null' cannot be written: it is a device"),
        ({"resume": "x" * 300}, "--resume: 'x*' cannot be written: File name too long"),
        ({"resume": "a", "output": "a"}, "--resume: 'a' cannot be written: it is read too"),
        ({"mode": ["blok"]}, "--mode must be 'all' or names of vanilla_llada, .*got 'blok'; did you mean 'block'?"),
        ({"unmasking": ["greedy"]}, "--unmasking must be 'all' or names of .*got 'greedy'"),
        ({"source": ["mlu"]}, "source must be one of gsm8k, .*got 'mlu'"),
        ({"dtype": "int8"}, "--dtype must be one of auto, float.*got 'int8'"),
        (
            {"output": "no/such/folder.json"},
            "--output: 'no/such/folder.json' cannot be written: there is no folder '.*no/such'",
        ),
        ({"device": "tpu"}, "--device must be auto, cpu or cuda, got 'tpu'"),
        ({"dataset": "nothing.jsonl"}, "the dataset 'nothing.jsonl' cannot be read"),
        ({"skip_sample": 4}, "of 4 rows none is left"),
        (
            {"threshold": 0.5},
            "--threshold is read by --unmasking threshold and scheduled_threshold alone, got low_conf",
        ),
        ({"unmasking": ["threshold"], "threshold": 2.0}, "threshold must be between 0.0 and 1.0, got 2.0"),
        ({"mode": ["vanilla"], "skip_vanilla": True}, "--skip-vanilla leaves no mode"),
        (
            {"tensor_parallel_size": 2, "reference_impl": True, "trust_remote_code": True},
            "--reference-impl runs on one GPU: leave out --tensor-parallel-size",
        ),
    ],
)
def test_bad_options(settings, changed, message):
    with pytest.raises(pytest.UsageError, match=message):
        settings(**changed)


def test_ranks_are_the_suite_s_to_start(settings, monkeypatch):
    assert settings(tensor_parallel_size=2).device_name == f"{settings().device_name}, 2 ranks"
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings()
    with pytest.raises(pytest.UsageError, match="starts its ranks itself: run pytest without torchrun"):
        settings(tensor_parallel_size=2)


TEXTS = ("dataset", "model", "tokenizer", "dtype", "device", "output", "resume", "samples")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--block-length=0", "argument --block-length: must be at least 1, got 0"),
        ("--block-length=8,x", "argument --block-length: must be an integer, got 'x'"),
        ("--block-length=8,8", "argument --block-length: names a value twice: '8,8'"),
        ("--block-length=,", "argument --block-length: must be a comma list of at least one value"),
        ("--max-tokens=0", "argument --max-tokens: must be at least 1, got 0"),
        ("--tensor-parallel-size=0", "argument --tensor-parallel-size: must be at least 1, got 0"),
        ("--threshold=2", "argument --threshold: must be from 0 to 1, got 2"),
        ("--block-add-threshold=nan", "argument --block-add-threshold: must be from 0 to 1, got nan"),
        ("--decoded-token-threshold=-1", "argument --decoded-token-threshold: must be from 0 to 1, got -1"),
        ("--entropy-threshold=inf", "argument --entropy-threshold: must be at least 0 and finite, got inf"),
        ("--entropy-threshold=x", "argument --entropy-threshold: must be a number, got 'x'"),
        ("--num-samples=-1", "argument --num-samples: must be at least 1, got -1"),
        *(
            (f"--{name}={text}", f"argument --{name}: must not be empty, got '{text}'")
            for name in TEXTS
            for text in ("", " ")
        ),
        ("--source=", "argument --source: must be a comma list of at least one value, got ''"),
        ("--mode=", "argument --mode: must be a comma list of at least one value, got ''"),
        ("--load-format=pt", "argument --load-format: invalid choice: 'pt'"),
        ("--quantization=fp9", "argument --quantization: invalid choice: 'fp9'"),
    ],
)
def test_options_that_do_not_parse(pytestconfig, option, message, capsys):
    with pytest.raises((pytest.UsageError, SystemExit), match=message) as error:
        pytestconfig._parser.parse([option])
    assert error.value is not None
