"""--shard and evals.results.merge: the shards of a run, merged, are the run; and a shard that is killed and resumed."""

import json
import os
import subprocess
import sys

import pytest

from evals.questions.graders import Grade
from evals.questions.rows import load_rows, shard_positions
from evals.results import merge
from evals.results.comparison import intervals
from evals.results.paired import against_vanilla
from evals.runs.configurations import KERNEL, RESUMED, STEP
from evals.runs.settings import SAMPLE

TIMES = {"seconds", "tokens_per_second", "ms_per_forward", "latency_p50", "latency_p95", "first_seconds"}


@pytest.mark.parametrize("of", [1, 2, 3, 4, 7, 200])
def test_shards_part_the_rows_evenly_source_by_source(of):
    rows = load_rows(SAMPLE)
    shards = [shard_positions(rows, index, of) for index in range(1, of + 1)]
    assert sorted(i for positions in shards for i in positions) == list(range(200))
    assert all(positions == sorted(positions) for positions in shards)
    sizes = [len(positions) for positions in shards]
    assert max(sizes) - min(sizes) <= 1
    for source in ("gsm8k", "math500", "mmlu", "longbench_hotpotqa"):
        numbers = [sum(rows[i]["source"] == source for i in positions) for positions in shards]
        assert max(numbers) - min(numbers) <= 1


@pytest.mark.parametrize("given", ["0/2", "3/2", "2", "1/0", "a/b", "-1/2", "1/2/3", "/", "1.0/2"])
def test_a_shard_that_makes_no_sense_is_refused(pytestconfig, given):
    with pytest.raises((pytest.UsageError, SystemExit), match="--shard: must be i/n with i from 1 to n, got"):
        pytestconfig._parser.parse([f"--shard={given}"])


def test_more_shards_than_rows_are_refused_in_every_shard(make_suite):
    for index in (1, 8):
        with pytest.raises(pytest.UsageError, match=f"--shard {index}/8: there are more shards than rows"):
            make_suite(shard=(index, 8))


def _grade(row):
    share, source = len(row["id"]) / 3, row["source"]
    f1, extracted = share / 2 if source == "longbench_hotpotqa" else None, None if source == "gsm8k" else row["id"]
    return Grade(row["id"] in ("a", "b2", "c"), share, f1, extracted)


def run(suite, path, seconds):
    """Measures every configuration and writes what --benchmark-json would; `seconds` are its times.

    The grades are made up, since random weights answer nothing.
    """
    benchmarks = []
    for case, time in zip(suite.settings.cases, seconds, strict=True):
        measured = suite.measure(case, None)
        measured.seconds[:] = [time]
        measured.grades[:] = [_grade(row) for row in suite.settings.rows]
        name = f"test_throughput[{case.mode}-{case.block_length}]"
        titles = {"name": name, "fullname": f"evals/test_throughput.py::{name}", "group": "throughput"}
        runs = list(suite.runs.values())
        info = suite.extra_info(measured) | {"against_vanilla": against_vanilla(measured, runs)}
        info |= intervals(measured, runs)
        benchmarks.append(titles | {"stats": {"median": time}, "extra_info": info})
    path.write_text(json.dumps({"benchmarks": benchmarks, "datetime": f"2030-01-{seconds[0]:02}"}))
    return path


@pytest.fixture
def shards(make_suite, tmp_path):
    """The files of three shards, of 3, 2 and 2 rows."""
    return [run(make_suite(shard=(i, 3)), tmp_path / f"{i}.json", [i, 5 - i]) for i in (1, 2, 3)]


