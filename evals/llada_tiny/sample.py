"""Write the repository's evaluation rows: 50 held-out problems of each source, interleaved.

python -m evals sample-tiny sample_200.jsonl
"""

import argparse
import json
import random
from collections.abc import Sequence

from evals.files import BadOutput, path_argument, write_output
from evals.llada_tiny.problems import SOURCES, problem

SEED = 200
ROWS_PER_SOURCE = 50
FIELDS = ("id", "source", "question", "answer", "choices", "context", "answers")


def sample_rows() -> list[dict]:
    """The rows with their solutions, no question twice."""
    rng = random.Random(SEED)
    seen: set[tuple] = set()
    rows = []
    for number in range(ROWS_PER_SOURCE):
        for source in SOURCES:
            while True:
                row = problem(source, rng, "heldout")
                key = (row["question"], row.get("context"), tuple(sorted(row.get("choices", ()))))
                if key not in seen:
                    break
            seen.add(key)
            rows.append({"id": f"{source}-{number:03d}", **row})
    return rows


def sample_text() -> str:
    """The file's contents, one JSON object a line."""
    return "".join(json.dumps({field: row[field] for field in FIELDS if field in row}) + "\n" for row in sample_rows())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m evals sample-tiny", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=path_argument)
    try:
        write_output(parser.parse_args(argv).path, sample_text())
    except BadOutput as error:
        parser.error(str(error))
