"""A user's own prompt: a Jinja template over the row."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockinfer.templates import TemplateProcess
from evals.files import read_bytes
from evals.questions.sources import LETTERS

# Fields that would give the answer away.
_GOLD = ("answer", "answers")


class PromptTemplate(TemplateProcess):
    """The template in a file. It sees the row's fields except answer and answers; choices and context even if the row
    has none, as an empty list and an empty string; and letters, one for each choice.

    Raises ValueError for a file that cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = os.fspath(path)
        try:
            self._text = read_bytes(path).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"--prompt {self.path!r} cannot be read: {why}") from error
        # stored in results instead of PROMPTS_VERSION
        self.version = f"sha256:{hashlib.sha256(self._text.encode()).hexdigest()[:16]}"

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """The conversation that asks for `row`.

        Raises ValueError, with file and line, if the template fails, is ended, or renders nothing.
        """
        choices = row.get("choices") or []
        fields = {name: value for name, value in row.items() if name not in _GOLD}
        fields |= {"choices": choices, "context": row.get("context") or "", "letters": LETTERS[: len(choices)]}
        reply = self.reply(json.dumps({"template": self._text, "fields": fields}))
        if "error" in reply:
            line = f":{reply['line']}" if reply.get("line") else ""
            raise ValueError(f"--prompt {self.path}{line}: row {row['id']}: {reply['error']}")
        if not reply["text"].strip():
            raise ValueError(f"--prompt {self.path}: row {row['id']}: it makes an empty prompt of it")
        return [{"role": "user", "content": reply["text"]}]
