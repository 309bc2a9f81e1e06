"""Which room of the package may import which: arrows point one way."""

import ast
from pathlib import Path

import pytest

import blockinfer

PACKAGE = Path(blockinfer.__file__).parent
# what each room must not import: itself and what is left out it may
FORBIDDEN = {
    "kernels": {"decoding", "models", "engine", "llm", "sampling_params"},
    "decoding": {"models", "engine", "llm", "sampling_params"},
    "models": {"decoding", "engine", "llm", "sampling_params"},
    "engine": {"llm"},
}


def imported(path):
    """The names below `blockinfer` that a file imports from, and of others the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
        for module in modules:
            top, _, rest = module.partition(".")
            yield rest.split(".")[0] if top == "blockinfer" and rest else top


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_nothing_above_it(room):
    files = list((PACKAGE / room).glob("*.py"))
    assert len(files) > 2
    found = {f"{path.name}: {name}" for path in files for name in imported(path) if name in FORBIDDEN[room]}
    assert not found


def test_the_package_imports_neither_evals_nor_tests():
    files = list(PACKAGE.rglob("*.py"))
    assert not {f"{path.name}: {name}" for path in files for name in imported(path) if name in ("evals", "tests")}
