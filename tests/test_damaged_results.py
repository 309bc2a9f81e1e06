"""A file of --benchmark-json in which one value is damaged, as compare, merge and the report meet it: exit code 2 and a
sentence, or a result that the value does not touch; never a traceback, never "worse"."""

import copy
import json
import math
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evals.report.command import main as report
from evals.results import compare, merge

ROOT = Path(__file__).parent.parent
GONE = object()
DEEP = json.loads("[" * 150 + "]" * 150)
DAMAGED = [GONE, None, math.nan, math.inf, -math.inf, -1, -0.5, 1e-320, 10**300, 10**400, "x", "", "9", True, [], DEEP]
DAMAGED += [{}, [[]], "\ud800"]


@cache
def whole():
    """A file of the suite, whose rows are one shard of one."""
    content = json.loads((ROOT / "evals/baselines/amd-epyc-1-thread.json").read_text())
    content["benchmarks"] = [b for b in content["benchmarks"] if "mode" in b["extra_info"]][:2]
    for benchmark in content["benchmarks"]:
        info = benchmark["extra_info"]
        info["shard"] = {"index": 1, "of": 1, "positions": list(range(info["n"])), "rows": info["rows_sha256"]}
    return content


def paths(value, at=()):
    """Of every value in it; of a long list those in the first two and the last of its items."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, inner) in enumerate(items):
        if isinstance(value, dict) or number in (0, 1, len(value) - 1):
            yield from paths(inner, (*at, key))


def damaged(at, value):
    content = copy.deepcopy(whole())
    *way, last = at
    inner = content
    for key in way:
        inner = inner[key]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(content)


def tell(text):
    # what a traceback ends with stands there too where an exception's repr is all that is told
    return text if len(text.splitlines()) <= 2 and "Error(" not in text else pytest.fail(text)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "whole.json").write_text(json.dumps(whole()))
    return tmp_path


def check(folder, capsys, text):
    """Each command ends well, or names the damage and writes nothing."""
    new, old, out = (str(folder / name) for name in ("new.json", "whole.json", "out"))
    Path(new).write_text(text)
    for command in (
        lambda: compare.main([old, new]),
        lambda: compare.main([new, old]),
        lambda: merge.main([out, new]),
        lambda: report([new, old, "-o", out]),
        lambda: report([old, new, "-o", out]),
    ):
        Path(out).unlink(missing_ok=True)
        code = command()
        printed = capsys.readouterr()
        assert code in (0, 2), printed
        assert bool(tell(printed.err)) == (code == 2)
        assert code == 0 or not Path(out).exists()


# gone, a benchmark is a case that is missing; without figures, one whose run failed
NO_DAMAGE = [("benchmarks", 0), ("benchmarks", 1)]
ALL = [at for at in paths(whole()) if at]


@settings(max_examples=250, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.sampled_from(ALL), value=st.sampled_from(DAMAGED))
def test_a_damaged_value_is_refused_or_is_no_matter(folder, capsys, at, value):
    if (value is GONE and at in NO_DAMAGE) or (value == {} and at[-1] == "extra_info"):
        return
    check(folder, capsys, damaged(at, value))


FIGURES = ["nfe", "accuracy", "tokens_per_second", "n", "seconds", "mode", "rows", "peak_memory_gib", "n_by_source"]


@pytest.mark.parametrize("field", FIGURES)
@pytest.mark.parametrize("value", [math.nan, -1, math.inf, 10**400, "x"])
def test_a_damaged_figure_is_named_by_all_three(folder, capsys, field, value):
    text = damaged(("benchmarks", 1, "extra_info", field), value)
    (folder / "new.json").write_text(text)
    for command in (
        lambda new: compare.main([str(folder / "whole.json"), new]),
        lambda new: merge.main([str(folder / "out"), new]),
        lambda new: report([new, "-o", str(folder / "out")]),
    ):
        if (field, value) == ("mode", "x"):
            continue
        assert command(str(folder / "new.json")) == 2
        assert field in capsys.readouterr().err and not (folder / "out").exists()
