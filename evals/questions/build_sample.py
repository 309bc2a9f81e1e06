"""Rows of the public test sets, drawn into a file that `--dataset` takes.

    python -m evals build-sample --out rows.jsonl [--seed 0] [--per-source 50] [--from DIR]

The sets come from the Hugging Face Hub, or from DIR, where each has a folder named as on the Hub: openai/gsm8k,
HuggingFaceH4/MATH-500, cais/mmlu, Xnhyacinth/LongBench or THUDM/LongBench. A folder holds what the Hub's does, or less:
with `configs:` in its README.md those are followed; without, its test split is a Parquet or JSON lines file with "test"
in its name, in the folder itself or in one named after the config (main, all, hotpotqa). LongBench may also be
hotpotqa.jsonl or data/hotpotqa.jsonl, as in THUDM's archive.

Each row's field `revision` says what it was drawn from: the set's name, then the Hub's commit or, of a local split,
the sha256 of all its rows (JSON lines with sorted keys). It is part of the row, so that it remains when files are cut
or joined, and so that a run of the suite stores the revisions of just the rows that it used.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.files import BadOutput, check_output, number_argument, path_argument, write_output
from evals.questions.rows import Row

if TYPE_CHECKING:
    import datasets

Record = dict[str, Any]

_NUMBER = re.compile(r"-?\d+(\.\d+)?")
# LongBench's own prompt for hotpotqa (its dataset2prompt.json). Xnhyacinth's copy holds each record wrapped in it; with
# the suite's prompt around it again, a model would get two contradicting instructions.
_ORDER = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
_PROMPT = re.compile(
    rf"{re.escape(_ORDER)}\s+The following are given passages\.\n(.*)\n\n{re.escape(_ORDER)}\s*", re.DOTALL
)


@dataclass(frozen=True)
class PublicSet:
    """One published test set: where it is, which of its columns are read, and how a record becomes a row.

    repositories are the names that a local folder may have; the first is the one on the Hub. config is None if the set
    has only one. id_column holds the record's own id; None is for a set without ids, whose index in the split serves.
    convert raises ValueError for a malformed record.
    """

    source: str
    repositories: tuple[str, ...]
    config: str | None
    columns: tuple[str, ...]
    id_column: str | None
    convert: Callable[[Record], Row]


def _gsm8k(record: Record) -> Row:
    question, solution = _text(record, "question"), _text(record, "answer")
    answer = solution.rpartition("####")[2].strip().replace(",", "")
    if "####" not in solution or not _NUMBER.fullmatch(answer):
        raise ValueError(f"field 'answer' must end with '#### ' and a number, got {_short(solution)}")
    return {"question": question, "answer": answer}


def _math500(record: Record) -> Row:
    return {"question": _text(record, "problem"), "answer": _text(record, "answer")}


def _mmlu(record: Record) -> Row:
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"field 'choices' must be a list of 4 strings, got {_short(choices)}")
    # published as 0 to 3; some copies hold the letter
    letter = "ABCD"[answer] if answer in range(4) else answer
    if letter not in ("A", "B", "C", "D"):
        raise ValueError(f"field 'answer' must be a number from 0 to 3 or a letter from A to D, got {_short(answer)}")
    return {"question": _text(record, "question"), "answer": letter, "choices": choices}


def _hotpotqa(record: Record) -> Row:
    answers = record["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError(f"field 'answers' must be a list of strings that are not empty, got {_short(answers)}")
    question, context = _text(record, "question"), _text(record, "context")
    if context.startswith(_ORDER):
        wrapped = _PROMPT.fullmatch(context)
        if not wrapped:
            raise ValueError(
                f"field 'context' begins with LongBench's prompt and must end with it, got {_short(context)}"
            )
        question, context = question.removeprefix("Question: ").removesuffix("\n"), wrapped[1]
    return {"question": question, "answer": answers[0], "context": context, "answers": answers}


SETS = (
    PublicSet("gsm8k", ("openai/gsm8k",), "main", ("question", "answer"), None, _gsm8k),
    PublicSet("math500", ("HuggingFaceH4/MATH-500",), None, ("problem", "answer", "unique_id"), "unique_id", _math500),
    PublicSet("mmlu", ("cais/mmlu",), "all", ("question", "choices", "answer"), None, _mmlu),
    PublicSet(
        "longbench_hotpotqa",
        ("Xnhyacinth/LongBench", "THUDM/LongBench"),
        "hotpotqa",
        ("question", "context", "answers", "_id"),
        "_id",
        _hotpotqa,
    ),
)


def build(per_source: int, seed: int, folder: Path | None = None) -> list[Row]:
    """`per_source` rows of every set, one of each in turn; from the Hub, or from `folder`, laid out as above.

    A smaller per_source gives the first of a larger one's rows. Raises ImportError without the library `datasets`,
    ValueError for a set that cannot be read, has too few rows, lacks a column, or holds a malformed record among those
    drawn.
    """
    try:
        importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(f"drawing rows needs datasets: pip install 'blockinfer[test]' ({error})") from error
    drawn = [_draw(public, per_source, seed, folder) for public in SETS]
    return [row for one_of_each in zip(*drawn, strict=True) for row in one_of_each]


def _draw(public: PublicSet, number: int, seed: int, folder: Path | None) -> list[Row]:
    name, records, revision = _read(public, folder)
    if len(records) < number:
        raise ValueError(f"{name}: {number} rows were asked for, its test split has {len(records)}")
    missing = [column for column in public.columns if column not in records[0]]
    if missing:
        raise ValueError(f"{name}: there is no column {missing[0]!r} among {', '.join(records[0])}")
    # of random's methods, only random() is promised to give the same numbers in every version of Python
    rng = random.Random(f"{seed}/{public.source}")
    order = sorted(range(len(records)), key=lambda _: rng.random())
    rows = []
    for index in order[:number]:
        try:
            own_id = _text(records[index], public.id_column) if public.id_column else f"test-{index:05d}"
            row = {"id": f"{public.source}-{own_id}", "source": public.source} | public.convert(records[index])
        except ValueError as error:
            raise ValueError(f"{name}: row {index} of the test split, counted from 0: {error}") from error
        rows.append(row | {"revision": f"{name}@{revision}"})
    (row_id, times), *_ = Counter(row["id"] for row in rows).most_common(1)
    if times > 1:
        raise ValueError(f"{name}: {times} rows drawn have the same field {public.id_column!r}: {row_id!r}")
    return rows


def _read(public: PublicSet, folder: Path | None) -> tuple[str, list[Record], str]:
    """The set's name, the records of its test split, and its revision."""
    name = public.repositories[0]
    if folder:
        name = next((name for name in public.repositories if (folder / name).is_dir()), None)
        if name is None:
            names = " or ".join(str(folder / name) for name in public.repositories)
            raise ValueError(f"{public.source}: there is no folder {names}")
    # local folders are read anew each time, and nothing is cached
    with tempfile.TemporaryDirectory() as cache:
        try:
            builder = (
                _local_builder(folder / name, public.config, cache) if folder else _hub_builder(name, public.config)
            )
            builder.download_and_prepare()
            records = builder.as_dataset(split="test").to_list()
        # errors of the library, and of the libraries below it, have no common base
        except Exception as error:
            raise ValueError(_not_loaded(name, public.config, folder, error)) from error
    if folder:
        lines = "".join(json.dumps(record, sort_keys=True, default=str) + "\n" for record in records)
        revision = "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
    else:
        revision = builder.hash
    for record in records:
        if public.source == "longbench_hotpotqa" and "input" in record:
            record.setdefault("question", record["input"])
    return name, records, revision