def test_merged_shards_are_the_whole_run(make_suite, shards, tmp_path, capsys):
    whole = json.loads(run(make_suite(), tmp_path / "whole.json", [6, 6]).read_text())
    out = tmp_path / "merged.json"
    merge.main([str(out), *map(str, (shards[2], shards[0], shards[1]))])
    assert capsys.readouterr().out == f"3 shards, 7 rows, 2 configurations: {out}\n"
    merged = json.loads(out.read_text())
    assert merged["datetime"] == "2030-01-03"
    # of the row that only one shard has
    assert merged["benchmarks"][0]["extra_info"]["dataset_revisions"] == ["LongBench@1"]
    assert [b["fullname"] for b in merged["benchmarks"]] == [b["fullname"] for b in whole["benchmarks"]]
    for one, all_rows, slowest in zip(merged["benchmarks"], whole["benchmarks"], [3, 4], strict=True):
        info, expected = one["extra_info"], all_rows["extra_info"]
        assert info.keys() - expected.keys() == {"shards"} and info["shards"] == 3
        for key in expected.keys() - TIMES:
            close = isinstance(expected[key], float | dict)
            assert info[key] == (pytest.approx(expected[key]) if close else expected[key]), key
        assert [row[0] for row in info["rows"]] == ["a", "b", "c", "a2", "b2", "a3", "a4"]
        assert len({row[1] for row in info["rows"]}) > 1, "rows that are all alike show nothing"
        assert one["stats"]["median"] == info["seconds"] == slowest
        assert info["tokens_per_second"] == info["tokens"] / slowest
        assert info["ms_per_forward"] == pytest.approx(1000 * (6 if slowest == 3 else 9) / info["forwards"])
        assert info["latency_p50"] is info["latency_p95"] is None


def change(path, **changes):
    content = json.loads(path.read_text())
    content["benchmarks"][1]["extra_info"] |= changes
    path.write_text(json.dumps(content))


def test_shards_that_do_not_fit_are_named(make_suite, shards, tmp_path, capsys):
    one, two, three = shards
    other = run(make_suite(shard=(2, 2)), tmp_path / "other.json", [1, 1])
    skipped = run(make_suite(shard=(3, 3), num_samples=6), tmp_path / "skipped.json", [1, 1])
    whole = run(make_suite(), tmp_path / "whole.json", [1, 1])
    empty = tmp_path / "empty.json"
    empty.touch()
    for given, message in [
        ([one, three], "missing of 3 shards: 2"),
        ([two], "missing of 3 shards: 1, 3"),
        ([one, two, two], f"shard 2 is there 2 times: {two}, {two}; missing of 3 shards: 3"),
        ([one, other, three], f"{other} is shard 2/2, {one} is shard 1/3"),
        ([one, two, skipped], f"{skipped} and {one} are shards of different rows"),
        ([one, two, three, whole], f"{whole}: holds no shard: the suite was not run with --shard"),
        ([one, two, empty], f"{empty}: is not a JSON file of pytest-benchmark"),
        ([one, two, tmp_path], f"{tmp_path}: cannot be read: Is a directory"),
    ]:
        assert merge.main([str(tmp_path / "merged.json"), *map(str, given)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("merge: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_size", 9), ("max_tokens", 9), ("model", "x"), ("commit", "x"), ("gpu", "x"), ("of tomorrow", "x")],
)
def test_shards_of_other_settings_are_named(shards, key, value):
    change(shards[2], **{key: value})
    with pytest.raises(ValueError, match=f"3.json has {key} {value!r}, .*1.json has .*: .*test_throughput.block-8"):
        merge.merge([(str(path), merge.read(path)) for path in shards])


def test_a_configuration_that_one_shard_lacks_is_named(shards):
    content = json.loads(shards[1].read_text())
    del content["benchmarks"][0]
    shards[1].write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"2.json: there is no .*test_throughput\[vanilla-8\], which .*1.json has"):
        merge.merge([(str(path), merge.read(path)) for path in shards])


@pytest.mark.parametrize("marker", [KERNEL, STEP])
def test_kernels_and_steps_are_not_merged(shards, marker):
    """Every shard of `pytest evals/` times them."""
    expected = merge.merge([(str(path), merge.read(path)) for path in shards])
    for path in shards:
        content = json.loads(path.read_text())
        titles = {"name": "test_silu_mul[32]", "fullname": "evals/test_kernels.py::test_silu_mul[32]"}
        content["benchmarks"].insert(0, titles | {"stats": {"median": 1e-5}, "extra_info": {marker: "SiLU x up"}})
        path.write_text(json.dumps(content))
    assert merge.merge([(str(path), merge.read(path)) for path in shards]) == expected


