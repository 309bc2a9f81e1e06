"""pytest-benchmark's histories and comparisons, with the suite's hooks around a test that always takes a second."""

import json
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from evals import conftest
from evals.runs import machine, settings
from evals.runs.configurations import KERNEL, STEP

pytest_plugins = "pytester"

ROOT = Path(__file__).parent.parent
HOOKS = "comparable, pytest_configure, pytest_sessionstart, pytest_benchmark_generate_machine_info, "
HOOKS += "pytest_benchmark_compare_machine_info, pytest_collection_finish, pytest_terminal_summary"
FAIL = "--benchmark-compare-fail=median:10%"


@pytest.fixture
def suite(pytester, monkeypatch):
    """suite(*options): a session on an H200, with the exit code and all that was printed."""
    pytester.makeconftest((ROOT / "conftest.py").read_text() + f"\nfrom evals.conftest import {HOOKS}  # noqa\n")
    (pytester.path / "pytest.ini").write_bytes((ROOT / "pytest.ini").read_bytes())
    path = pytester.makepyfile(
        """
        import itertools
        import types

        import pytest

        @pytest.mark.benchmark(timer=itertools.count().__next__)
        @pytest.mark.usefixtures("comparable")
        def test_it(benchmark):
            benchmark.pedantic(lambda: None, rounds=3)
            benchmark.extra_info["n"] = 4

        @pytest.fixture
        def case():
            pass

        @pytest.fixture
        def suite():
            return types.SimpleNamespace(settings=None, truncated=0, environment={})
        """
    )
    monkeypatch.setattr(conftest, "question", lambda *about: {"n": 4})
    monkeypatch.setattr(settings, "device_name", lambda device, ranks: "NVIDIA H200")

    def run(*options):
        # those of pytest_configure would be this session's
        with warnings.catch_warnings(record=True) as caught:
            done = pytester.runpytest_inprocess(path, *options)
        return done.ret, "\n".join([done.stdout.str(), done.stderr.str(), *(str(w.message) for w in caught)])

    return run


@pytest.fixture
def baseline(suite, tmp_path):
    """baseline(): a file of --benchmark-json; with `times`, its seconds scaled; with figures, of another machine."""

    def make(times=1.0, **machine_info):
        path = tmp_path / "baseline.json"
        assert suite(f"--benchmark-json={path}")[0] == 0
        content = json.loads(path.read_text())
        for key in ("min", "max", "mean", "median"):
            content["benchmarks"][0]["stats"][key] *= times
        content["machine_info"] |= machine_info
        path.write_text(json.dumps(content))
        return path

    return make


def saved(folder):
    return [path.relative_to(folder).parts for path in sorted(folder.rglob("0*.json"))]


def test_a_history_is_kept_for_each_device(suite, pytester, monkeypatch):
    assert [suite("--benchmark-autosave")[0] for _ in range(2)] == [0, 0]
    monkeypatch.setattr(settings, "device_name", lambda device, ranks: "AMD EPYC(TM) 9554, 2 threads")
    assert suite("--benchmark-save=first")[0] == 0
    (amd, _, first), (nvidia, _, one), (same, _, two) = saved(pytester.path / ".benchmarks")
    assert (amd, nvidia, same) == ("amd-epyc-9554-2-threads", "nvidia-h200", "nvidia-h200")
    assert first == "0001_first.json" and one[:4] == "0001" and two[:4] == "0002"
    # the report's glob in the README
    assert len(list(pytester.path.glob(".benchmarks/*/*/*.json"))) == 3
    # the last run of this device, though it is not the last one of all
    code, text = suite("--benchmark-compare", "--benchmark-compare-fail=median:900%")
    assert code == 0 and "0001_first" in text


def test_storage_that_the_user_names_is_used(suite, pytester, monkeypatch):
    assert suite("--benchmark-storage=mine", "--benchmark-autosave")[0] == 0
    monkeypatch.setenv("PYTEST_ADDOPTS", "--benchmark-storage=file://theirs")
    assert suite("--benchmark-autosave")[0] == 0
    assert len(saved(pytester.path / "mine")) == len(saved(pytester.path / "theirs")) == 1
    assert not (pytester.path / ".benchmarks").exists()


def test_a_history_that_cannot_be_written_costs_nothing_else(suite, pytester, tmp_path):
    (pytester.path / "file").touch()
    code, text = suite("--benchmark-storage=file", "--benchmark-autosave")
    assert code == 4 and "ERROR: --benchmark-storage: " in text and "1 passed" not in text
    (test,) = pytester.path.glob("test_*.py")
    body = "import pathlib, shutil; shutil.rmtree('mine'); pathlib.Path('mine').touch()"
    test.write_text(test.read_text() + f"\ndef test_last():\n    {body}\n")
    out = tmp_path / "out.json"
    code, text = suite("--benchmark-storage=mine", "--benchmark-autosave", f"--benchmark-json={out}")
    assert code == 1 and "2 passed" in text and "Name (time in s)" in text and "Traceback" not in text
    assert "what was lost" in text and "--benchmark-storage: NotADirectoryError: " in text
    assert json.loads(out.read_text())["benchmarks"][0]["name"] == "test_it"