def _hub_builder(name: str, config: str | None) -> "datasets.DatasetBuilder":
    """Its `hash` is the commit, also if an earlier download is read because the Hub cannot be reached."""
    import datasets

    # with the bare name, a folder of that name in the working directory would take precedence
    return datasets.load_dataset_builder(f"hf://datasets/{name}", config)


def _local_builder(folder: Path, config: str | None, cache: str) -> "datasets.DatasetBuilder":
    import datasets

    for file in (folder / f"{config}.jsonl", folder / "data" / f"{config}.jsonl"):
        if file.is_file():
            return datasets.load_dataset_builder("json", data_files={"test": str(file)}, cache_dir=cache)
    inner = folder / config if config and (folder / config).is_dir() else folder
    # without `configs:` in a README.md the library knows one config, "default", of all files
    if datasets.get_dataset_config_names(str(folder)) == ["default"]:
        return datasets.load_dataset_builder(str(inner), cache_dir=cache)
    return datasets.load_dataset_builder(str(folder), config, cache_dir=cache)


def _not_loaded(name: str, config: str | None, folder: Path | None, error: Exception) -> str:
    # if generating fails, the reason is the cause of the error
    reasons = [f"{type(e).__name__}: {' '.join(str(e).split())}" for e in (error, error.__cause__) if e]
    reason = "; ".join(dict.fromkeys(reasons))
    wanted = "the split test" + (f" of config {config}" if config else "")
    if folder:
        return f"{name}: {wanted} could not be read from {folder / name}: {reason}"
    way_out = f"With a copy of the set in DIR/{name}, pass --from DIR"
    return f"{name}: {wanted} could not be loaded from the Hugging Face Hub: {reason}. {way_out}"


def _text(record: Record, field: str) -> str:
    value = record[field]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {field!r} must be a string that is not empty, got {_short(value)}")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:48]} ... {text[-48:]}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m evals build-sample", description="Draw rows of the public test sets."
    )
    made.add_argument("--out", required=True, type=path_argument, help="the file to write, JSON lines")
    made.add_argument("--seed", type=int, default=0, help="which rows are drawn (0)")
    made.add_argument("--per-source", type=number_argument(1), default=50, help="rows of each set (50)")
    made.add_argument(
        "--from", type=path_argument, dest="folder", metavar="DIR", help="local copies of the sets (the Hub)"
    )
    return made


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.folder and not os.path.isdir(options.folder):
        parser().error(f"--from must be a folder, got {str(options.folder)!r}")
    try:
        check_output(options.out, [options.folder] if options.folder else [])
    except BadOutput as error:
        parser().error(f"--out: {error}")
    try:
        rows = build(options.per_source, options.seed, options.folder)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_output(options.out, lines)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"build_sample: {error}")
    revisions = "\n".join(dict.fromkeys(f"  {row['revision']}" for row in rows))
    print(f"{len(rows)} rows written to {options.out}, drawn with seed {options.seed} from\n{revisions}")
