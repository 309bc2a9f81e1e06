"""The files named to a command: each is checked at its start, and written whole or not at all.

Code that reads and writes a run's files needs this module, and needs no torch.
"""

import argparse
import fcntl
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TextIO

StrPath = str | os.PathLike[str]


class BadOutput(ValueError):
    """A file that cannot be written; the message is one sentence that names it."""


def text_argument(text: str) -> str:
    """An argparse type: refuses an empty value, such as an unset shell variable leaves."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, got {text!r}")
    return text


def path_argument(text: str) -> Path:
    return Path(text_argument(text))


def number_argument(minimum: float, number: type = int, maximum: float = math.inf) -> Callable[[str], int | float]:
    """An argparse type: an integer, or a `float`, from `minimum` to `maximum`; neither NaN nor infinity."""

    def parse(text: str) -> int | float:
        try:
            value = number(text)
        except ValueError:
            kind = "an integer" if number is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {kind}, got {text!r}") from None
        if not minimum <= value <= maximum or value == math.inf:
            least = f"at least {minimum}{' and finite' * (number is float)}"
            bounds = least if maximum == math.inf else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    return parse


def show(text: str, file: TextIO) -> None:
    """Prints text that comes from files, made harmless: without a terminal's escape codes or characters the terminal
    cannot encode."""
    shown = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    encoding = file.encoding or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=file)


def samples_name(shard: tuple[int, int] | None) -> str:
    """The name of the file of answers beside a run's results, or beside those of its shard (index, number of
    shards)."""
    return f"samples-{shard[0]}-{shard[1]}.jsonl" if shard else "samples.jsonl"


def read_bytes(path: StrPath) -> bytes:
    """Raises OSError, also for a folder and for a device, whose data may never end."""
    with open(path, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            raise OSError(0, "it is a device, no file")
        return file.read()


def check_target(path: StrPath, inputs: Iterable[StrPath] = ()) -> str:
    """The file that `path` names, with links followed, as one that may be written; it need not exist yet.

    Raises BadOutput for a folder, for anything but a regular file, if its folder does not exist, and for one of the
    inputs: a file that the command reads, or a file in a folder that it reads.
    """
    target = os.path.realpath(path)
    with _refusals(path):
        mode = _mode(target)
        folder = os.path.dirname(target)
        if mode is None and _mode(folder) is None:
            raise BadOutput(f"there is no folder {folder!r}")
        if mode is not None and stat.S_ISDIR(mode):
            raise BadOutput("it is a folder; name a file in it")
        if mode is not None and not stat.S_ISREG(mode):
            raise BadOutput("it is a device, a pipe or a socket; name a regular file")
        for read in inputs:
            if _is_read(target, read, exists=mode is not None):
                raise BadOutput(f"it is read too, as {os.fspath(read)!r}; name another file")
    return target


def check_output(path: StrPath, inputs: Iterable[StrPath] = ()) -> None:
    """Tries at a command's start what `write_output` will need at its end. Raises BadOutput."""
    target = check_target(path, inputs)
    with _refusals(path):
        if os.path.exists(target):
            open(target, "r+b").close()
        os.unlink(_make_part(target))


def check_folder(path: StrPath) -> None:
    """Makes the folder if it is missing, and tries whether files can be made in it. Raises BadOutput."""
    with _refusals(path):
        os.makedirs(path, exist_ok=True)
        os.unlink(_make_part(os.path.join(os.path.realpath(path), "file")))


def write_output(path: StrPath, content: str | bytes) -> None:
    """Writes text in UTF-8. Even if the machine goes down, the file is either the old one or has all of the content.

    Raises BadOutput.
    """
    with replacing(path) as part, open(part, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_measured(path: StrPath, content: str | bytes) -> None:
    """`write_output` for a measurement that took long: if it cannot be written, it goes to the folder of temporary
    files.

    In that case too, raises BadOutput, which says where the file is.
    """
    try:
        write_output(path, content)
    except BadOutput as error:
        folder = os.path.realpath(tempfile.gettempdir())
        elsewhere = os.path.join(folder, f"{secrets.token_hex(4)}-{os.path.basename(path)[-200:]}")
        try:
            write_output(elsewhere, content)
        except BadOutput:
            raise error from None
        raise BadOutput(f"{error}; it is in {elsewhere!r} instead") from error


@contextmanager
def replacing(path: StrPath) -> Iterator[str]:
    """The path of a file beside `path`, which replaces `path` when the block ends without an exception.

    Links are followed, and the file's permissions kept. Raises BadOutput; if only the last step failed, the file beside
    is left, and the message names it.
    """
    target = check_target(path)
    with _refusals(path):
        mode = _mode(target)
        part = _make_part(target)
        mode = os.stat(part).st_mode if mode is None else mode
        try:
            yield part
            with open(part, "r+b") as file:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
                os.fsync(file.fileno())
        except BaseException:
            os.unlink(part)
            raise
        try:
            os.replace(part, target)
        except OSError as error:
            raise BadOutput(f"{_reason(error)}; what it was to hold is in {part!r}") from error


def locked(path: str) -> FileIO:
    """The file, made if it is missing, locked for this run; writes go to its end. Raises ValueError if another run has
    locked it."""
    while True:
        file = open(path, "a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError("another run is writing to it; wait for its end, or name another file") from None
        except OSError:
            # some network file systems have no locks; lines are then appended without one
            pass
        file.seek(0)
        # another run may have replaced the file meanwhile
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            return file
        file.close()


@contextmanager
def _refusals(path: StrPath) -> Iterator[None]:
    """Turns an OSError, or a BadOutput without the file's name, into a BadOutput with it."""
    try:
        yield
    except (OSError, BadOutput) as error:
        reason = _reason(error) if isinstance(error, OSError) else str(error)
        raise BadOutput(f"{os.fspath(path)!r} cannot be written: {reason}") from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _mode(path: str) -> int | None:
    """None if there is no file."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _make_part(target: str) -> str:
    # a short name of its own, since the target's may already have the maximum length
    part = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.part")
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return part


def _is_read(target: str, read: StrPath, exists: bool) -> bool:
    if exists and os.path.isdir(read):
        return os.path.commonpath([target, os.path.realpath(read)]) == os.path.realpath(read)
    if exists and os.path.exists(read):
        return os.path.samefile(target, read)
    return target == os.path.realpath(read)
