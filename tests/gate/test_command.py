"""The command: what it refuses, a real run, what its options decide."""

import re
import shutil
import subprocess
import sys

import pytest

from evals.gate import cases, measure
from evals.gate.cases import LEAST_PAIRS, PAIRS_A_ROUND, PROFILES, GateCase, Profile, Worse
from evals.gate.checkout import git
from evals.gate.command import SLOWDOWN, main
from evals.gate.exits import FAILED, PASSES, REGRESSION
from evals.gate.judge import judge
from tests.gate.figures import FREE, LIMIT, MARGINS, ROOT, STATIC, Clockwork
from tests.gate.test_checkout import assert_nothing_is_left


def test_drift_favours_neither_side(clockwork, repository):
    found = measure.measure(repository, "HEAD", [FREE], 40, Worse(0.1))
    a_round = 2 * (1 + PAIRS_A_ROUND)
    # after the units of the warm-up
    assert clockwork.log[2:a_round] == ["base", "head"] * PAIRS_A_ROUND and len(clockwork.log) == 8 * a_round
    assert clockwork.log[a_round + 2 : 2 * a_round] == ["head", "base"] * PAIRS_A_ROUND
    ((verdict,), held) = judge(found, MARGINS)
    assert verdict.wall.typical == pytest.approx(1.1, abs=0.0002) and verdict.wall.is_slower(LIMIT) and held is None
    pairs = [pair for pairs in found.rounds[FREE] for pair in pairs]
    # both sides were asked the same rows, others in every pair until all 200 were
    assert all(base.answers == head.answers for base, head in pairs)
    assert len({answer for base, _ in pairs for answer in base.answers}) == 160


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --base"),
        (["--base", ""], "argument --base: must name a commit, got ''"),
        (["--memory-margin", "0"], "argument --memory-margin: must be a percentage above 0, got '0'"),
        (["--margin", "0"], "argument --margin: must be a percentage above 0, got '0'"),
        (["--margin", "nan"], "argument --margin: must be a percentage above 0, got 'nan'"),
        (["--margin", "5%"], "argument --margin: must be a percentage above 0, got '5%'"),
        (["--pairs", "39"], "argument --pairs: must be at least 40, got 39"),
        (["--profile", "fast"], "argument --profile: invalid choice: 'fast'"),
        (["--accept", "time=block-32-threshold"], "argument --accept: must be nfe=CASE, got 'time=block-32-threshold'"),
        (["--accept", "nfe="], "argument --accept: must be nfe=CASE, got 'nfe='"),
        (["--accept", "nfe=block-32-treshold"], "has no case 'block-32-treshold'; did you mean 'block-32-threshold'?"),
        (["--accept", "nfe=block-32-factor", "--profile", "quick"], "the profile quick has no case 'block-32-factor'"),
    ],
)
def test_bad_usage(arguments, message, capsys):
    base = ["--base", "HEAD"] if arguments else []
    with pytest.raises(SystemExit) as stopped:
        main(base + arguments)
    assert stopped.value.code == FAILED and message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["fast", "", "-0.1", "nan", "11", "0.1:", "0.1:vanila"])
def test_a_slowdown_that_is_no_share_is_refused(monkeypatch, capsys, value):
    monkeypatch.setenv(SLOWDOWN, value)
    with pytest.raises(SystemExit) as stopped:
        main(["--base", "HEAD"])
    error = capsys.readouterr().err
    assert stopped.value.code == FAILED and f"{SLOWDOWN} must be a share from 0 to 10, such as 0.1, which" in error
    assert error.endswith(f"got {value!r}\n")


