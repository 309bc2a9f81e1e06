"""Each mode's segments, written out by hand for one sequence: prompt 5, blocks of 4, 10 new tokens."""

import pytest

from blockinfer.decoding.modes import MODES, BlockState

FIRST = BlockState(
    prompt_len=5, block_length=4, canvas_end=15, block_start=5, block_end=9, suffix_end=9, step=0, num_cached=0
)
SECOND = FIRST._replace(block_start=9, block_end=13, suffix_end=13, num_cached=5)
LAST = FIRST._replace(block_start=13, block_end=15, suffix_end=15, num_cached=9)

EXPECTED = {
    "vanilla": [[(0, 15, 15)], [(0, 15, 15)], [(0, 15, 15)], [(0, 15, 15)]],
    "prefix_cache": [[(0, 15, 15)], [(5, 15, 15)], [(0, 15, 15)], [(13, 15, 15)]],
    "dual_cache": [[(0, 15, 15)], [(5, 9, 15)], [(0, 15, 15)], [(13, 15, 15)]],
    "block": [[(0, 5, 5), (5, 9, 9)], [(5, 9, 9)], [(5, 9, 9), (9, 13, 13)], [(13, 15, 15)]],
    "block_refresh": [[(0, 9, 9)], [(5, 9, 9)], [(0, 13, 13)], [(13, 15, 15)]],
}


def test_every_mode_is_expected_here():
    assert EXPECTED.keys() == MODES.keys()


@pytest.mark.parametrize("mode", MODES)
def test_segments(mode):
    states = [
        FIRST,
        FIRST._replace(step=1, num_cached=5),
        SECOND,
        LAST._replace(step=1, num_cached=13),
    ]
    assert [MODES[mode](state) for state in states] == EXPECTED[mode]


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_asks_for_no_more_of_the_step_than_whether_it_is_the_first(mode):
    """The engine keeps a window's segments from its second step on."""
    for state in (FIRST._replace(num_cached=5), LAST._replace(num_cached=13)):
        second, *later = (MODES[mode](state._replace(step=step)) for step in (1, 2, 3, 100))
        assert all(segments == second for segments in later)


def test_block_rebuilds_each_committed_block_to_its_own_end_after_a_preemption():
    segments = MODES["block"](LAST._replace(num_cached=0))
    assert segments == [(0, 5, 5), (5, 9, 9), (9, 13, 13), (13, 15, 15)]
