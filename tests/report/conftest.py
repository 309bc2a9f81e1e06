"""Pages made of given files."""

import pytest

from evals.report.command import main
from tests.report.html_tree import parse
from tests.report.sample import write


@pytest.fixture
def report(tmp_path, capsys):
    """Writes files of these contents, the run first, and returns its page."""

    def make(*contents):
        paths = [write(tmp_path / f"{i}.json", content) for i, content in enumerate(contents)]
        code = main([*map(str, paths), "-o", str(tmp_path / "report.html")])
        assert (code, capsys.readouterr().err) == (0, "")
        return parse((tmp_path / "report.html").read_text(encoding="utf-8"))

    return make
