"""Which room of the package, and of the suite, may import which: arrows point one way."""

import ast
import subprocess
from pathlib import Path

import pytest

import blockinfer
import evals

PACKAGE = Path(blockinfer.__file__).parent
SUITE = Path(evals.__file__).parent
# what each room must not import: itself and what is left out it may
FORBIDDEN = {
    "kernels": {"decoding", "models", "engine", "parallel", "llm", "sampling_params"},
    "decoding": {"models", "engine", "parallel", "llm", "sampling_params"},
    "models": {"decoding", "engine", "parallel", "llm", "sampling_params"},
    "engine": {"parallel", "llm", "async_llm", "serve"},
    "parallel": {"llm", "async_llm", "serve"},
}
# of the suite's rooms, what each may import besides itself
ROOMS = {
    "files": set(),
    "questions": {"files"},
    "runs": {"files", "questions"},
    "results": {"files", "questions", "runs"},
    "timing": {"files", "questions", "runs", "results"},
    "report": {"files", "runs", "results"},
    "gate": {"files", "questions", "runs", "results"},
    "slurm": {"files"},
    "lm_eval": {"questions"},
    "llada_tiny": {"files", "questions", "runs", "results", "report"},
}
# what the engine runs without
OF_THE_SERVER = {"fastapi", "prometheus_client", "pydantic", "serve", "starlette", "uvicorn"}


def imported(path, package="blockinfer"):
    """The names below `package` that a file imports from, and of others the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
        for module in modules:
            top, _, rest = module.partition(".")
            yield rest.split(".")[0] if top == package and rest else top


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_nothing_above_it(room):
    files = list((PACKAGE / room).glob("*.py"))
    assert len(files) > 2
    found = {f"{path.name}: {name}" for path in files for name in imported(path) if name in FORBIDDEN[room]}
    assert not found


def test_the_package_imports_neither_evals_nor_tests():
    files = list(PACKAGE.rglob("*.py"))
    assert not {f"{path.name}: {name}" for path in files for name in imported(path) if name in ("evals", "tests")}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_of_the_suite_imports_those_below_it_alone(room):
    """Lazily too, but for types: who reads `results` need not know `report`."""
    files = list((SUITE / room).rglob("*.py"))
    assert files
    allowed = ROOMS[room] | {room}
    inside = {path.name for path in SUITE.iterdir()} | {path.stem for path in SUITE.iterdir()}
    found = {f"{path.name}: {name}" for path in files for name in imported(path, "evals") if name in inside - allowed}
    assert not found


def test_every_room_of_the_suite_is_in_its_place():
    rooms = {path.name for path in SUITE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert rooms == set(ROOMS)


def test_the_server_is_an_extra():
    files = [path for path in PACKAGE.rglob("*.py") if "serve" not in path.relative_to(PACKAGE).parts]
    assert len(files) > 30
    assert not {f"{path.name}: {name}" for path in files for name in imported(path) if name in OF_THE_SERVER}


def ignored(*paths):
    """Of these paths those that git leaves out."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        pytest.skip("no repository, as in an unpacked archive")
    command = ["git", "check-ignore", "--no-index", *map(str, paths)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return set(done.stdout.splitlines())


def test_git_leaves_out_what_runs_write_and_nothing_of_the_project():
    left_out = ["samples.jsonl", "samples-1-4.jsonl", "kept.jsonl", "shard1.json", "shard_1.json", "merged.json"]
    assert ignored(*left_out, "results/slurm/run.txt", "sample_200.jsonl") == {*left_out, "results/slurm/run.txt"}
    sources = [path for folder in (PACKAGE, SUITE) for path in folder.rglob("*.py")]
    assert not ignored(*sources)
