"""The project's calls of git: their environment, and the commit that runs."""

import os
import subprocess
from pathlib import Path


def git_environment() -> dict[str, str]:
    """os.environ without the variables that make git use another repository, or another index, than the folder's own.

    A git hook, and so all that it starts, has such variables: GIT_INDEX_FILE, GIT_DIR. git itself lists them. Raises
    OSError if there is no git, and CalledProcessError for one older than 1.7.
    """
    if not any(name.startswith("GIT_") for name in os.environ):
        return dict(os.environ)
    command = ["git", "rev-parse", "--local-env-vars"]
    local = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {name: value for name, value in os.environ.items() if name not in local}


def commit() -> str | None:
    """The checkout's commit, with "+" if files differ from it; None outside a git checkout."""
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
        folder = Path(__file__).parent
        options = dict(cwd=folder, env=git_environment(), capture_output=True, text=True, check=True)
        return subprocess.run(command, **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
