"""A report of hundreds of configurations, whose labels, baselines and histories are found without trying all pairs."""

import sys

from evals.report.page import render
from evals.results.reader import read_run
from tests.report.sample import info, results, write


def calls(folder, number):
    """Of functions, to make the page of so many configurations, each twice measured."""
    runs = []
    for day in range(2):
        infos = [info("block", block_length=32, accuracy=0.3 + (7 * i + day) % 60 / 100) for i in range(number)]
        for i, one in enumerate(infos):
            one |= {"block_length": 1 + i, "tokens_per_second": 10 + 13 * i % 97, "denoising_steps": 1}
            one |= {"rows": None, "unmasking": f"rule {i}"}
        runs.append(read_run(write(folder / f"{day}.json", results(infos, day))))
    made = 0

    def count(frame, event, argument):
        nonlocal made
        made += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        render(runs[1], runs[:1])
    finally:
        sys.setprofile(before)
    return made


def test_no_pairs_are_tried(tmp_path):
    # 3.2 million; 28 million where every label was tried against every mark
    assert calls(tmp_path, 200) < 5_000_000
