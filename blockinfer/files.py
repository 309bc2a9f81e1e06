"""Reading others' files: any problem with one is a ValueError that names it."""

import json
import os
from pathlib import Path
from typing import Any

from blockinfer.checks import reason

# The largest JSON file that is read, in bytes; the index of 100,000 tensors is a tenth of it.
_MAX_JSON = 100_000_000


def is_file(path: Path) -> bool:
    """Whether a readable file, or a link to one, is there; False if nothing is.

    Raises ValueError if something else is there.
    """
    try:
        if path.is_file():
            if not os.access(path, os.R_OK):
                raise ValueError(f"{path}: cannot be read: this user may not")
            return True
        there = os.path.lexists(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {reason(error)}") from error
    if there:
        kind = "a folder" if path.is_dir() else "a broken link, a pipe or a device"
        raise ValueError(f"{path}: a file is expected, and this is {kind}")
    return False


def is_plain_name(name: object) -> bool:
    """Whether it names a file in the same folder; the file may be a link, as in the Hub's cache."""
    if not isinstance(name, str) or name in ("", "..") or "\0" in name or len(name) > 255:
        return False
    return Path(name).name == name


def read_json(path: Path) -> Any:
    """The file's content. Raises ValueError if it cannot be read, is over 100 MB, or is not JSON."""
    try:
        if (size := path.stat().st_size) > _MAX_JSON:
            raise ValueError(f"{path}: {size} bytes, more than the {_MAX_JSON} of any JSON file that belongs here")
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {reason(error)}") from error
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError(f"{path}: not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {reason(error)}") from error
