"""The rows that are evaluated: read from JSON lines, every field checked, and turned into prompts."""

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from evals.files import read_bytes
from evals.questions.prompts import messages
from evals.questions.sources import FUNCTION, GRADERS, LETTERS, SOURCE, SOURCES, grader_of

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

    from blockinfer.chat import ChatTemplate

Row = dict[str, Any]
Ask = Callable[[Row], list[dict[str, str]]]  # a row's conversation


def load_rows(
    path: str | Path, sources: list[str] | None = None, skip: int = 0, number: int | None = None
) -> list[Row]:
    """The rows of `path` from the given sources (None means all), without the first `skip`, at most `number`.

    A line is an object with id, source, question, answer; mmlu rows also have choices (a list, the answer a letter),
    longbench_hotpotqa rows context and answers. A row drawn by evals.questions.build_sample has its set's revision as
    well. The public form is read too: no id, choices a JSON string ("" for none), mmlu's answer an index, no context
    and answers. Rows of any other source name their grader: `number`, `math`, `choice` (which needs choices), `squad`,
    or a function's path, which is not imported here.

    Raises ValueError for a file that cannot be read, a malformed row (file, line, field) and if no row is left.
    """
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
    known = dict.fromkeys([*SOURCES, *(row["source"] for row in rows.values())])
    unknown = [source for source in sources or () if source not in known]
    if unknown:
        raise ValueError(f"source must be one of {', '.join(known)}, got {unknown[0]!r}")
    kept = [row for row in rows.values() if not sources or row["source"] in sources][skip:][:number]
    if not kept:
        chosen = ", ".join(sources) if sources else "all sources"
        raise ValueError(f"{path}: of {len(rows)} rows none is left ({chosen}, the first {skip} left out)")
    return kept


def rows_hash(rows: list[Row]) -> str:
    """Lists of rows with the same hash hold the same rows, word for word."""
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
    _check_grader(row, where)
    grader = grader_of(row)
    if not isinstance(row.get("revision", ""), str):
        raise ValueError(f"{where}: field 'revision' must be a string, got {row['revision']!r}")
    if grader == "number" and not any(character.isdigit() for character in row["answer"]):
        raise ValueError(f"{where}: field 'answer' of a {row['source']} row must be a number, got {row['answer']!r}")
    is_own = row["source"] not in SOURCES
    if grader == "choice" or (is_own and row.get("choices") is not None):
        _check_choices(row, where)
    if grader == "choice":
        _check_letter(row, where)
    if grader == "squad":
        row.setdefault("answers", [row["answer"]])
        row.setdefault("context", "")
    if grader == "squad" or is_own:
        if not isinstance(row.get("context", ""), str):
            raise ValueError(f"{where}: field 'context' must be a string, got {type(row['context']).__name__}")
        if not _is_strings(row.get("answers", [row["answer"]])):
            raise ValueError(f"{where}: field 'answers' must be a list of strings, got {row['answers']!r}")
    return row


def _parse(text: str, where: str) -> Any:
    """Raises ValueError also for JSON nested too deeply, and if a string holds half a character."""
    try:
        return from_json(text)
    except ValueError as error:
        half = "a string holds a lone surrogate, half a character" if "hex escape" in str(error) else "not valid JSON"
        raise ValueError(f"{where}: {half}: {error}") from error


def _choices(text: str, where: str) -> list[str] | None:
    return _parse(text, f"{where}: field 'choices' is not a JSON list") if text else None


def _check_grader(row: Row, where: str) -> None:
    source, grader = row["source"], row.get("grader")
    own = SOURCES.get(source)
    if own is not None and grader not in (None, own):
        got = f"got {grader!r:.100}; with a source of another name any grader may be named"
        raise ValueError(f"{where}: field 'grader' of a {source} row must be left out or {own!r}, {got}")
    if own is None and grader is None:
        got = f"or the row name its grader in a field 'grader', got {source!r:.100}"
        raise ValueError(f"{where}: field 'source' must be one of {', '.join(SOURCES)}, {got}")
    if not SOURCE.fullmatch(source) or source == "all":
        rule = "at most 60 letters, digits or ._+/-, and not 'all', which is what all rows are called"
        raise ValueError(f"{where}: field 'source' must be {rule}, got {source!r:.100}")
    if own is None and grader not in GRADERS and not (isinstance(grader, str) and FUNCTION.fullmatch(grader)):
        known = f"one of {', '.join(GRADERS)}, or a function as package.module:function"
        raise ValueError(f"{where}: field 'grader' must be {known}, got {grader!r:.100}")


def _check_choices(row: Row, where: str) -> None:
    choices = row.get("choices")
    if not _is_strings(choices) or not 2 <= len(choices) <= len(LETTERS):
        number = f"a list of 2 to {len(LETTERS)} strings"
        raise ValueError(f"{where}: field 'choices' must be {number}, got {choices!r:.200}")


def _check_letter(row: Row, where: str) -> None:
    """A letter, or the index of one."""
    letters = LETTERS[: len(row["choices"])]
    row["answer"] = {str(i): letter for i, letter in enumerate(letters)}.get(row["answer"], row["answer"])
    if row["answer"] not in tuple(letters):
        raise ValueError(f"{where}: field 'answer' must be a letter from A to {letters[-1]}, got {row['answer']!r}")


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, str) for item in value)


def encode(row: Row, tokenizer: "PreTrainedTokenizerBase", limit: int, ask: Ask = messages) -> tuple[list[int], bool]:
    """The row's prompt as at most `limit` token ids, and whether its context was cut in the middle to fit.

    Raises ValueError if the prompt is too long even without its context.
    """
    token_ids = _apply_template(ask(row), tokenizer)
    context = tokenizer.encode(row.get("context") or "", add_special_tokens=False)
    keep = len(context)
    was_cut = len(token_ids) > limit
    while len(token_ids) > limit:
        keep -= len(token_ids) - limit
        if keep <= 0:
            raise ValueError(f"row {row['id']}: its prompt has {len(token_ids)} tokens, more than the {limit} that fit")
        # as LongBench does: the middle is cut, the beginning and the end stay
        head, tail = context[: keep // 2], context[len(context) - (keep - keep // 2) :]
        shorter = row | {"context": tokenizer.decode(head) + tokenizer.decode(tail)}
        token_ids = _apply_template(ask(shorter), tokenizer)
    return token_ids, was_cut


def _apply_template(
    conversation: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase", begun: str = ""
) -> list[int]:
    """Through the chat template; a checkpoint without one, such as a base model, gets the bare text. begun: an
    answer."""
    if not tokenizer.chat_template:
        return tokenizer.encode(
            "\n\n".join([*(message["content"] for message in conversation), *[begun] * bool(begun)])
        )
    return tokenizer.encode(_chat_template(tokenizer).render(conversation) + begun, add_special_tokens=False)


def encode_for_letter(row: Row, tokenizer: "PreTrainedTokenizerBase", ask: Ask = messages) -> list[int]:
    """A row's prompt and the answer's beginning, after which the letter of a choice stands: " A" to " D" of four."""
    return _apply_template(ask(row), tokenizer, "The answer is")


@lru_cache(maxsize=1)
def _chat_template(tokenizer: "PreTrainedTokenizerBase") -> "ChatTemplate":
    """One for all rows: it is the checkpoint's program, and starts a process to run in."""
    from blockinfer.chat import ChatTemplate  # reading rows alone needs no transformers

    return ChatTemplate(tokenizer)
