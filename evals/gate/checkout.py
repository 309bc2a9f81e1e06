"""The gate's git calls: the commit that a name means, and a worktree of it while the gate runs."""

import contextlib
import fcntl
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from evals.runs.git import git_environment

# A folder of temporary files that holds a worktree and a file which the gate keeps locked while it runs.
PREFIX, WORKTREE, ALIVE = "blockinfer-gate-", "base", "alive"


class RunFailed(Exception):
    """The measurement could not be made; the message says what to do."""


@contextlib.contextmanager
def base_checkout(root: Path, ref: str) -> Iterator[Path]:
    """A worktree of the repository `root` at `ref`, removed however the block ends.

    A gate killed with SIGKILL leaves its worktree; the next gate of the same repository removes it.
    """
    commit = resolve(root, ref)
    _remove_dead(root)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder, open(Path(folder, ALIVE), "w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        path = Path(folder, WORKTREE)
        try:
            git(root, "worktree", "add", "--detach", str(path), commit)
            yield path
        finally:
            _remove(root, path)


def _remove_dead(root: Path) -> None:
    """Removes the worktrees of gates that no longer run. Those of another user stay, and do no harm."""
    for line in git(root, "worktree", "list", "--porcelain").splitlines():
        path = Path(line.removeprefix("worktree "))
        folder = path.parent
        if line.startswith("worktree ") and path.name == WORKTREE and folder.name.startswith(PREFIX):
            if not _is_locked(folder / ALIVE):
                _remove(root, path)
                shutil.rmtree(folder, ignore_errors=True)


def _is_locked(path: Path) -> bool:
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _remove(root: Path, path: Path) -> None:
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


def short(folder: Path) -> str:
    """The commit that is checked out, with "+" if files differ from it."""
    return git(folder, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")


def git(root: Path, *arguments: str) -> str:
    """git's output. The folder decides, even inside a git hook, whose variables are dropped. Raises RunFailed."""
    try:
        command = ["git", *arguments]
        done = subprocess.run(
            command, cwd=root, env=git_environment(), capture_output=True, text=True, errors="replace"
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise RunFailed(f"git cannot be run: {error}") from error
    if done.returncode:
        raise RunFailed(f"git {' '.join(arguments)} failed: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