def test_a_file_that_can_no_longer_be_written_costs_nothing_else(suite, pytester, tmp_path, monkeypatch):
    (lost := tmp_path / "lost").mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    (test,) = pytester.path.glob("test_*.py")
    test.write_text(test.read_text() + f"\ndef test_last():\n    import os; os.rmdir({str(lost)!r})\n")
    code, text = suite(f"--benchmark-json={lost}/out.json", "--benchmark-storage=mine", "--benchmark-autosave")
    assert code == 1 and "2 passed" in text and "Name (time in s)" in text and "Traceback" not in text
    assert f"--benchmark-json: '{lost}/out.json' cannot be written: there is no folder" in text
    assert len(saved(pytester.path / "mine")) == 1
    (elsewhere,) = tmp_path.glob("*-out.json")
    assert f"it is in '{elsewhere}' instead" in text and json.loads(elsewhere.read_text())["benchmarks"]


def test_as_fast_as_the_baseline_passes(suite, baseline):
    code, text = suite(f"--benchmark-compare={baseline(times=2.0)}", FAIL)
    assert code == 0 and "baseline" in text and "NOW" in text


def test_slower_than_the_baseline_fails(baseline, pytester, monkeypatch):
    """With what has regressed and no traceback. In a process of its own, on the device that is there."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (test,) = pytester.path.glob("test_*.py")
    test.write_text(test.read_text().replace("@pytest.mark.usefixtures", "# "))
    path = baseline(times=0.5, device=machine.device_name("cuda" if torch.cuda.is_available() else "cpu"))
    done = pytester.runpytest_subprocess(".", f"--benchmark-compare={path}", FAIL)
    assert done.ret == 1 and "Performance has regressed" in done.stderr.str() and "1 passed" in done.stdout.str()
    assert "Traceback" not in done.stdout.str() + done.stderr.str()


@pytest.mark.parametrize("marker", [KERNEL, STEP])
def test_the_time_of_a_kernel_or_step_on_a_cpu_is_no_bound(suite, baseline, marker):
    """Microseconds of the kernels' twins, and a few steps of the small model."""
    path = baseline(times=0.5)
    content = json.loads(path.read_text())
    content["benchmarks"][0]["extra_info"] = {marker: "attention"}
    path.write_text(json.dumps(content))
    code, text = suite(f"--benchmark-compare={path}", "--device=cpu")
    assert code == 0 and "NOW" not in text
    code, text = suite(f"--benchmark-compare={path}", FAIL, "--device=cpu")
    assert code == 4 and "there is nothing to compare: the other run has no test that can be compared here" in text


def test_a_comparison_of_nothing_fails(suite, baseline):
    """Before the run where no test is in the other file, and after it where none was timed."""
    path = baseline(times=2.0)
    code, text = suite(f"--benchmark-compare={path}", FAIL, "--benchmark-disable")
    assert code == 1 and "--benchmark-compare-fail: nothing was compared, so nothing is known" in text
    path.write_text(path.read_text().replace("::test_it", "::test_was_called_so"))
    code, text = suite(f"--benchmark-compare={path}", FAIL)
    assert code == 4 and "1 passed" not in text and "INTERNALERROR" not in text
    assert "there is nothing to compare: the other run has " in text and "::test_was_called_so, and none of" in text
    assert suite(f"--benchmark-compare={path}")[0] == 0


def test_what_is_not_compared_is_told(suite, baseline, pytester):
    path = baseline(times=2.0)
    (test,) = pytester.path.glob("test_*.py")
    test.write_text(test.read_text() + "\ndef test_new(benchmark):\n    benchmark(int)\n")
    code, text = suite(f"--benchmark-compare={path}", FAIL)
    assert code == 0 and "2 passed" in text
    assert "--benchmark-compare-fail: not compared, since the other run has it not: test_new" in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("machine_info"), "the other was on a device that its file does not name"),
        (lambda content: content.update(machine_info=3), "machine_info: Input should be a valid dictionary"),
        (lambda content: content["benchmarks"][0].pop("extra_info"), "benchmarks.0.extra_info: Field required"),
        (lambda content: content["benchmarks"][0].pop("fullname"), "'test_it': fullname: a value is required"),
        (lambda content: content["benchmarks"][0]["stats"].pop("iqr"), "'test_it': stats: iqr: a value is required"),
        (lambda content: content["benchmarks"][0]["stats"].update(median=float("nan")), "benchmarks.0.stats.median"),
        (lambda content: content["benchmarks"][0]["extra_info"].update(mode=3), "'test_it': extra_info: mode: Input"),
    ],
)
def test_a_damaged_file_to_compare_with_is_refused(suite, baseline, damage, message):
    path = baseline(times=2.0)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    code, text = suite(f"--benchmark-compare={path}", FAIL)
    assert code == 4 and "INTERNALERROR" not in text and "1 passed" not in text
    assert message in next(line for line in text.splitlines() if line.startswith("ERROR: --benchmark-compare: "))