def test_a_slowdown_may_sit_in_one_place():
    assert [Worse.parse("0.1").work(case) for case in (STATIC, FREE)] == [0.1, 0.1]
    assert [Worse.parse("0.1:threshold").work(case) for case in (STATIC, FREE)] == [0, 0.1]
    assert [Worse.parse("0.1:block").work(case) for case in (STATIC, FREE)] == [0.1, 0.1]
    assert Worse.parse("0.1:vanilla").work(FREE) == 0 and Worse.parse("0.1:vanilla").memory == 0
    assert Worse.parse("0.1:memory").work(FREE) == 0 and Worse.parse("0.1:memory").memory == 0.1
    assert str(Worse.parse("0.1:memory")) == "10 % in memory" and str(Worse.parse("0")) == "0 %"


def test_the_quick_profile_has_every_mode_and_rule():
    for profile in PROFILES.values():
        modes, rules = ({getattr(case, name) for case in profile.cases} for name in ("mode", "unmasking"))
        assert modes == {"vanilla", "prefix_cache", "dual_cache", "block", "block_refresh"}
        assert rules == {
            "low_confidence",
            "random",
            "sequential",
            "threshold",
            "factor",
            "entropy",
            "entropy_threshold",
        }
        assert {"block_add_threshold" in case.params for case in profile.cases} == {True, False}
        assert len({case.id for case in profile.cases}) == len(profile.cases)
    assert PROFILES["quick"].cases[-1].id == "block-8-entropy_threshold-add0.5"


def test_a_commit_that_is_not_there(repository, tmp_path, capsys):
    assert main(["--base", "no-such-branch"], root=repository) == FAILED
    assert "--base no-such-branch names no commit of" in capsys.readouterr().err
    shutil.copy(ROOT / "sample_200.jsonl", tmp_path)
    assert main(["--base", "HEAD"], root=tmp_path) == FAILED
    assert "not a git repository" in capsys.readouterr().err


TINY = (
    GateCase("block", 8, "low_confidence", max_tokens=8, rows=1, denoising_steps=2),
    GateCase("block", 8, "threshold", max_tokens=8, rows=1),
)


def test_a_real_run(clone, temporary, monkeypatch, capsys):
    """head's engine is given half more work, and its threshold another default, which takes more forwards. One of nine
    pairs may go another way, where other tests run beside."""
    monkeypatch.setitem(cases.PROFILES, "quick", Profile(TINY, pairs=9))
    monkeypatch.setattr(measure, "PAIRS_A_ROUND", 1)
    monkeypatch.setenv(SLOWDOWN, "0.5")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    rules = clone / "blockinfer" / "decoding" / "unmasking.py"
    text = rules.read_text()
    assert text.count("default=0.9)") == 1
    rules.write_text(text.replace("default=0.9)", "default=1.0)"))
    assert main(["--base", "HEAD", "--profile", "quick"], root=clone) == REGRESSION
    printed = capsys.readouterr().out
    base, worked_on = re.match(r"base (\w+), head (\w+\+); 9 pairs a case, margin 2.5 %", printed).groups()
    assert worked_on == base + "+" and "head is made worse by 50 %" in printed
    for case in TINY:
        ratio = re.search(rf"REGRESSION {case.id}: CPU time is (\S+) times", printed)
        assert ratio, printed
        # of a few ms, on a machine that may have other work; the second case takes more forwards besides
        assert 1.1 < float(ratio[1]) < (2 if case is TINY[0] else 9)
    rises = re.findall(r"REGRESSION (\S+): \d+ forwards where there were \d+", printed)
    assert rises == ["block-8-threshold"] and printed.endswith("head fails\n")
    between, after = re.search(r"MB between units: (\S+) -> (\S+)", printed).groups()
    assert between == after and float(between) > 10
    assert_nothing_is_left(clone, temporary)


def test_a_case_that_base_does_not_take(clockwork, repository, monkeypatch, capsys):
    def reply(self):
        unknown = self.side == "base" and self.request.get("params", {}).get("unmasking") == "threshold"
        return {"unsupported": "no such rule"} if unknown else Clockwork.answer(self)

    monkeypatch.setattr(Clockwork, "answer", Clockwork.reply, raising=False)
    monkeypatch.setattr(Clockwork, "reply", reply)
    assert main(["--base", "HEAD", "--profile", "quick", "--margin", "50"], root=repository) == PASSES
    said = "block-32-threshold: base does not take it, so it is not judged: no such rule"
    assert said in capsys.readouterr().out
    monkeypatch.setitem(cases.PROFILES, "quick", Profile((FREE,), LEAST_PAIRS))
    assert main(["--base", "HEAD", "--profile", "quick"], root=repository) == FAILED
    assert "base takes none of the cases" in capsys.readouterr().out


