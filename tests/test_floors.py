"""pyproject.toml, .ci/floors.txt and constraints.txt: what is allowed is what is tried."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
# there is no CPU build of their lowest versions on PyPI
NOT_TRIED = {"torch", "triton"}


def pinned(path):
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE))


def padded(version):
    return [*map(int, version.split(".")), 0, 0][:3]


def test_floors_are_the_lowest_versions_that_are_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["test"]
    assert set(extras["serve"]) < set(wanted), "what users install is what is tried"
    lowest = dict(re.fullmatch(r"([\w-]+)(?:\[[\w-]+\])?>=([\d.]+)", one).groups() for one in wanted)
    floors, constraints = pinned(ROOT / ".ci" / "floors.txt"), pinned(ROOT / "constraints.txt")
    assert floors.keys() == lowest.keys()
    assert {name for name in floors if padded(floors[name]) != padded(lowest[name])} == NOT_TRIED
    assert all(floors[name] == constraints[name] for name in NOT_TRIED)