@pytest.mark.parametrize("option", ["compare", "histogram", "cprofile-dump"])
def test_an_option_does_not_swallow_the_folder_of_the_tests(suite, pytester, option):
    (pytester.path / "evals").mkdir()
    (pytester.path / "evals" / "test_a.py").touch()
    for folder in ("evals/", "evals/test_a.py", "evals/test_a.py::test_b"):
        code, text = suite(f"--benchmark-{option}", folder)
        assert code == 4 and f"ERROR: --benchmark-{option} takes '{folder}' for its own value: give {folder} be" in text
    code, text = suite("--benchmark-compare=evals")
    assert code == 4 and "ERROR: --benchmark-compare: 'evals' is a folder; name a file of" in text
    assert suite("--benchmark-compare")[0] == 0


@pytest.mark.parametrize("option", ["compare", "storage"])
def test_an_empty_value_is_refused(suite, option):
    code, text = suite(f"--benchmark-{option}=")
    assert code == 4 and f"ERROR: --benchmark-{option} must not be empty" in text


def test_another_device_is_refused(suite, baseline):
    code, text = suite(f"--benchmark-compare={baseline(times=2.0, device='NVIDIA A100')}", FAIL)
    assert code == 4 and "INTERNALERROR" not in text and "1 passed" not in text
    assert "ERROR: --benchmark-compare: this run is on NVIDIA H200, the other was on NVIDIA A100" in text


def test_a_file_that_does_not_name_its_device_is_refused(suite, baseline):
    path = baseline()
    path.write_text(path.read_text().replace('"device"', '"node"'))
    code, text = suite(f"--benchmark-compare={path}", FAIL)
    assert code == 4 and "the other was on a device that its file does not name" in text


def test_other_rows_or_settings_end_the_run_before_it_is_timed(suite, baseline):
    path = baseline(times=2.0)
    path.write_text(path.read_text().replace('"n": 4', '"n": 32'))
    code, text = suite(f"--benchmark-compare={path}", FAIL)
    assert code == 4 and "--benchmark-compare: test_it: n was 32, is 4" in text and "1 passed" not in text


def test_another_version_of_torch_is_a_warning(suite, baseline):
    code, text = suite(f"--benchmark-compare={baseline(times=2.0, torch='1.0')}", FAIL)
    assert code == 0 and "Benchmark machine_info is different" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmark-compare=evals/baselines/none.json"], "there is no file 'evals/baselines/none.json'"),
        (["--benchmark-compare=none.json", FAIL], "there is no file 'none.json'"),
        (["--benchmark-compare=" + "n" * 300 + ".json", FAIL], "there is no file 'nnn"),
        (["--benchmark-compare=evals/baselines/none"], "there is no file 'evals/baselines/none'"),
        (
            ["--benchmark-compare=0007", FAIL],
            "there is nothing to compare with; the history is .benchmarks/nvidia-h200",
        ),
        (["--benchmark-compare", FAIL], "there is nothing to compare with; the history is .benchmarks/nvidia-h200"),
        (["--benchmark-compare=pytest.ini"], "pytest.ini: is not a JSON file of pytest-benchmark: Invalid JSON"),
        (["--benchmark-compare=deep.json"], "a JSON file of pytest-benchmark: Invalid JSON: recursion limit"),
        ([FAIL], "there is nothing to compare with"),
    ],
)
def test_nothing_to_compare_with_ends_the_run_before_it_begins(suite, pytester, options, message):
    (pytester.path / "deep.json").write_text("[" * 100_000)
    code, text = suite(*options)
    assert code == 4 and "INTERNALERROR" not in text and "1 passed" not in text
    assert message in next(line for line in text.splitlines() if line.startswith("ERROR: --benchmark-compare"))


def test_the_first_run_of_a_history_may_ask_for_the_last_one(suite):
    code, text = suite("--benchmark-compare", "--benchmark-autosave")
    assert code == 0 and "Can't compare. No benchmark files in" in text


def test_names_of_devices(monkeypatch):
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(machine.Path, "read_text", lambda *args, **options: "vendor\t: X\nmodel name\t: A  CPU(R) \n")
    assert machine.cpu_name("cpu") == "A  CPU(R)" and machine.device_name("cpu") == "A  CPU(R), 2 threads"
    assert machine.slug("A  CPU(R), 2 threads") == "a-cpu-2-threads"
    monkeypatch.setattr(machine.Path, "read_text", lambda *args, **options: "model name\t: \nflags\t: a b\n")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 1)
    assert machine.device_name("cpu") == "aarch64, 1 thread"
    monkeypatch.setattr(machine.torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert machine.device_name("cuda") == "NVIDIA H200" and machine.cpu_name("cuda") is None
    assert machine.device_name("cuda", 2) == "2 x NVIDIA H200"
    assert machine.slug("NVIDIA H200") == "nvidia-h200" and machine.gpu_name("cpu") is None