def test_the_options_decide(clockwork, repository, monkeypatch, capsys):
    def gate(*options):
        Clockwork.log.clear()
        return main(["--base", "HEAD", "--profile", "quick", *options], root=repository)

    assert gate() == PASSES
    monkeypatch.setenv(SLOWDOWN, "0.1")
    assert gate() == REGRESSION and gate("--margin", "12") == PASSES
    monkeypatch.setenv(SLOWDOWN, "0.1:entropy")
    capsys.readouterr()
    assert gate() == REGRESSION
    said = capsys.readouterr().out
    assert set(re.findall(r"REGRESSION (\S+):", said)) == {"block_refresh-32-entropy"}
    monkeypatch.setenv(SLOWDOWN, "0.1:memory")
    assert gate() == REGRESSION and gate("--memory-margin", "12") == PASSES
    monkeypatch.setenv(SLOWDOWN, "0")
    for part, where in (
        ("held", "REGRESSION: the tensors that stay "),
        ("peak", "REGRESSION block-32-threshold: the "),
    ):
        monkeypatch.setattr(Clockwork, "more_memory", {"held": 0, "peak": 0, part: 31})
        assert gate() == REGRESSION and where in capsys.readouterr().out
    monkeypatch.setattr(Clockwork, "more_memory", {"held": 30, "peak": 30})
    assert gate() == PASSES
    monkeypatch.setattr(Clockwork, "more_forwards", 1)
    accept = [f"--accept=nfe={case.id}" for case in PROFILES["quick"].cases]
    assert gate() == REGRESSION and gate(*accept[1:]) == REGRESSION and gate(*accept) == PASSES
    capsys.readouterr()
    assert gate(*accept, "--pairs", "41") == PASSES and "; 41 pairs a case, " in capsys.readouterr().out
    assert len(Clockwork.log) == 7 * 2 * (9 + 41)


def test_a_small_model_that_changed_is_told(clockwork, clone, capsys):
    model = clone / "evals" / "llada_tiny"
    (model / "config.json").write_text("{}")
    (model / "tokenizer_config.json").unlink()
    main(["--base", "HEAD", "--profile", "quick"], root=clone)
    assert "the small models differ: config.json, tokenizer_config.json\n" in capsys.readouterr().out


def test_rows_that_cannot_be_read(clone, capsys):
    (clone / "sample_200.jsonl").unlink()
    assert main(["--base", "HEAD"], root=clone) == FAILED
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("gate: head's rows cannot be read: the dataset '")


def test_a_checkout_that_cannot_be_imported_gives_no_verdict(clone):
    (clone / "evals" / "questions" / "prompts.py").write_text("raise RuntimeError('broken on purpose')")
    done = subprocess.run([sys.executable, "-m", "evals", "gate", "--base", "HEAD"], cwd=clone, capture_output=True)
    assert done.returncode == FAILED and b"RuntimeError: broken on purpose" in done.stderr


@pytest.mark.parametrize("lacking", ["evals/llada_tiny/tokenizer.json", "evals/llada_tiny", "blockinfer/llm.py"])
def test_a_base_that_lacks_a_file(clone, capsys, lacking):
    git(clone, "rm", "-r", "--quiet", lacking)
    git(clone, "-c", "user.name=gate", "-c", "user.email=gate@localhost", "commit", "--no-gpg-sign", "-m", "lacking")
    git(clone, "checkout", "HEAD~1", "--", lacking)
    assert main(["--base", "HEAD", "--profile", "quick"], root=clone) == FAILED
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("gate: base failed: ")
