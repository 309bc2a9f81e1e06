"""The command line of the report."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.report.page import render
from evals.report.results import BadFile, read_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; 0, or 2 with one line on stderr where a file cannot be read, understood or written."""
    parser = argparse.ArgumentParser(
        prog="python -m evals.report", description="One self-contained HTML page from a run of the suite."
    )
    parser.add_argument("results", type=Path, help="the file of pytest evals/ --benchmark-json=FILE")
    parser.add_argument("history", type=Path, nargs="*", help="such files of earlier runs, in any order")
    parser.add_argument("-o", "--output", type=Path, default="report.html", help="the page (report.html)")
    given = parser.parse_intermixed_args(arguments)
    try:
        if any(given.output.resolve() == path.resolve() for path in (given.results, *given.history)):
            raise BadFile(f"{given.output}: is read for this page and cannot be its output too; choose another -o")
        page = render(read_run(given.results), [read_run(path) for path in given.history])
        given.output.write_bytes(page.encode("utf-8", "replace"))
    except BadFile as error:
        return _failed(str(error))
    except OSError as error:
        return _failed(f"{given.output}: cannot be written: {error.strerror}")
    print(f"written to {given.output}")
    return 0


def _failed(message: str) -> int:
    # names come from files: neither line breaks nor a terminal's escape codes
    print("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in message), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
