"""Conversations, and the chat template that makes a prompt of one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from blockinfer.checks import reason, shown

_MESSAGE = "{'role': ..., 'content': ...}"


class ChatTemplate:
    """A tokenizer's chat template.

    A template is a program that comes with a checkpoint. It may loop for ever or fill the memory, in more ways than one
    could forbid. So it runs, in the sandbox of transformers, in a process of its own that may use `cpu_seconds` for
    each conversation and `memory` bytes; beyond that it is ended. The process starts with the first conversation, which
    takes half a second, serves those that follow, and ends with `close` or with this object.
    """

    cpu_seconds = 5
    memory = 1 << 29

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._process: subprocess.Popen[str] | None = None
        self._stop = lambda: None

    def render(self, conversation: list[dict[str, str]]) -> str:
        """The conversation as text that the assistant is to continue.

        Raises ValueError where the template fails, is ended, or makes nothing of it, and for messages that are no JSON.
        """
        template = self._tokenizer.get_chat_template()
        if not isinstance(template, str):
            raise ValueError(f"the chat template of {self._tokenizer.name_or_path} is no text")
        tokens = json.loads(json.dumps(self._tokenizer.special_tokens_map, default=str))
        try:
            line = json.dumps({"chat_template": template, "conversation": conversation, "tokens": tokens})
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"its messages hold what is no JSON: {reason(error)}") from error
        try:
            reply = json.loads(self._ask(line) or self._last_words())
        except BaseException:  # Ctrl-C: the answer that is still to come must not be taken for the next one
            self.close()
            raise
        if "error" in reply:
            raise ValueError(f"the chat template of {self._tokenizer.name_or_path} fails: {reply['error']}")
        if not reply["text"].strip():
            raise ValueError(f"the chat template of {self._tokenizer.name_or_path} makes an empty prompt of it")
        return reply["text"]

    def close(self) -> None:
        """Ends the process; the next conversation would start one anew."""
        self._process = None
        self._stop()

    def _ask(self, line: str) -> str:
        """-> the answer, or nothing where the process died."""
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        answer = self._process.stdout.readline()
        return answer if answer.endswith("\n") else ""

    def _last_words(self) -> str:
        """An answer for a process that gave none."""
        status = self._process.wait()
        self.close()
        if status == -signal.SIGXCPU:
            return json.dumps({"error": f"it took more than {self.cpu_seconds} s of CPU time"})
        return json.dumps({"error": f"its process ended with status {status}"})

    def _start(self) -> None:
        worker = Path(__file__).with_name("chat_worker.py")
        process = subprocess.Popen(
            # -P: no module of this package is to be found in place of another's
            [sys.executable, "-P", str(worker), str(self.cpu_seconds), str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for this process alone
        )
        self._process, self._stop = process, weakref.finalize(self, _end, process)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # of what was not written yet
        process.stdin.close()


def check_conversations(messages: object) -> list[list[dict[str, str]]]:
    """One conversation, or several, as a list of conversations; raises ValueError for anything else."""
    if not isinstance(messages, list | tuple):
        raise ValueError(f"messages must be a list of {_MESSAGE}, got {type(messages).__name__}")
    if not messages:
        raise ValueError("chat needs at least one message, got an empty list")
    conversations = [messages] if isinstance(messages[0], dict) else messages
    for i, conversation in enumerate(conversations):
        if not isinstance(conversation, list | tuple):
            raise ValueError(f"conversation {i}: it must be a list of {_MESSAGE}, got {type(conversation).__name__}")
        if not conversation:
            raise ValueError(f"conversation {i}: it has no messages")
        for j, message in enumerate(conversation):
            if not isinstance(message, dict):
                raise ValueError(f"conversation {i}: message {j} must be {_MESSAGE}, got {type(message).__name__}")
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                keys = shown(list(message))
                raise ValueError(f"conversation {i}: message {j} must be {_MESSAGE} with strings, got the keys {keys}")
    return list(conversations)
