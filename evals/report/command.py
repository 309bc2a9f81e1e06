"""The command line of the report."""

import argparse
import sys
from collections.abc import Sequence

from evals.files import check_output, path_argument, show, write_output
from evals.report.page import render
from evals.results.reader import read_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; 0, or 2 with one line on stderr where a file cannot be read, understood or written."""
    parser = argparse.ArgumentParser(
        prog="python -m evals report", description="One self-contained HTML page from a run of the suite."
    )
    add = parser.add_argument
    add("results", type=path_argument, help="the file of pytest evals/ --benchmark-json=FILE")
    add("history", type=path_argument, nargs="*", help="such files of earlier runs, in any order")
    add("-o", "--output", type=path_argument, default="report.html", help="the page (report.html)")
    given = parser.parse_intermixed_args(arguments)
    try:
        check_output(given.output, [given.results, *given.history])
        page = render(read_run(given.results), [read_run(path) for path in given.history])
        write_output(given.output, page.encode("utf-8", "replace"))
    except ValueError as error:
        # names come from files
        show(str(error).replace("\n", " "), sys.stderr)
        return 2
    show(f"written to {given.output}", sys.stdout)
    return 0
