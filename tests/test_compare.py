"""evals/results/compare.py: what makes a result of the suite worse than another, and what makes two incomparable."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from evals.results import merge
from evals.results.compare import MACHINE, NOT_COMPARABLE, NOT_WORSE, QUESTION, SOFTWARE, WORSE, main, unpaired_loss
from evals.runs.configurations import PLAIN, RESUMED
from tests.test_shards import run

BLOCK = "test_throughput[block-8]"
BY_SOURCE = ("n_by_source", "accuracy_by_source", "score_by_source", "longbench_f1_by_source")
DAY = '"datetime": "2030-01-01"'
VANILLA = "test_throughput[vanilla-8]"


@pytest.fixture
def compare(make_suite, tmp_path, capsys):
    """compare(change, *options): a file of the suite beside a copy of it whose benchmarks `change` has changed.

    -> the exit code and what was printed. The file has 7 rows, of which a, b2 and c are right.
    """
    old = run(make_suite(), tmp_path / "old.json", [10, 5])
    new = tmp_path / "new.json"

    def compare(change=lambda benchmarks: None, *options):
        content = json.loads(old.read_text())
        kept = {benchmark["name"]: benchmark for benchmark in content["benchmarks"]}
        change(kept)
        new.write_text(json.dumps(content | {"benchmarks": list(kept.values())}))
        code = main([str(old), str(new), *options])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return compare


def changed(name=BLOCK, **figures):
    return lambda benchmarks: benchmarks[name]["extra_info"].update(figures)


def scaled(key, factor):
    def change(benchmarks):
        info = benchmarks[BLOCK]["extra_info"]
        info[key] = type(info[key])(info[key] * factor)

    return change


def test_a_result_is_not_worse_than_itself(compare):
    code, printed = compare()
    assert code == NOT_WORSE and printed.endswith("the new result is not worse\n")
    assert [line.split()[0] for line in printed.splitlines()[1:3]] == [VANILLA, BLOCK] and "3 -> 3" in printed
    assert "on a CPU one round does not tell" in printed and len(printed.splitlines()) == 5


def test_what_is_compared_is_what_the_suite_stores(make_suite, tmp_path):
    content = json.loads(run(make_suite(), tmp_path / "out.json", [10, 5]).read_text())
    for benchmark in content["benchmarks"]:
        # only a merged result has shards
        read = {*QUESTION, *MACHINE, *SOFTWARE, "rows", "accuracy", "tokens_per_second", "relative_error", "nfe"}
        assert (read | {"peak_memory_gib"}) - benchmark["extra_info"].keys() == {"shards"}


def test_speed_of_one_round_on_a_gpu_is_judged_by_the_margin(make_suite, tmp_path, capsys):
    old, new = run(make_suite(), tmp_path / "old.json", [10, 5]), tmp_path / "new.json"
    old.write_text(old.read_text().replace('"device": "cpu"', '"device": "cuda"'))

    def compare(factor, *options):
        content = json.loads(old.read_text())
        scaled("tokens_per_second", factor)({b["name"]: b for b in content["benchmarks"]})
        new.write_text(json.dumps(content))
        return main([str(old), str(new), *options]), capsys.readouterr().out

    # by exp(1.96 * sqrt(2) * 0.1) = 1.319, since a round says nothing of its error: 0.950 and 0.948 at most
    assert compare(0.7203)[0] == NOT_WORSE
    code, printed = compare(0.719)
    assert code == WORSE and f"WORSE {BLOCK}: tokens/s is 0.719 times the old, 0.949 at most, below 0.95" in printed
    assert compare(0.719, "--margin", "6")[0] == NOT_WORSE
    assert compare(3)[0] == NOT_WORSE


def test_speed_of_one_round_on_a_cpu_is_not_judged(compare):
    code, printed = compare(scaled("tokens_per_second", 0.1))
    assert code == NOT_WORSE and "on a CPU one round does not tell how well its time is known" in printed


def test_a_file_older_than_ranks_is_of_one(make_suite, tmp_path, capsys):
    new, old = run(make_suite(), tmp_path / "new.json", [10, 5]), tmp_path / "old.json"
    content = json.loads(new.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    new.write_text(json.dumps(content))
    for benchmark in content["benchmarks"]:
        del benchmark["extra_info"]["tensor_parallel_size"]
        benchmark["extra_info"]["tokens_per_second"] *= 2
    old.write_text(json.dumps(content))
    assert main([str(old), str(new)]) == WORSE
    printed = capsys.readouterr().out
    assert f"WORSE {BLOCK}: tokens/s is 0.500 times the old" in printed and "tensor_parallel_size" not in printed


def test_speed_of_many_rounds_is_judged_by_their_error(make_suite, tmp_path, capsys):
    path, new = run(make_suite(), tmp_path / "old.json", [10, 5]), tmp_path / "new.json"
    old = json.loads(path.read_text())
    for benchmark in old["benchmarks"]:
        benchmark["extra_info"]["relative_error"] = 0.01
    path.write_text(json.dumps(old))
    for factor, code in ((0.93, NOT_WORSE), (0.92, WORSE)):
        # exp(1.96 * sqrt(2) * 0.01) = 1.028
        for benchmark in old["benchmarks"]:
            benchmark["extra_info"]["tokens_per_second"] *= factor
        new.write_text(json.dumps(old))
        assert main([str(path), str(new)]) == code
        for benchmark in old["benchmarks"]:
            benchmark["extra_info"]["tokens_per_second"] /= factor
    assert "tokens/s is 0.920 times the old, 0.946 at most, below 0.95" in capsys.readouterr().out


def test_memory_is_judged_by_the_margin_where_both_know_it(compare, make_suite, tmp_path, capsys):
    code, printed = compare(changed(peak_memory_gib=9.0))
    assert code == NOT_WORSE and f"{BLOCK}: one of the two does not know its peak memory, so it is not" in printed
    old, new = (run(make_suite(), tmp_path / f"{name}.json", [10, 5]) for name in ("a", "b"))
    for path, gib in ((old, 10.0), (new, 10.6)):
        path.write_text(path.read_text().replace('"peak_memory_gib": null', f'"peak_memory_gib": {gib}'))
    assert main([str(old), str(new)]) == WORSE
    assert f"WORSE {BLOCK}: peak memory is 1.060 times the old, beyond 1.05" in capsys.readouterr().out
    assert main([str(new), str(old)]) == NOT_WORSE


def test_forwards_may_not_rise(compare):
    def one_more(benchmarks):
        benchmarks[BLOCK]["extra_info"]["nfe"] += 1

    code, printed = compare(one_more)
    assert code == WORSE and "and none more is allowed" in printed
    assert compare(scaled("nfe", 0.5))[0] == NOT_WORSE


def grade(*correct, name=BLOCK):
    """Exactly the rows of these numbers are right."""

    def change(benchmarks):
        info = benchmarks[name]["extra_info"]
        for number, row in enumerate(info["rows"]):
            row[3] = number in correct
        info["accuracy"] = len(correct) / len(info["rows"])

    return change


def test_accuracy_is_judged_row_by_row(compare):
    # rows 0, 2 and 4 are right in the old file
    assert compare(grade(0, 2, 4))[0] == NOT_WORSE
    assert compare(grade(1, 2, 4))[0] == NOT_WORSE
    code, printed = compare(grade(), "--max-accuracy-loss", "2")
    assert code == WORSE
    loss = "with 95 % confidence a loss of 3.0 points or more, over 2"
    assert f"WORSE {BLOCK}: 3 rows lost and 0 won of 7: {loss}" in printed
    assert compare(grade(), "--max-accuracy-loss", "4")[0] == NOT_WORSE
    # as many right, but others: what is lost is made up for
    code, printed = compare(grade(1, 3, 5))
    assert code == NOT_WORSE and "3 -> 3" in printed


def test_accuracy_without_grades_of_each_row_is_judged_unpaired_and_it_says_so(compare):
    def change(benchmarks):
        del benchmarks[BLOCK]["extra_info"]["rows"]
        benchmarks[BLOCK]["extra_info"]["accuracy"] = 2 / 7

    code, printed = compare(change)
    assert code == NOT_WORSE
    assert f"{BLOCK}: a file does not hold each row's grade, so accuracy is compared unpaired" in printed


def test_unpaired_loss():
    # Newcombe 1998, table II (a): 56/70 against 48/80 is a difference of 0.2 with the 95 % interval 0.0524 to 0.3339
    before, after = {"accuracy": 56 / 70, "n": 70}, {"accuracy": 48 / 80, "n": 80}
    assert unpaired_loss(before, after) == pytest.approx(0.0524, abs=1e-4)


def test_random_weights_have_no_accuracy_to_judge(compare):
    def change(benchmarks):
        for benchmark in benchmarks.values():
            benchmark["extra_info"]["accuracy"] = None
            del benchmark["extra_info"]["weights"]

    code, printed = compare(change)
    assert code == NOT_WORSE and "3 -> -" in printed
    code, printed = compare(changed(accuracy=None))
    assert code == NOT_COMPARABLE and f"{BLOCK}': extra_info: accuracy: a value is required, there is null" in printed


def test_a_case_that_is_gone_fails_unless_it_is_allowed(compare):
    def remove(benchmarks):
        del benchmarks[BLOCK]

    code, printed = compare(remove)
    assert (
        code == WORSE and f"WORSE {BLOCK} is missing in the new file; if that is intended: --allow-missing" in printed
    )
    code, printed = compare(remove, "--allow-missing")
    assert code == NOT_WORSE and f"{BLOCK} is missing in the new file: allowed" in printed


def test_a_case_that_only_has_figures_in_the_old_file_fails(compare):
    def empty(benchmarks):
        benchmarks[BLOCK]["extra_info"] = {}

    def other(benchmarks):
        benchmarks[BLOCK]["extra_info"] = {"index": 1}

    code, printed = compare(other)
    assert code == NOT_COMPARABLE and f"{BLOCK}: the new file's extra_info has neither mode nor nfe" in printed
    code, printed = compare(empty)
    assert code == WORSE and f"{BLOCK}: the new file has no figures for it, so its run failed" in printed


def test_a_case_with_another_name_is_found_by_its_settings(compare):
    def rename(benchmarks):
        benchmarks[BLOCK]["name"] = f"{BLOCK[:-1]}-low_confidence]"
        benchmarks[BLOCK]["extra_info"]["nfe"] += 1

    code, printed = compare(rename)
    assert f"{BLOCK} is now called {BLOCK[:-1]}-low_confidence]" in printed
    assert code == WORSE and "none more is allowed" in printed


def test_a_new_case_is_told(compare):
    def add(benchmarks):
        benchmarks["more"] = copy.deepcopy(benchmarks[BLOCK]) | {"name": "test_throughput[block-16]"}

    code, printed = compare(add)
    assert code == NOT_WORSE and "test_throughput[block-16] is new: there is nothing to compare it with" in printed


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"rows_sha256": "0"}, "rows_sha256 was "),
        (dict.fromkeys(("rows", "against_vanilla", *BY_SOURCE)) | {"n": 8}, "n was 7, is 8"),
        ({"prompts_version": 99}, "prompts_version was 1, is 99"),
        ({"denoising_steps": 16}, "denoising_steps was 32, is 16"),
        ({"model": "other"}, ", is other"),
        ({"batch_size": 2}, "batch_size was 1, is 2"),
        ({"block_add_threshold": 0.5}, "block_add_threshold was 1.0, is 0.5"),
        ({"suffix_window": 8}, "suffix_window was 0, is 8"),
    ],
)
def test_other_rows_and_settings_are_refused(compare, figures, message):
    code, printed = compare(changed(**figures))
    assert code == NOT_COMPARABLE
    assert printed.startswith(f"compare: these cannot be compared: {BLOCK}: ") and message in printed


def test_a_file_that_does_not_say_which_blocks_were_open_is_of_one_at_a_time(compare, tmp_path):
    old = tmp_path / "old.json"
    content = json.loads(old.read_text())
    for benchmark in content["benchmarks"]:
        for name in PLAIN:
            del benchmark["extra_info"][name]
    old.write_text(json.dumps(content))
    assert compare()[0] == compare(changed(**PLAIN))[0] == NOT_WORSE
    code, printed = compare(changed(**PLAIN | {"block_add_threshold": 0.5}))
    assert code == NOT_COMPARABLE and "block_add_threshold was 1.0, is 0.5" in printed


def test_other_rows_are_refused_where_a_file_has_only_their_ids(compare):
    def change(benchmarks):
        del benchmarks[BLOCK]["extra_info"]["rows_sha256"]
        benchmarks[BLOCK]["extra_info"]["rows"][2][0] = "other"

    code, printed = compare(change)
    assert code == NOT_COMPARABLE and "the rows have other ids" in printed


def test_a_file_without_a_hash_of_its_rows_is_compared_and_it_says_so(compare):
    def change(benchmarks):
        del benchmarks[BLOCK]["extra_info"]["rows_sha256"]

    code, printed = compare(change)
    assert code == NOT_WORSE and "a file does not hold a hash of its rows" in printed


def test_another_machine_leaves_speed_and_memory_unjudged(compare):
    code, printed = compare(changed(gpu="NVIDIA H200", tokens_per_second=0.1))
    assert code == NOT_WORSE and "gpu was None, is NVIDIA H200: tokens/s and memory are not judged" in printed
    code, printed = compare(changed(gpu="NVIDIA H200", nfe=10**6))
    assert code == WORSE
    code, printed = compare(changed(torch="9.9.9", nfe=10**6))
    assert code == WORSE and ", is 9.9.9\n" in printed


def test_a_resumed_run_has_no_speed_to_judge(compare):
    def resume(benchmarks):
        benchmarks[BLOCK]["name"] += RESUMED
        benchmarks[BLOCK]["extra_info"] |= {"tokens_per_second": None, "resumed": 3}

    code, printed = compare(resume)
    assert code == NOT_WORSE and f"{BLOCK}: a resumed run has no speed, so tokens/s is not judged" in printed


def test_a_merged_result_is_of_the_same_rows_as_a_whole_one(make_suite, tmp_path, capsys):
    whole = run(make_suite(), tmp_path / "whole.json", [6, 6])
    shards = [str(run(make_suite(shard=(i, 3)), tmp_path / f"{i}.json", [i, 5 - i])) for i in (1, 2, 3)]
    merge.main([str(tmp_path / "merged.json"), *shards])
    assert main([str(whole), str(tmp_path / "merged.json")]) == NOT_WORSE
    assert "shards was 1, is 3: tokens/s and memory are not judged" in capsys.readouterr().out
    assert main([str(whole), shards[0]]) == NOT_COMPARABLE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a JSON file of pytest-benchmark: Invalid JSON: EOF while parsing"),
        ("[]", "is not a JSON file of pytest-benchmark: an object is expected, got []"),
        ('{"benchmarks": [{}]}', "is not a JSON file of pytest-benchmark: datetime: Field required"),
        (f'{{{DAY}, "benchmarks": [{{"extra_info": {{}}}}]}}', "benchmarks.0.name: Field required"),
        (f'{{{DAY}, "benchmarks": [{{"name": "a", "extra_info": {{}}}}]}}', "holds no figures of pytest evals/"),
        (f'{{{DAY}, "benchmarks": []}}', "holds no figures of pytest evals/"),
    ],
)
def test_files_of_something_else(tmp_path, capsys, text, message):
    path = tmp_path / "out.json"
    path.write_text(text)
    assert main([str(path), str(path)]) == NOT_COMPARABLE
    error = capsys.readouterr().err
    assert error.startswith(f"compare: these cannot be compared: {path}: ") and message in error
    assert main([str(tmp_path / "none.json"), str(path)]) == NOT_COMPARABLE
    assert "none.json: cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--margin", "--max-accuracy-loss"])
@pytest.mark.parametrize("value", ["-1", "nan", "100", "five"])
def test_bad_options(option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["old", "new", option, value])
    assert stopped.value.code == NOT_COMPARABLE
    assert f"argument {option}: must be from 0 to below 100, got {value!r}" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["results.compare", "results.merge", "report.command"])
def test_who_reads_a_run_s_files_does_not_wait_for_torch(module):
    script = f"import sys, evals.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, check=True, timeout=60)
