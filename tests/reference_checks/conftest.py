"""Random checkpoints, and the reference that reads one."""

import pytest

from tests.checkpoints import write_checkpoint
from tests.reference import Reference
from tests.reference_checks.inputs import SHAPES


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write_checkpoint(root / name, **shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def model(folders):
    return Reference(folders["dense"])
