"""Base and head side by side: a worktree for base, a process for each, and units of work in turn."""

import contextlib
import filecmp
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from evals.gate.cases import GateCase
from evals.gate.worker import SLOWDOWN
from evals.prompts import messages
from evals.rows import load_rows

MODEL = Path("evals", "llada_tiny")
CHECKPOINT = (".json", ".jinja", ".safetensors")
ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
# With two threads on two cores the pairs' CPU ratios spread two to four times as far, the wall ratios about twice.
THREADS = 1
# Seconds that loading or one unit may take: far more than either does.
PATIENCE = 300


class RunFailed(Exception):
    """The measurement could not be made; the message says what to do."""


@dataclass(frozen=True)
class Unit:
    """What one side made of one unit: seconds, tokens, forwards summed over the requests, a hash of each answer."""

    wall: float
    cpu: float
    tokens: int
    nfe: int
    answers: list[str]


Pair = tuple[Unit, Unit]


@contextlib.contextmanager
def base_checkout(root: Path, ref: str) -> Iterator[Path]:
    """A worktree of the repository `root` at `ref`, gone afterwards however the block ends."""
    commit = resolve(root, ref)
    with tempfile.TemporaryDirectory(prefix="blockinfer-gate-") as folder:
        path = Path(folder, "base")
        try:
            git(root, "worktree", "add", "--detach", str(path), commit)
            yield path
        finally:
            # an interrupted `add` leaves a half-made, locked worktree, which git removes only once its folder is gone
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(RunFailed):
                git(root, "worktree", "remove", "--force", "--force", str(path))


def resolve(root: Path, ref: str) -> str:
    """The commit that `ref` names. Raises RunFailed."""
    git(root, "rev-parse", "--git-dir")
    try:
        return git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    except RunFailed:
        raise RunFailed(
            f"--base {ref} names no commit of {root}; a shallow clone has few (actions/checkout: fetch-depth 0)"
        ) from None


def git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError as error:
        raise RunFailed(f"git cannot be run: {error}") from error
    if done.returncode:
        raise RunFailed(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout.strip()


class Worker:
    """One side's process. Every method raises RunFailed, with the end of what the process wrote, when it fails."""

    def __init__(self, side: str, root: Path, slowdown: float = 0.0) -> None:
        self.side = side
        environment = os.environ | {
            "OMP_NUM_THREADS": str(THREADS),
            "MKL_NUM_THREADS": str(THREADS),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONHASHSEED": "0",
            # glibc keeps what is freed. Otherwise some processes give it back and fault it in again in every unit, and
            # others never do: two processes of the same code were measured up to 15 % apart in CPU time.
            "MALLOC_MMAP_THRESHOLD_": str(2**32),
            "MALLOC_TRIM_THRESHOLD_": str(2**32),
            "MALLOC_TOP_PAD_": str(2**26),
            SLOWDOWN: str(slowdown),
        }
        self.log = tempfile.TemporaryFile("w+")
        # a session of its own: Ctrl-C reaches the parent alone, which ends both
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            bufsize=1,
            start_new_session=True,
        )

    def ask(self, **request: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin)

    def reply(self) -> dict[str, Any]:
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        if not ready:
            raise RunFailed(f"{self.side} did not answer within {PATIENCE} s")
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RunFailed(f"{self.side} ended with code {self.process.wait()}: {self.log.read()[-2000:].strip()}")
        reply = json.loads(line)
        if "error" in reply:
            raise RunFailed(f"{self.side} failed: {reply['error']}")
        return reply

    def run(self, case: GateCase, rows: list[int]) -> Unit:
        self.ask(params=case.params, rows=rows)
        return Unit(**self.reply())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                file.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass
class Measurement:
    """A run: the pairs of every case that both sides take, why base does not take the others, and in what the small
    models differ. base and head are commits, head's with "+" where the checkout differs from it."""

    base: str
    head: str
    pairs: dict[GateCase, list[Pair]] = field(default_factory=dict)
    not_in_base: dict[GateCase, str] = field(default_factory=dict)
    model_differs: list[str] = field(default_factory=list)
    seconds: float = 0.0


def measure(root: Path, ref: str, cases: Sequence[GateCase], pairs: int, slowdown: float = 0.0) -> Measurement:
    """Runs base, the commit `ref`, and head, the checkout `root`, in turn: `pairs` units of each of the cases on each
    side. head is slowed down by the share `slowdown`, to try the gate. Raises RunFailed."""
    start = time.monotonic()
    conversations = [messages(row) for row in load_rows(root / "sample_200.jsonl")]
    with contextlib.ExitStack() as stack:
        checkout = stack.enter_context(base_checkout(root, ref))
        found = Measurement(short(checkout), short(root), model_differs=_differences(checkout, root))
        base = stack.enter_context(Worker("base", checkout))
        head = stack.enter_context(Worker("head", root, slowdown))
        for worker in (base, head):
            worker.ask(conversations=conversations, batch_size=max(case.rows for case in cases))
        for worker in (base, head):
            worker.reply()
        for case in cases:
            _warm_up(base, head, case, found)
        for number in tqdm(range(pairs), disable=None, unit="pair", desc="gate", leave=False):
            for case, so_far in found.pairs.items():
                rows = [(number * case.rows + i) % len(conversations) for i in range(case.rows)]
                # ABBA: what drifts during the run favours each side in turn
                if number % 2 == 0:
                    so_far.append((base.run(case, rows), head.run(case, rows)))
                else:
                    second = head.run(case, rows)
                    so_far.append((base.run(case, rows), second))
    found.seconds = time.monotonic() - start
    return found


def _warm_up(base: Worker, head: Worker, case: GateCase, found: Measurement) -> None:
    """One unit on both sides at once; sorts out the cases that base does not take."""
    for worker in (base, head):
        worker.ask(params=case.params, rows=list(range(case.rows)))
    before, after = base.reply(), head.reply()
    if "unsupported" in after:
        raise RunFailed(f"head does not take the case {case.id}: {after['unsupported']}")
    if "unsupported" in before:
        found.not_in_base[case] = before["unsupported"]
    else:
        found.pairs[case] = []


def short(folder: Path) -> str:
    return git(folder, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")


def _differences(base: Path, head: Path) -> list[str]:
    """Files of the small model's checkpoint that one side has not, or has otherwise."""
    folders = [base / MODEL, head / MODEL]
    names = {path.name for folder in folders for path in folder.glob("*") if path.suffix in CHECKPOINT}
    _, differing, missing = filecmp.cmpfiles(*folders, sorted(names), shallow=False)
    return differing + missing


def run_command(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and leaves with its exit code. A job that is cancelled removes its worktree like one that ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
