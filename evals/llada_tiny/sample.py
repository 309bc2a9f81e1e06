"""Write held-out problems of the small model, as many of each source, interleaved.

python -m evals sample-tiny sample_200.jsonl # the repository's rows: 50 of each
python -m evals sample-tiny rows.jsonl --per-source 200 --seed 7 # others
"""

import argparse
import json
import random
from collections.abc import Sequence

from evals.files import BadOutput, number_argument, path_argument, write_output
from evals.llada_tiny.problems import SOURCES, problem

SEED = 200
ROWS_PER_SOURCE = 50
FIELDS = ("id", "source", "question", "answer", "choices", "context", "answers")


def sample_rows(per_source: int = ROWS_PER_SOURCE, seed: int = SEED) -> list[dict]:
    """The rows with their solutions, no question twice."""
    rng = random.Random(seed)
    seen: set[tuple] = set()
    rows = []
    for number in range(per_source):
        for source in SOURCES:
            while True:
                row = problem(source, rng, "heldout")
                key = (row["question"], row.get("context"), tuple(sorted(row.get("choices", ()))))
                if key not in seen:
                    break
            seen.add(key)
            rows.append({"id": f"{source}-{number:03d}", **row})
    return rows


def sample_text(per_source: int = ROWS_PER_SOURCE, seed: int = SEED) -> str:
    """The file's contents, one JSON object a line."""
    rows = sample_rows(per_source, seed)
    return "".join(json.dumps({field: row[field] for field in FIELDS if field in row}) + "\n" for row in rows)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m evals sample-tiny", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=path_argument)
    # so many, all different, the smallest of the four has at least
    number = number_argument(1, int, 250)
    parser.add_argument(
        "--per-source", type=number, default=ROWS_PER_SOURCE, help=f"problems a source ({ROWS_PER_SOURCE})"
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"other problems ({SEED} are those of sample_200.jsonl)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        write_output(args.path, sample_text(args.per_source, args.seed))
    except BadOutput as error:
        parser.error(str(error))
