"""The study of several blocks open at once: what it measures, and its tables."""

from blockinfer import SamplingParams
from blockinfer.decoding.modes import MODES
from evals.llada_tiny import several_blocks, study
from evals.llada_tiny.measured import Result, label, window_label
from evals.llada_tiny.problems import SOURCES
from evals.runs.settings import TINY_MODEL


def test_every_configuration_has_one_block_at_a_time_to_compare_with():
    for mode in MODES:
        found = [(label(rule), window_label(window)) for rule, window in several_blocks.plan(mode, 8)]
        assert len(set(found)) == len(found) and {rule for rule, _ in found} >= {
            "threshold 0.9",
            "entropy_threshold 0.5",
        }
        assert all((rule, "one block") in found and (rule, "add 0.5") in found for rule, _ in found)
        for rule, window in several_blocks.plan(mode, 8):
            params = SamplingParams(mode=mode, block_length=8, **rule, **window)
            # the schedule of a block that is not active would stand still
            scheduled = rule["unmasking"] == "low_confidence"
            assert params.decoded_token_threshold == (params.block_add_threshold if scheduled else 1.0)
    windows = {window_label(window) for _, window in several_blocks.plan("block", 8)}
    assert windows >= {"add 0.1", "suffix 8", "suffix 32", "add 0.5, suffix 8", "add 0.5, delay 2"}


def result(rule, window, right, tokens, forwards, mode="block"):
    return Result(mode, rule, dict.fromkeys(SOURCES, right), tokens, tokens + 1, forwards, 8, window)


def test_the_tables():
    """AUP: with the best accuracy of all; 50 and 100 are more than 5 apart, so that the first counts alone."""
    all_right, half, most = [True] * 20, [True, False] * 10, [True] * 19 + [False]
    results = [
        result("low_confidence 4 steps", "one block", all_right, 2.0, 100),
        result("threshold 0.9", "one block", all_right, 4.0, 50),
        result("low_confidence 4 steps", "add 0.5", half, 4.0, 50),
        result("threshold 0.9", "add 0.5", most, 5.0, 40),
    ]
    found = several_blocks.document(results, 20).splitlines()
    assert "| mode | block length | one block | add 0.5 |" in found
    # 200 + 2 x 100, and 200 + (50 e^-1.5 + 95 e^-0.15) / 2
    assert "| `block` | 8 | 400 | 246 |" in found
    assert "| `block` | threshold 0.9 | one block | 100.0 | 4.00 | 5.00 | 50 |  |" in found
    assert "| `block` | threshold 0.9 | add 0.5 | 95.0 | 5.00 | 6.00 | x 0.80 | 5.0 (4, 0), p 0.12 |" in found


def test_a_study_of_it(monkeypatch, tmp_path):
    """The schedule of the small model in two blocks at once takes fewer forwards."""
    plan = [(rule, window) for rule, window in several_blocks.plan("block", 8) if rule["unmasking"] == "low_confidence"]
    monkeypatch.setattr(several_blocks, "plan", lambda mode, block_length: plan[:2])
    command = ["--rows", "1", "--several-blocks", "--block-length", "8,16", "--mode", "block", "--out", str(tmp_path)]
    study.main([str(TINY_MODEL), *command])
    text = (tmp_path / "study.md").read_text()
    assert "Block length 8." in text and "Block length 16." in text and not (tmp_path / "study.svg").exists()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `block` | low_confidence")]
    assert [row[2] for row in rows] == ["one block", "add 0.5"] * 2
    for one, half in (rows[:2], rows[2:]):
        assert int(one[6]) > 30 and float(half[6].removeprefix("x ")) < 0.8
