"""Renders templates in a separate process."""

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
    """The process that renders templates.

    A template is a program, and can loop forever or fill the memory in more ways than one could forbid. So it runs in
    Jinja's sandbox, in a separate process that may use `cpu_seconds` for each rendering and `memory` bytes, and is
    killed beyond that. The process starts at the first rendering, which takes half a second, serves later ones, and
    ends with `close` or with this object.
    """

    cpu_seconds = 5
    memory = 1 << 29

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._stop = lambda: None

    def reply(self, line: str) -> dict[str, Any]:
        """The reply of template_worker.py to a line of JSON: {"text"}, or {"error"}, also if the process was killed."""
        try:
            return json.loads(self._ask(line) or self._last_words())
        except BaseException:  # after Ctrl-C, the pending reply must not be taken for the next one
            self.close()
            raise

    def close(self) -> None:
        """Ends the process; the next rendering starts a new one."""
        self._process = None
        self._stop()

    def _ask(self, line: str) -> str:
        """-> the reply, empty if the process died."""
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
        """The reply for a process that died without one."""
        status = self._process.wait()
        self.close()
        if status == -signal.SIGXCPU:
            return json.dumps({"error": f"it took more than {self.cpu_seconds} s of CPU time"})
        return json.dumps({"error": f"its process ended with status {status}"})

    def _start(self) -> None:
        worker = Path(__file__).with_name("template_worker.py")
        process = subprocess.Popen(
            # -P: modules of this package must not shadow others
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
    with contextlib.suppress(BrokenPipeError):  # flushing what was not written yet may fail
        process.stdin.close()