def test_what_shards_know_of_loading_and_steadiness_is_merged(shards):
    """The slowest one's; a shard of an older commit knows nothing of it."""

    def merged(*infos):
        for path, new in zip(shards, infos, strict=True):
            content = json.loads(path.read_text())
            for benchmark in content["benchmarks"]:
                kept = benchmark["extra_info"]
                benchmark["extra_info"] = {k: v for k, v in kept.items() if k not in ("load_seconds", "steady")} | new
            path.write_text(json.dumps(content))
        return merge.merge([(str(path), merge.read(path)) for path in shards])["benchmarks"][0]["extra_info"]

    info = merged({"load_seconds": 3.0, "steady": True}, {"load_seconds": 5.0, "steady": True}, {})
    assert info["load_seconds"] == 5.0 and info["steady"] is None and info["unsteady"] is None
    fault = "the first round took +9.0 % on the others' median"
    info = merged({"steady": True}, {"steady": False, "unsteady": fault}, {"steady": True})
    assert info["load_seconds"] is None and info["steady"] is False and info["unsteady"] == fault
    assert merged(*[{"steady": True, "unsteady": None}] * 3)["steady"] is True


def test_random_weights_have_no_accuracy_in_the_merged_file_either(shards):
    for path in shards:
        content = json.loads(path.read_text())
        for benchmark in content["benchmarks"]:
            info = benchmark["extra_info"]
            rows = [[*row[:3], None] for row in info["rows"]]
            unknown = {"weights": "random", "n_by_source": {}, "accuracy_by_source": {}, "score_by_source": {}}
            unknown["longbench_f1_by_source"] = {}
            info |= unknown | {"rows": rows, "accuracy": None, "accuracy_interval": None}
        path.write_text(json.dumps(content))
    merged = merge.merge([(str(path), merge.read(path)) for path in shards])
    info = merged["benchmarks"][0]["extra_info"]
    assert info["accuracy"] is info["accuracy_interval"] is None and info["accuracy_by_source"] == {}


KILLER = """
import os, signal
from evals.runs.resume import Generations
append, number = Generations.append, 0

def kills(self, *about):
    global number
    number += 1
    if number == 4:
        self._file.write(b'{"key": "cut')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, *about)

Generations.append = kills
"""


def test_a_shard_that_is_killed_goes_on_and_is_merged(make_suite, tmp_path, chat_llm):
    """The suite itself, killed in the middle of a line, with two configurations side by side."""
    (tmp_path / "killer.py").write_text(KILLER)
    file, kept = tmp_path / "1.json", tmp_path / "kept.jsonl"
    command = [sys.executable, "-m", "pytest", "evals/test_throughput.py", "-p", "no:cacheprovider", "--shard=1/2"]
    command += [f"--benchmark-json={file}", f"--resume={kept}", "--output=/dev/null", "--device=cpu"]
    command += [f"--model={chat_llm.config.model}", f"--dataset={tmp_path}/rows.jsonl", "--dtype=float64"]
    command += ["--mode=vanilla,block", "--max-tokens=12", "--block-length=8", "--batch-size=1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", str(tmp_path)])}

    def suite(*options):
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, env=environment)
        return done.returncode, done.stdout + done.stderr

    code, text = suite("-p", "killer")
    assert code == -9 and not file.exists(), text
    code, text = suite()
    assert code == 0 and f"blockinfer: 3 of 8 generations found in {kept}\n" in text, text
    assert text.count(" resumed ") == 2
    samples = (tmp_path / "samples-1-2.jsonl").read_text().splitlines()
    assert len(samples) == 8 and all(json.loads(line)["correct"] is not None for line in samples)

    other = run(make_suite(shard=(2, 2), dtype="float64"), tmp_path / "2.json", [1, 2])
    merged = merge.merge([(str(path), merge.read(path)) for path in (file, other)])
    whole = json.loads(run(make_suite(dtype="float64"), tmp_path / "whole.json", [3, 3]).read_text())
    vanilla, block = merged["benchmarks"]
    for one, all_rows in zip((vanilla, block), whole["benchmarks"], strict=True):
        assert [row[:3] for row in one["extra_info"]["rows"]] == [row[:3] for row in all_rows["extra_info"]["rows"]]
    assert (vanilla["extra_info"]["resumed"], block["extra_info"]["resumed"]) in ((1, 2), (2, 1))
    for one in (vanilla, block):
        assert one["extra_info"]["tokens_per_second"] is None and one["name"].endswith(RESUMED)
