"""What the report makes of files that lack something, of odd figures, and of files that are none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from evals.report import page
from evals.report.command import main
from evals.runs.configurations import KERNEL, STEP
from tests.report.html_tree import sections, table
from tests.report.sample import info, results, write, write_run


def test_random_weights_have_no_accuracy_and_say_so(report):
    nothing = dict.fromkeys(("accuracy", "accuracy_interval", "against_vanilla"))
    nothing |= dict.fromkeys(("accuracy_by_source", "n_by_source"), {})
    infos = [info(mode, weights="random", ignore_eos=True, **nothing) for mode in ("vanilla", "block")]
    root = report(results(infos))
    (note,) = root.all(class_="note")
    assert note.text.startswith("Random weights. This run measures speed alone")
    assert sections(root)["Accuracy against speed"] == "Random weights have no accuracy."
    assert not {"accuracy %", "interval 95 %"} & set(table(root)[0])
    assert "Accuracy by source" not in sections(root) and "%" not in next(root.all(class_="lead")).text


def test_a_resumed_run_has_accuracy_and_no_speed(report):
    nothing = dict.fromkeys(("tokens_per_second", "ms_per_forward", "seconds", "relative_error"))
    root = report(results([info(mode, resumed=5, **nothing) for mode in ("vanilla", "block")]))
    expected = "No configuration has both: the speed of a resumed one is unknown."
    assert sections(root)["Accuracy against speed"] == expected


def test_an_older_file_without_a_field(report):
    """Each field missing, and null, in the run and in its history: a page, with every configuration in its table."""
    whole = results([info(mode) for mode in ("vanilla_llada", "vanilla", "block")], day=1)
    for field in sorted(set(info("block")) - {"mode"}):
        for without in (
            lambda one, f=field: {k: v for k, v in one.items() if k != f},
            lambda one, f=field: one | {f: None},
        ):
            benchmarks = [{"name": "t", "extra_info": without(b["extra_info"])} for b in whole["benchmarks"]]
            older = whole | {"benchmarks": benchmarks, "datetime": "2026-03-01T00:00:00"}
            for run, other in [(older, whole), (whole, older)]:
                modes = [row["mode"].split()[0] for row in table(report(run, other))]
                assert modes == ["1vanilla_llada", "2vanilla", "3block"], field


def test_nothing_but_a_mode(report):
    root = report(results([]) | {"benchmarks": [{"name": "t", "extra_info": {"mode": "block"}}]})
    ((row),) = table(root)
    assert row.pop("mode") == "1block" and set(row.values()) == {"–"}
    assert sections(root)["Accuracy against speed"] == "This file holds no accuracy."
    assert sections(root)["History"].startswith("No earlier run")


@pytest.mark.parametrize(
    "changes",
    [
        [{}],
        [{"accuracy": None}, {}],
        [{"tokens_per_second": 0.0, "accuracy": 0.0}],
        [{"tokens_per_second": 0.0}, {"tokens_per_second": 1e15}],
        [{"tokens_per_second": 1e-15}, {"tokens_per_second": 1e15}],
        [{"tokens_per_second": 1e-15}],
        [{"accuracy": 1.0, "accuracy_interval": None}] * 3,
        [{}] * 20,
        [{"mode": "a mode to come"}, {"mode": "ブロック" * 40}],
    ],
    ids=["one", "one accuracy", "zero", "zero and much", "tiny, much", "tiny", "equal", "many equal", "unknown modes"],
)
def test_odd_runs_give_a_page(report, changes):
    infos = [info("block") | change for change in changes]
    root = report(results(infos), results(infos, day=1))
    assert len(table(root)) == len(infos)
    for svg in root.all("svg"):
        numbers = [v for e in svg.all() for k, v in e.attributes.items() if k in ("x", "y", "x1", "x2", "cx", "width")]
        assert all(re.fullmatch(r"-?\d+(\.\d+)?%?", number) for number in numbers)


def test_other_benchmarks_are_counted_and_not_shown(report):
    run = results([info("block")])
    run["benchmarks"] += [{"name": "test_kernel", "params": {"mode": "block"}, "extra_info": {}}]
    run["benchmarks"] += [{"name": "test_silu_mul[32]", "params": {"rows": 32}, "extra_info": {KERNEL: "SiLU x up"}}]
    run["benchmarks"] += [{"name": "test_ragged", "extra_info": {STEP: "ragged", "mode": "block", "model_rows": 3}}]
    root = report(run)
    assert len(table(root)) == 1 and "3 other benchmarks of the file are not shown." in root.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a JSON file of pytest-benchmark: Invalid JSON: EOF while parsing"),
        ("{", "is not a JSON file of pytest-benchmark: Invalid JSON"),
        ("[" * 5000, "is not a JSON file of pytest-benchmark: Invalid JSON: recursion limit exceeded"),
        ([], "is not a JSON file of pytest-benchmark: an object is expected, got []"),
        ({"blockinfer": None}, "is not a JSON file of pytest-benchmark: datetime: Field required"),
        (results([]) | {"datetime": "soon"}, "datetime: Input should be a valid datetime"),
        (results([]) | {"benchmarks": 3}, "benchmarks: Input should be a valid list, got 3"),
        (results([]) | {"benchmarks": [{}]}, "benchmarks.0.name: Field required"),
        (results([]), "none of its 0 benchmarks is a configuration of evals/test_throughput.py"),
        (results([info("block", tokens_per_second="fast")]), "tokens_per_second: Input should be a valid number"),
        (
            results([info("block", tokens_per_second=-1)]),
            "tokens_per_second: Input should be greater than or equal to 0",
        ),
        (results([info("block", tokens_per_second=float("nan"))]), "tokens_per_second: Input should be"),
        (results([info("block", tokens_per_second=float("inf"))]), "tokens_per_second: Input should be"),
        (results([info("block", tokens_per_second=10**400)]), "tokens_per_second: Input should be"),
        (results([info("block", tokens_per_second=1e-320)]), "tokens_per_second: Value error, must be 0 or at least"),
        (results([info("block", n=10**300)]), "n: Input should be less than or equal to 1000000000000000"),
        (results([info("block", nfe=True)]), "nfe: Input should be a valid integer, got True"),
        (results([info("block", tokens_per_second="9")]), "tokens_per_second: Input should be a valid number, got '9'"),
        (results([info("block", more=float("nan"))]), "benchmarks.0.extra_info.more: must be a number below 1e300"),
        (results([info("block", more=10**400)]), "benchmarks.0.extra_info.more: must be a number below 1e300"),
        (results([info("block", accuracy=50)]), "accuracy: Input should be less than or equal to 1, got 50"),
        (results([info("block", accuracy_by_source={"a\n\x1b[2J": 2})]), "accuracy_by_source.a"),
        (results([info("block", block_length=0)]), "block_length: Input should be greater than or equal to 1, got 0"),
        (results([info("block") | {"mode": 7}]), "mode: Input should be a valid string, got 7"),
    ],
)
@pytest.mark.parametrize("as_history", [False, True])
def test_a_file_that_is_not_right_ends_with_one_line(tmp_path, capsys, content, message, as_history):
    good = write(tmp_path / "good.json", results([info("block")]))
    bad = write(tmp_path / "bad.json", content)
    files = [good, bad] if as_history else [bad, good]
    assert main([*map(str, files), "-o", str(tmp_path / "page.html")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.strip().isprintable()
    assert printed.err.startswith(f"{bad}: ") and message in printed.err
    assert not (tmp_path / "page.html").exists()


def test_files_that_cannot_be_read_or_written(tmp_path, capsys):
    good = str(write(tmp_path / "good.json", results([info("block")])))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    before = Path(good).read_bytes()
    for arguments, message in [
        ([str(tmp_path / "none.json")], "none.json: cannot be read: No such file or directory"),
        ([str(tmp_path)], f"{tmp_path}: cannot be read: Is a directory"),
        ([str(tmp_path / "bytes.json")], "bytes.json: is not a JSON file of pytest-benchmark: Invalid JSON"),
        ([good, "-o", str(tmp_path)], f"'{tmp_path}' cannot be written: it is a folder"),
        ([good, "-o", str(tmp_path / "no" / "page.html")], "page.html' cannot be written: there is no folder '"),
        ([good, "-o", good], "good.json' cannot be written: it is read too, as '"),
        ([good, "-o", "/dev/null"], "'/dev/null' cannot be written: it is a device"),
    ]:
        assert main([*arguments[:1], *(arguments[1:] or ["-o", str(tmp_path / "page.html")])]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert Path(good).read_bytes() == before and not (tmp_path / "page.html").exists()


def test_the_command_needs_no_torch(tmp_path):
    """In a process of its own, options between the files, and twice the same bytes."""
    out, *rest = write_run(tmp_path)
    code = "import sys; from evals.report.command import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    pages = [tmp_path / "a.html", tmp_path / "b.html"]
    for target, seed in zip(pages, "12", strict=True):
        command = [sys.executable, "-c", code, out, "-o", str(target), *rest]
        environment = os.environ | {"PYTHONPATH": str(Path(page.__file__).parents[2]), "PYTHONHASHSEED": seed}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 0 and done.stdout.splitlines() == [f"written to {target}", "0 False"], done.stderr
    assert pages[0].read_bytes() == pages[1].read_bytes()
