"""The file of `--samples`: a line for each answer, with the prompt, what the grader extracted, and its grade.

A line is written as its answer comes, and again with the grade when its configuration is finished: judging at once
would add to the time that is measured. lm-eval's `--log_samples` is the model.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from evals.files import BadOutput, StrPath, check_target, locked, read_bytes, samples_name
from evals.results.reader import BadFile, StoredRun
from evals.results.schema import Configuration, Count, Flag, Number, Text
from evals.runs.configurations import variant

if TYPE_CHECKING:  # code that only reads needs no torch
    from blockinfer import RequestOutput
    from evals.questions.graders import Grade
    from evals.runs.run import Run
    from evals.runs.settings import Case

# what identifies a line, also one of another version
_KNOWN = {"id", "text", "gold", "forwards"}


class Sample(BaseModel):
    """A line. The configuration is mode, block_length (the requested one), unmasking and variant: the part of the
    test's id for options that are not at their defaults, missing in older files. prompt is what the model got; tokens
    the positions before the first stop token, forwards those that the request took part in. Without a grade, extracted,
    correct and score are None; with one, extracted is None if the grader found no answer."""

    model_config = ConfigDict(frozen=True)

    id: Text
    source: Text
    mode: Text
    block_length: Count
    unmasking: Text
    variant: Text = ""
    prompt: Text
    text: Text
    extracted: Text | None
    gold: Text | tuple[Text, ...]
    correct: Flag | None
    score: Number | None
    tokens: Count
    forwards: Count
    finish_reason: Text | None

    @property
    def configuration(self) -> tuple[str, int, str, str]:
        return self.mode, self.block_length, self.unmasking, self.variant


class Samples:
    """The file while it is written, locked for this run. It is begun anew with the first answer: until then an earlier
    run's file stays."""

    def __init__(self, path: StrPath) -> None:
        """Raises ValueError for a file that cannot be written, that another run is writing, or that holds something
        else."""
        self.path = os.fspath(path)
        # the number of graded lines that could not be written, and why the last of them could not
        self.lost, self.reason = 0, ""
        self._begun = False
        # up to where the file is final, and the lines after it that are to be written again
        self._end = 0
        self._open: dict[Case, list[bytes]] = defaultdict(list)
        try:
            self._file = locked(check_target(path))
            with open(self.path, "rb") as file:
                first = file.readline()
            if first and not _is_ours(first):
                self._file.close()
                raise ValueError("it holds something else than answers of the suite: name another file")
        except BadOutput as error:
            raise ValueError(f"--samples: {error}") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"--samples {path}: {getattr(error, 'strerror', None) or error}") from None

    def __enter__(self) -> "Samples":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, case: "Case", row: dict[str, Any], prompt: str, output: "RequestOutput") -> None:
        """Writes an answer without its grade. A failure is reported by `settle`, which writes it again."""
        line = _line(case, row, prompt, output, None)
        self._open[case].append(line)
        try:
            if not self._begun:
                self._file.truncate(0)
                self._begun = True
            self._file.write(line)
        except OSError:
            pass

    def settle(self, run: "Run", rows: list[dict[str, Any]], prompts: list[str]) -> None:
        """Replaces the answers that were added by the run's answers with their grades, in the rows' order."""
        self._open.pop(run.case, None)
        grades = run.grades or [None] * len(rows)
        lines = [_line(run.case, *of) for of in zip(rows, prompts, run.outputs, grades, strict=True)]
        rest = [line for others in self._open.values() for line in others]
        try:
            if not os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                raise OSError("it was removed while the run wrote to it")
            self._file.truncate(self._end)
            left = memoryview(b"".join(lines + rest))
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.lost, self.reason = self.lost + len(lines), error.strerror or str(error)
        else:
            self._begun, self._end = True, self._end + sum(map(len, lines))

    def told_lost(self) -> str:
        return f"--samples {self.path}: {self.lost} answers could not be written: {self.reason}"


def _is_ours(line: bytes) -> bool:
    try:
        fields = from_json(line)
    except ValueError:
        return False
    return isinstance(fields, dict) and fields.keys() >= _KNOWN


def _line(case: "Case", row: dict[str, Any], prompt: str, output: "RequestOutput", grade: "Grade | None") -> bytes:
    completion = output.outputs[0]
    fields = {
        "id": row["id"],
        "source": row["source"],
        "mode": case.mode,
        "block_length": case.block_length,
        "unmasking": case.unmasking,
        "variant": variant(case.params),
        "prompt": prompt,
        "text": completion.text,
        "extracted": grade.extracted if grade else None,
        "gold": row.get("answers") or row["answer"],
        "correct": grade.correct if grade else None,
        "score": grade.score if grade else None,
        "tokens": len(completion.token_ids),
        "forwards": output.metrics.nfe,
        "finish_reason": completion.finish_reason,
    }
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"


def read_samples(path: StrPath) -> list[Sample]:
    """Ignores a last line that a kill has cut short. Raises BadFile, naming the line."""
    try:
        *lines, _ = read_bytes(path).split(b"\n")
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(Sample.model_validate(from_json(line)))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise BadFile(f"{path}: line {number} is no answer of the suite: {where}: {first['msg']}") from error
        except ValueError as error:
            raise BadFile(f"{path}: line {number} is no answer of the suite: {error}") from error
    return found


def beside(results: StrPath, run: StoredRun) -> list[Path]:
    """The files that the suite writes beside its results by default, as far as they exist."""
    first = run.configurations[0]
    names = [samples_name(None)]
    if first.shard is not None:
        names = [samples_name((first.shard.index, first.shard.of))]
    elif first.shards > 1:
        names = [samples_name((index, first.shards)) for index in range(1, first.shards + 1)]
    found = [Path(results).parent / name for name in names]
    return [path for path in found if path.is_file()]


def of_run(samples: Iterable[Sample], run: list[Configuration]) -> list[dict[str, Sample]]:
    """For each of the run's configurations its graded answers, by row id; none for one that the samples lack.

    Raises ValueError if there are none, or if they are of another run: other rows, tokens, forwards or grades.
    """
    by_configuration: dict[tuple, dict[str, Sample]] = defaultdict(dict)
    for sample in samples:
        if sample.correct is not None:
            by_configuration[sample.configuration][sample.id] = sample
    found = [by_configuration.get((c.mode, c.asked_block_length, c.unmasking, variant(c)), {}) for c in run]
    for c, answers in zip(run, found, strict=True):
        stored = {row[0]: row[1:] for row in c.rows or ()}
        for one in answers.values() if c.rows is not None else ():
            if stored.get(one.id) != (one.tokens, one.forwards, one.correct):
                raise ValueError(f"they are of another run: {c.mode} answered the row {one.id!r:.80} otherwise")
    if not any(found):
        raise ValueError("none of them is a graded answer of one of its configurations")
    return found
