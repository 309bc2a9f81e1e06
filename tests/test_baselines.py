"""The files of evals/baselines: named after their devices, of today's rows and settings, and no one's machine."""

import json
from pathlib import Path

import pytest

from evals.results.compare import NOT_WORSE, differences, main
from evals.results.reader import read_run
from evals.results.record import question
from evals.runs.configurations import is_configuration
from evals.runs.machine import slug
from evals.runs.settings import read_settings

BASELINES = sorted((Path(__file__).parent.parent / "evals" / "baselines").glob("*.json"))


@pytest.fixture(params=BASELINES, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_there_is_one():
    assert BASELINES


def test_it_names_its_device_and_nothing_else_of_the_machine(path):
    text = path.read_text()
    content = json.loads(text)
    assert slug(content["machine_info"]["device"]) == path.stem
    assert content["machine_info"].keys() == {"device", "torch", "cuda"}
    assert not content["commit_info"]["dirty"]
    assert "/home/" not in text and "/root/" not in text and "/tmp/" not in text and len(text) < 300_000


def test_it_is_of_what_the_suite_measures_by_default(path, pytestconfig, monkeypatch):
    """Else nothing can be compared with it: make it anew."""
    benchmarks = json.loads(path.read_text())["benchmarks"]
    found = {b["name"]: b["extra_info"] for b in benchmarks if is_configuration(b["extra_info"])}
    if any(info["device"] != "cpu" for info in found.values()):
        pytest.skip("the defaults are those of a CPU")
    monkeypatch.setattr(pytestconfig.option, "device", "cpu")
    settings = read_settings(pytestconfig)
    assert list(found) == [f"test_throughput[{c.mode}-{c.block_length}]" for c in settings.cases]
    for case, info in zip(settings.cases, found.values(), strict=True):
        assert differences(info, question(case, settings, 0, {"model": "evals/llada_tiny", "dtype": "float32"})) == []


def test_compare_and_report_read_it(path):
    assert main([str(path), str(path)]) == NOT_WORSE
    assert len(read_run(path).configurations) >= 6
