"""Templates, rendered in a process of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any


class TemplateProcess:
    """What renders templates.

    A template is a program, and may loop for ever or fill the memory, in more ways than one could forbid. So it runs,
    in the sandbox of Jinja, in a process of its own that may use `cpu_seconds` for each rendering and `memory` bytes;
    beyond that it is ended. The process starts with the first rendering, which takes half a second, serves those that
    follow, and ends with `close` or with this object.
    """

    cpu_seconds = 5
    memory = 1 << 29

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._stop = lambda: None

    def reply(self, line: str) -> dict[str, Any]:
        """What template_worker.py answers to its line of JSON: {"text"}, or {"error"}, also where it was ended."""
        try:
            return json.loads(self._ask(line) or self._last_words())
        except BaseException:  # Ctrl-C: the answer that is still to come must not be taken for the next one
            self.close()
            raise

    def close(self) -> None:
        """Ends the process; the next rendering would start one anew."""
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
        worker = Path(__file__).with_name("template_worker.py")
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
