"""A side's process as the gate sees it: requests, replies, and a sentence for whatever goes wrong with it."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import from_json

from evals.gate.cases import GateCase
from evals.gate.checkout import RunFailed
from evals.runs.git import git_environment

WORKER = Path(__file__).with_name("worker.py")
# With two threads on two cores the pairs' CPU ratios spread two to four times as far, the wall ratios about twice.
THREADS = 1
# Seconds allowed for loading or for one unit, far more than either takes.
PATIENCE = 300
# Bytes allowed for a reply, far more than one has.
LONGEST = 2**20
# Characters kept of a failed process's last output.
LAST = 300

Seconds = Annotated[float, Field(gt=0, le=2 * PATIENCE)]  # NaN fails both comparisons
Count = Annotated[int, Field(ge=0, le=2**40)]
Bytes = Annotated[int, Field(ge=1, le=2**50)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Unit:
    """One side's result for one unit: seconds, tokens, forwards summed over the requests, a hash of each answer."""

    wall: Seconds
    cpu: Seconds
    tokens: Count
    nfe: Annotated[Count, Field(ge=1)]
    answers: list[str]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Memory:
    bytes: Bytes


class Worker:
    """One side's process. Every method raises RunFailed, with the last line that the process wrote, if the process
    fails."""

    def __init__(self, side: str, root: Path) -> None:
        self.side = side
        environment = git_environment() | {
            "OMP_NUM_THREADS": str(THREADS),
            "MKL_NUM_THREADS": str(THREADS),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONHASHSEED": "0",
            # torch's profiler would log each start, and hide the process's last line
            "KINETO_LOG_LEVEL": "99",
            # glibc keeps freed memory. Otherwise some processes give it back and fault it in again in every unit, and
            # others never do: two processes of the same code were measured up to 15 % apart in CPU time.
            "MALLOC_MMAP_THRESHOLD_": str(2**32),
            "MALLOC_TRIM_THRESHOLD_": str(2**32),
            "MALLOC_TOP_PAD_": str(2**26),
        }
        self.log = tempfile.TemporaryFile()
        self.pending = b""
        # a session of its own: Ctrl-C reaches only the parent, which ends both
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            bufsize=0,
            start_new_session=True,
        )
        os.set_blocking(self.process.stdin.fileno(), False)

    def ask(self, **request: Any) -> None:
        line, deadline = json.dumps(request).encode() + b"\n", time.monotonic() + PATIENCE
        # the last line of an ended process is reported where its reply is missed
        with contextlib.suppress(BrokenPipeError):
            while line:
                if not select.select([], [self.process.stdin], [], max(0, deadline - time.monotonic()))[1]:
                    raise self.failure(f"read no request for {PATIENCE} s")
                line = line[self.process.stdin.write(line) or 0 :]

    def reply(self) -> dict[str, Any]:
        line = self._line()
        try:
            reply = TypeAdapter(dict[str, Any]).validate_python(from_json(line, allow_inf_nan=False))
        except ValueError:
            raise self.failure(f"wrote what is no reply, {_shown(line)}") from None
        if self.pending:
            raise self.failure(f"wrote more than a reply, {_shown(self.pending)}")
        if "error" in reply:
            raise RunFailed(f"{self.side} failed: {_shown(reply['error'])}")
        return reply

    def _line(self) -> bytes:
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self.pending:
            if not select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
                half = f" but for {_shown(self.pending)}" if self.pending else ""
                raise self.failure(f"did not answer within {PATIENCE} s{half}")
            read = os.read(self.process.stdout.fileno(), 2**16)
            self.pending += read
            if not read:
                raise self.failure(self._ended())
            if len(self.pending) > LONGEST:
                raise self.failure(f"wrote a reply of more than {LONGEST} bytes, {_shown(self.pending)}")
        line, _, self.pending = self.pending.partition(b"\n")
        return line

    def _ended(self) -> str:
        half = f" after {_shown(self.pending)}" if self.pending else ""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return f"closed its pipe{half}"
        if code >= 0:
            return f"ended with code {code}{half}"
        return f"was ended by {signal.Signals(-code).name}{half}"

    def failure(self, what: str) -> RunFailed:
        """`what`, and the last line that the process wrote to its standard error."""
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 4 * LAST))
        lines = self.log.read().decode(errors="replace").splitlines()
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return RunFailed(f"{self.side} {what}" + (f"; it said last: {said[-LAST:]}" if said else ""))

    def unit(self, case: GateCase, rows: list[int], more_work: float = 0.0) -> Unit:
        self.ask(call="unit", params=case.params, rows=rows, more_work=more_work)
        unit = self._read(Unit)
        if len(unit.answers) != len(rows):
            raise self.failure(f"answered {len(unit.answers)} of {len(rows)} requests in the case {case.id}")
        return unit

    def memory(self, **request: Any) -> int:
        self.ask(**request)
        return self._read(Memory).bytes

    def _read(self, kind: type) -> Any:
        reply = self.reply()
        try:
            return kind(**reply)
        except ValidationError as error:
            (fault, *_) = error.errors()
            field = ".".join(map(str, fault["loc"])) or "reply"
            raise self.failure(f"wrote a reply that is none: {field}: {fault['msg']}: {_shown(reply)}") from None

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            # the processes it has started as well
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.log):
            file.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _shown(what: Any) -> str:
    text = what.decode(errors="replace") if isinstance(what, bytes) else str(what)
    shown = " ".join(text.split())
    return repr(shown) if len(shown) <= LAST else repr(shown[:LAST]) + " ..."
