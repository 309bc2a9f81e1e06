"""The reference with several blocks open: the rows of each forward, and what a step chooses, by hand."""

import math

import pytest
import torch

from tests import reference_windows
from tests.reference import Prediction, Settings
from tests.reference_windows import OpenBlock, choose

# A prompt of 3, three blocks of 4 in two steps each, the next one open and active at half: four steps. Of each forward
# its rows and how many keys it is given before and after them.
ROWS = {
    ("vanilla", 0, 0): [(0, 15, 0, 0)] * 4,
    ("prefix_cache", 0, 0): [(0, 15, 0, 0), (3, 15, 3, 0), (0, 15, 0, 0), (0, 15, 0, 0)],
    ("dual_cache", 0, 0): [(0, 15, 0, 0), (3, 11, 3, 4), (0, 15, 0, 0), (0, 15, 0, 0)],
    ("block_refresh", 0, 0): [(0, 7, 0, 0), (3, 11, 3, 0), (0, 15, 0, 0), (0, 15, 0, 0)],
    ("block_refresh", 1, 0): [(0, 8, 0, 0), (3, 12, 3, 0), (0, 15, 0, 0), (0, 15, 0, 0)],
    ("block", 0, 0): [(3, 7, 3, 0), (3, 11, 3, 0), "3-7", (7, 15, 7, 0), "7-11", (11, 15, 11, 0)],
    ("block", 2, 0): [(3, 9, 3, 0), (3, 13, 3, 0), "3-7", (7, 15, 7, 0), "7-11", (11, 15, 11, 0)],
    ("block", 99, 0): [(3, 15, 3, 0), (3, 15, 3, 0), "3-7", (7, 15, 7, 0), "7-11", (11, 15, 11, 0)],
    ("block", 0, 1): [(3, 7, 3, 0), (3, 11, 3, 0), (3, 15, 3, 0), "3-7", (7, 15, 7, 0)],
    ("block", 3, 2): [(3, 10, 3, 0), (3, 14, 3, 0), (3, 15, 3, 0), (3, 15, 3, 0)],
}


@pytest.mark.parametrize("mode, suffix_window, commit_delay", ROWS)
def test_rows_by_hand(model, monkeypatch, mode, suffix_window, commit_delay):
    forward, seen = model.forward, []

    def spy(tokens, first=0, before=None, after=None):
        lengths = [len(kv[0][0]) if kv else 0 for kv in (before, after)]
        seen.append((first, first + len(tokens), *lengths))
        return forward(tokens, first, before, after)

    monkeypatch.setattr(model, "forward", spy)
    options = dict(max_tokens=12, block_length=4, denoising_steps=2, block_add_threshold=0.5)
    settings = Settings(mode=mode, **options, decoded_token_threshold=0.5, suffix_window=suffix_window,
                        commit_delay=commit_delay)  # fmt: skip
    result = reference_windows.generate(model, [5, 6, 7], settings)
    rows = ["prompt"] * (mode == "block") + ROWS[mode, suffix_window, commit_delay]
    commits = {"prompt": (0, 3, 0, 0), "3-7": (3, 7, 3, 0), "7-11": (7, 11, 7, 0)}
    assert seen == [commits.get(row, row) for row in rows]
    assert [step.open for step in sum(result.blocks, [])] == [(0,), (0, 1), (1, 2), (2,)]
    assert [len(step.revealed) for step in sum(result.blocks, [])] == [2, 4, 4, 2]


def open_block(confidence=(), entropy=(), quota=None, last=False) -> OpenBlock:
    """Masked positions of these confidences or entropies."""
    n = len(confidence) or len(entropy)
    scores = [c - 1 for c in confidence] or [0.0] * n
    prediction = Prediction([1] * n, [9.0] * n, scores, list(entropy) or [0.0] * n)
    return OpenBlock(list(range(n)), torch.empty(n, 0), prediction, quota, last)


def chosen(rule: str, *blocks: OpenBlock, **options) -> tuple[list[int], list[int]]:
    indices, _, guaranteed, _ = choose(list(blocks), Settings(unmasking=rule, **options))
    return indices, guaranteed


def test_open_blocks_are_one_to_the_rules_without_a_schedule():
    sure, unsure = open_block([0.5, 0.95, 0.6]), open_block([0.2, 0.3, 0.3])
    assert chosen("threshold", sure, unsure, threshold=0.9) == ([1], [])
    # the best one of the first block with masks, the lowest position among equals, beside what the rule chose
    assert chosen("threshold", unsure, sure, threshold=0.9) == ([1, 4], [1])
    assert chosen("threshold", unsure, unsure, threshold=0.9) == ([1], [])
    assert chosen("threshold", open_block([0.2]), open_block([0.3]), threshold=0.9) == ([0, 1], [0])
    # bars for factor 1: -, 2/3, 3/4, 4/5
    assert chosen("factor", open_block([0.74, 0.1]), open_block([0.9, 0.8])) == ([0, 2, 3], [0])
    assert chosen("factor", open_block([0.76, 0.1]), open_block([0.9, 0.8])) == ([0, 2, 3], [])
    low, high = open_block(entropy=[0.1, 0.02]), open_block(entropy=[0.9, 0.8, 0.8])
    assert chosen("entropy", low, high, entropy_bound=0.15) == ([0, 1, 3], [])  # .02 + .1 are before the third
    assert chosen("entropy", high, low, entropy_bound=0.05) == ([1, 3, 4], [1])
    assert chosen("entropy_threshold", high, low, entropy_threshold=0.05) == ([1, 4], [1])
    assert chosen("entropy_threshold", low, high, entropy_threshold=0.8) == ([0, 1, 3, 4], [])
    assert chosen("entropy_threshold", open_block(entropy=[math.inf] * 2), low) == ([0, 2, 3], [0])


def test_a_step_limit_reveals_its_own_block():
    unsure = [0.2, 0.3]
    assert chosen("threshold", open_block(unsure, last=True), open_block([0.4, 0.95]))[0] == [0, 1, 3]
    assert chosen("threshold", open_block(unsure), open_block(unsure, last=True))[0] == [1, 2, 3]
    both = [open_block(unsure, last=True)] * 2
    assert choose(both, Settings(unmasking="factor")) == ([0, 1, 2, 3], 9.0, [], [0, 1, 2, 3])


def test_each_block_has_its_own_schedule():
    blocks = [open_block([0.2, 0.3, 0.1], quota=2), open_block([0.9, 0.95]), open_block([0.5, 0.6], quota=1)]
    assert chosen("low_confidence", *blocks) == ([0, 1, 6], [])
    assert chosen("sequential", *blocks) == ([0, 1, 5], [])
    assert choose(blocks, Settings())[1] == pytest.approx(0.1)


def test_margins_of_several_blocks():
    """How close a step was to another choice: at the rule's cut, and in the guarantee."""
    sure, unsure = open_block([0.5, 0.95]), open_block([0.2, 0.3, 0.31])
    assert choose([unsure, sure], Settings(unmasking="threshold", threshold=0.9))[1] == pytest.approx(0.01)
    assert choose([sure, unsure], Settings(unmasking="threshold", threshold=0.9))[1] == pytest.approx(0.05)
    unsure.prediction.token_margins[0] = 0.002
    unsure.last = True
    assert choose([sure, unsure], Settings(unmasking="threshold", threshold=0.9))[1] == 0.002
