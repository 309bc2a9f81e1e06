"""The rows that are evaluated: read from JSON lines, every field checked, and turned into prompts."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from evals.files import read_bytes
from evals.questions.prompts import messages

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

    from blockinfer.chat import ChatTemplate

SOURCES = ("gsm8k", "math500", "mmlu", "longbench_hotpotqa")

Row = dict[str, Any]


def load_rows(
    path: str | Path, sources: list[str] | None = None, skip: int = 0, number: int | None = None
) -> list[Row]:
    """The rows of `path` from the given sources (None is all), without the first `skip`, at most `number`.

    A line is an object with id, source, question, answer; mmlu rows also have choices (a list, the answer a letter),
    longbench_hotpotqa rows context and answers. A row drawn by evals.questions.build_sample has its set's revision as
    well. The public form is read too: no id, choices a JSON string ("" for none), mmlu's answer an index, no context
    and answers.

    Raises ValueError for a file that cannot be read, a malformed row (file, line, field) and when no row is left.
    """
    unknown = sorted(set(sources or ()) - set(SOURCES))
    if unknown:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {unknown[0]!r}")
    try:
        # editors on Windows begin a file with a byte order mark
        lines = read_bytes(path).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"the dataset {str(path)!r} cannot be read: {reason}") from error
    rows = {i: _row(line, f"{path}:{i}", i) for i, line in enumerate(lines, 1) if line.strip()}
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    line_of: dict[str, int] = {}
    for i, row in rows.items():
        first = line_of.setdefault(row["id"], i)
        if first != i:
            raise ValueError(f"{path}:{i}: the id {row['id']!r} is that of line {first} too")
    kept = [row for row in rows.values() if not sources or row["source"] in sources][skip:][:number]
    if not kept:
        chosen = ", ".join(sources) if sources else "all sources"
        raise ValueError(f"{path}: of {len(rows)} rows none is left ({chosen}, the first {skip} left out)")
    return kept


def rows_hash(rows: list[Row]) -> str:
    """Two lists of rows with the same one hold the same rows, word for word."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def shard_positions(rows: list[Row], index: int, of: int) -> list[int]:
    """The positions of the rows of shard `index` of `of`, from 1: every `of`-th row of each source.

    Rows often alternate between sources, so a stride over all of them would give a shard some sources and not others.
    """
    by_source = sorted(range(len(rows)), key=lambda i: rows[i]["source"])
    return sorted(by_source[index - 1 :: of])


def _row(line: str, where: str, number: int) -> Row:
    row = _parse(line, where)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON object is expected, got {type(row).__name__}")
    row.setdefault("id", f"row-{number}")
    if isinstance(row.get("choices"), str):
        row["choices"] = _choices(row["choices"], where)
    for field in ("id", "source", "question", "answer"):
        if isinstance(row.get(field), int | float) and field == "answer" and not isinstance(row["answer"], bool):
            if not abs(row[field]) < 1e300:
                raise ValueError(f"{where}: field 'answer' must be a number below 1e300, got {row[field]!r:.60}")
            row[field] = str(row[field])
        if not isinstance(row.get(field), str) or not row[field].strip():
            got = f"{row.get(field)!r:.200}"
            raise ValueError(f"{where}: field {field!r} must be a string that is not empty, got {got}")
    if row["source"] not in SOURCES:
        raise ValueError(f"{where}: field 'source' must be one of {', '.join(SOURCES)}, got {row['source']!r}")
    if not isinstance(row.get("revision", ""), str):
        raise ValueError(f"{where}: field 'revision' must be a string, got {row['revision']!r}")
    if row["source"] == "gsm8k" and not any(character.isdigit() for character in row["answer"]):
        raise ValueError(f"{where}: field 'answer' of a gsm8k row must be a number, got {row['answer']!r}")
    if row["source"] == "mmlu":
        _check_choices(row, where)
    if row["source"] == "longbench_hotpotqa":
        row.setdefault("answers", [row["answer"]])
        row.setdefault("context", "")
        if not isinstance(row["context"], str):
            raise ValueError(f"{where}: field 'context' must be a string, got {type(row['context']).__name__}")
        if not _is_strings(row["answers"]):
            raise ValueError(f"{where}: field 'answers' must be a list of strings, got {row['answers']!r}")
    return row


def _parse(text: str, where: str) -> Any:
    """Raises ValueError also for what is nested too deeply, and where a string holds half a character."""
    try:
        return from_json(text)
    except ValueError as error:
        half = "a string holds a lone surrogate, half a character" if "hex escape" in str(error) else "not valid JSON"
        raise ValueError(f"{where}: {half}: {error}") from error


def _choices(text: str, where: str) -> list[str] | None:
    return _parse(text, f"{where}: field 'choices' is no JSON list") if text else None


def _check_choices(row: Row, where: str) -> None:
    choices = row.get("choices")
    if not _is_strings(choices) or len(choices) != 4:
        raise ValueError(f"{where}: field 'choices' must be a list of 4 strings, got {choices!r}")
    row["answer"] = {"0": "A", "1": "B", "2": "C", "3": "D"}.get(row["answer"], row["answer"])
    if row["answer"] not in ("A", "B", "C", "D"):
        raise ValueError(f"{where}: field 'answer' must be a letter from A to D, got {row['answer']!r}")


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, str) for item in value)


def encode(row: Row, tokenizer: "PreTrainedTokenizerBase", limit: int) -> tuple[list[int], bool]:
    """The row's prompt as at most `limit` token ids, and whether its context was cut in the middle to fit.

    Raises ValueError where the prompt is too long even without its context.
    """
    token_ids = _apply_template(row, tokenizer)
    context = tokenizer.encode(row.get("context") or "", add_special_tokens=False)
    keep = len(context)
    was_cut = len(token_ids) > limit
    while len(token_ids) > limit:
        keep -= len(token_ids) - limit
        if keep <= 0:
            raise ValueError(f"row {row['id']}: its prompt has {len(token_ids)} tokens, more than the {limit} that fit")
        # as LongBench does: the middle goes, the beginning and the end stay
        head, tail = context[: keep // 2], context[len(context) - (keep - keep // 2) :]
        shorter = row | {"context": tokenizer.decode(head) + tokenizer.decode(tail)}
        token_ids = _apply_template(shorter, tokenizer)
    return token_ids, was_cut


def _apply_template(row: Row, tokenizer: "PreTrainedTokenizerBase", begun: str = "") -> list[int]:
    """Through the chat template; a checkpoint without one, as a base model, gets the bare text. begun: an answer."""
    conversation = messages(row)
    if not tokenizer.chat_template:
        return tokenizer.encode(
            "\n\n".join([*(message["content"] for message in conversation), *[begun] * bool(begun)])
        )
    return tokenizer.encode(_chat_template(tokenizer).render(conversation) + begun, add_special_tokens=False)


def encode_for_letter(row: Row, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """A four-choice row's prompt and the answer's beginning, behind which the letter stands: " A" to " D"."""
    return _apply_template(row, tokenizer, "The answer is")


@lru_cache(maxsize=1)
def _chat_template(tokenizer: "PreTrainedTokenizerBase") -> "ChatTemplate":
    """One for all rows: it is a program of the checkpoint's, and starts a process to run in."""
    from blockinfer.chat import ChatTemplate  # who only reads rows needs no transformers

    return ChatTemplate(tokenizer)
