"""What the README shows runs as it is shown."""

import re
from pathlib import Path

import pytest
from pytest_benchmark import cli

from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from evals.gate import command as gate
from evals.gate import experiment
from evals.llada_tiny import study
from evals.questions import build_sample
from evals.results import compare
from evals.timing import stages

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# what stands before the script's name is sbatch's
OURS = re.sub(r"sbatch .*?\.slurm", "", README)


def test_the_scripts(monkeypatch, capsys):
    """The second goes on from the first."""
    scripts, names = re.findall(r"```python\n(.*?)```", README, re.DOTALL), {}
    monkeypatch.chdir(ROOT)
    for script in scripts:
        exec(compile(script, "README.md", "exec"), names)
    assert names["score"].logprob < 0 == names["score"].standard_error
    assert len(names["choice"].probabilities) == 3 and names["filled"].outputs[0].infilled.text.startswith("2 + ")
    assert names["guided"].metrics.nfe == 2 * names["guided"].metrics.denoising_steps
    lines = capsys.readouterr().out.strip().splitlines()
    tokens, forwards = map(int, re.fullmatch(r"(\d+) tokens in (\d+) forwards", lines[-1]).groups())
    # right, and by several tokens a forward
    assert lines[-2].endswith("14 + 23 = 37 apples. The answer is 37.") and tokens > 2 * forwards > 0


def test_every_mode_and_rule_is_described():
    rows = re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert named >= {*MODES, *RULES}


@pytest.mark.parametrize("option", sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", OURS))))
def test_every_option_is_one(option, pytestconfig):
    known = {name for group in pytestconfig._parser._groups for o in group.options for name in o.names()}
    parsers = [build_sample.parser(), compare.make_parser(), experiment.make_parser(), gate.make_parser()]
    parsers += [cli.make_parser(), stages.make_parser(), study.make_parser()]
    known.update(*(parser._option_string_actions for parser in parsers))
    assert option in known
