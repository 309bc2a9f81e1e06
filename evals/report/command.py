"""The command line of the report."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.files import check_output, path_argument, show, write_output
from evals.report.page import Found, render
from evals.results.reader import BadFile, StoredRun, read_run
from evals.results.samples import beside, of_run, read_samples


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page. -> 0, or 2 with one line on stderr if a file cannot be read, understood or written."""
    parser = argparse.ArgumentParser(
        prog="python -m evals report", description="One self-contained HTML page from a run of the suite."
    )
    add = parser.add_argument
    add("results", type=path_argument, help="the file of pytest evals/ --benchmark-json=FILE")
    add("history", type=path_argument, nargs="*", default=[], help="such files of earlier runs, in any order")
    add(
        "--samples",
        type=path_argument,
        action="append",
        metavar="FILE",
        help="the answers, a file of the run's --samples; of merged shards one each (samples.jsonl beside the results)",
    )
    add("-o", "--output", type=path_argument, default="report.html", help="the page (report.html)")
    given = parser.parse_intermixed_args(arguments)
    try:
        run = read_run(given.results)
        samples = given.samples or beside(given.results, run)
        check_output(given.output, [given.results, *given.history, *samples])
        found = _found(samples, run, is_named=given.samples is not None)
        page = render(run, [read_run(path) for path in given.history], found)
        write_output(given.output, page.encode("utf-8", "replace"))
    except ValueError as error:
        # names come from files
        show(str(error).replace("\n", " "), sys.stderr)
        return 2
    if found.note:
        show(found.note, sys.stdout)
    show(f"written to {given.output}", sys.stdout)
    return 0


def _found(paths: list[Path], run: StoredRun, is_named: bool) -> Found:
    """The run's answers. Raises ValueError if files that were named are of another run; for others this is only
    reported."""
    file = ", ".join(path.name for path in paths)
    is_random = any(c.weights == "random" for c in run.configurations)
    if not paths or (is_random and not is_named):
        return Found()
    try:
        return Found(of_run([sample for path in paths for sample in read_samples(path)], run.configurations), file)
    except ValueError as error:
        said = str(error) if isinstance(error, BadFile) else f"{file}: {error}"
        if is_named:
            raise ValueError(said) from error
        return Found(note=f"The answers are not shown: {said}")
