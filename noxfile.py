"""The project's sessions: `nox -s` tests, floors, evals, gate, screenshots, page, lint, slurm, gpu, sanitizer.
Arguments after `--` are passed on."""

import os
import shutil

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


def install(session: nox.Session) -> None:
    """The project and its test packages, at the versions of constraints.txt."""
    session.install("-c", "constraints.txt", "-e", ".[test]")


@nox.session
def tests(session: nox.Session) -> None:
    """Unit and property tests, and the engine against its reference, on the CPU."""
    install(session)
    session.run("pytest", "tests", *session.posargs)


@nox.session(default=False)
def floors(session: nox.Session) -> None:
    """The tests with the lowest versions that pyproject.toml allows, except for torch and triton: .ci/floors.txt."""
    session.install("-c", ".ci/floors.txt", "-e", ".[test]")
    session.run("pytest", "tests", *session.posargs)


@nox.session
def evals(session: nox.Session) -> None:
    """Speed and accuracy of the small model on this machine."""
    install(session)
    session.run("pytest", "evals", "--benchmark-json=out.json", *session.posargs)


@nox.session(default=False)
def gate(session: nox.Session) -> None:
    """This checkout against a commit: `nox -s gate -- --base REF` fails if it decodes more slowly."""
    install(session)
    # on Ctrl-C, time to remove its worktree
    session.run("python", "-m", "evals", "gate", *session.posargs, interrupt_timeout=10.0)


@nox.session
def screenshots(session: nox.Session) -> None:
    """The report of evals/report in headless Chromium: checks its layout, leaves pictures in build/screenshots."""
    chromium = shutil.which("chromium") or _install_chromium(session)
    # without the project and torch: the report does not need them; tests/conftest.py does, so it is left out
    session.install("-c", "constraints.txt", "jinja2", "pillow", "playwright", "pydantic", "pytest")
    report = "tests/browser/test_report.py"
    session.run("pytest", "--noconftest", report, *session.posargs, env={"CHROMIUM": chromium})


@nox.session(default=False)
def page(session: nox.Session) -> None:
    """The server's page in headless Chromium, on the small model; leaves pictures in build/screenshots."""
    chromium = shutil.which("chromium") or _install_chromium(session)
    session.install("-c", "constraints.txt", "-e", ".[test]", "pillow", "playwright")
    session.run("pytest", "tests/browser/test_serve_page.py", *session.posargs, env={"CHROMIUM": chromium})


def _install_chromium(session: nox.Session) -> str:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        session.error("there is no chromium on the PATH: install it, on Debian `apt-get install chromium` as root")
    session.run("apt-get", "update", external=True)
    session.run("apt-get", "install", "-y", "--no-install-recommends", "chromium", external=True)
    return shutil.which("chromium")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff's checks and its format."""
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(default=False)
def slurm(session: nox.Session) -> None:
    """evals/slurm's job on a local SLURM: two nodes, on the CPU; a shard is killed and run again."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if not all(shutil.which(daemon, path=path) for daemon in ("munged", "slurmctld", "slurmd", "sbatch")):
        command = ["apt-get", "install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]
        if os.geteuid() or not shutil.which("apt-get"):
            session.error(f"SLURM and munge are needed; on Debian or Ubuntu: sudo {' '.join(command)}")
        session.run("apt-get", "update", "--quiet", external=True)
        session.run(*command, external=True, env={"DEBIAN_FRONTEND": "noninteractive"})
    install(session)
    session.run("python", "evals/slurm/check.py", *session.posargs)


@nox.session(default=False, venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Tests and evals on this machine's GPU, with the torch installed here."""
    if not shutil.which("nvidia-smi"):
        session.error("there is no GPU here: nvidia-smi is not on the PATH")
    # pytest-xdist's workers run no benchmarks, which the histories' tests make and the evals are
    alone = "tests/test_history.py"
    at_once = ["-n", "auto", "--maxprocesses=10", "--dist=loadfile", "--benchmark-disable"]
    session.run("python3", "-m", "pytest", "tests", f"--ignore={alone}", *at_once, *session.posargs)
    session.run("python3", "-m", "pytest", alone, "evals", "--benchmark-json=out.json", *session.posargs)


@nox.session(default=False, venv_backend="none")
@nox.parametrize("tool", ["memcheck", "racecheck"])
def sanitizer(session: nox.Session, tool: str) -> None:
    """The kernels' tests at small sizes under NVIDIA's compute-sanitizer: stray accesses, races in shared memory."""
    if not shutil.which("compute-sanitizer"):
        session.error("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    check = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "python3", "-m", "pytest")
    engine = "tests/kernels/test_engine.py"
    small = ["--hypothesis-profile=few", "-k", "not 2_31 and not 32_bits and not whole_vocabulary"]
    session.run(
        *(*check, "tests/kernels", f"--ignore={engine}", *small, *session.posargs),
        # torch's own allocator would hide what lies between two tensors
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    # a CUDA graph cannot be captured without that allocator
    session.run(*check, engine, *session.posargs)
