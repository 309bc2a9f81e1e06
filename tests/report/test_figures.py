"""What the report computes: baselines, frontier, names, and the geometry of its charts."""

import dataclasses
from itertools import combinations, product

from hypothesis import given
from hypothesis import strategies as st

from blockinfer import SamplingParams
from blockinfer.decoding.unmasking import RULES
from evals.report import page
from evals.report.beside import baselines, names, on_frontier, series, speed_up
from evals.report.charts import Point, history, scatter
from evals.report.labels import MARK, Box, shortened, width_of
from evals.results import comparison
from evals.results.reader import read_run
from evals.results.schema import Configuration
from evals.runs.configurations import PLAIN, REFERENCE_IMPL, SCHEDULED, STANDARD, total_steps
from evals.runs.run import Run
from evals.runs.settings import SUITE_MODES, Case
from tests.report.sample import info, results, write

shares = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
speeds = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 2.0, 3.0]))
points = st.lists(
    st.tuples(st.floats(0.1, 5000), st.sampled_from([k / 8 for k in range(9)]) | st.floats(0, 1), st.booleans()),
    min_size=1,
    max_size=14,
)


def test_speed_ups_are_those_of_the_suite():
    """For the modes, block lengths, rules and step limits of a session: the baselines that the suite's table has."""
    for max_tokens, steps in [(128, 32), (100, 8), (100, 32), (128, None)]:
        rules = ["low_confidence", "threshold"] if steps else ["threshold", "entropy"]
        runs, configurations = [], []
        for mode, block_length, rule in product((*SUITE_MODES, REFERENCE_IMPL), (8, 32, 64), rules):
            params = SamplingParams(
                max_tokens=max_tokens, block_length=block_length, denoising_steps=steps, unmasking=rule
            )
            begins = range(0, max_tokens, block_length)
            blocks = [params.block_steps(min(block_length, max_tokens - begin)) for begin in begins]
            assert total_steps(params) == (sum(blocks) if steps else None)
            if mode == STANDARD:
                params = dataclasses.replace(params, block_length=max_tokens, denoising_steps=total_steps(params))
            runs.append(Run(Case(mode, block_length, rule, params), [], None, [1.0], 1, None))
            fields = {f: getattr(params, f) for f in ("block_length", "unmasking", "denoising_steps", "max_tokens")}
            configurations.append(Configuration(mode=mode, asked_block_length=block_length, **fields))
        for run, c in zip(runs, configurations, strict=True):
            expected = [None if r is None else runs.index(r) for r in comparison.baselines(run.case, runs)]
            found = [None if b is None else configurations.index(b) for b in baselines(configurations)(c)]
            assert found == expected and expected[1] is not None


def test_what_the_page_knows_of_modes_and_rules_is_the_suites():
    assert page.MODES == (*SUITE_MODES, REFERENCE_IMPL) and len(set(page.MARKS)) == len(page.MODES) + 1
    assert set(SCHEDULED) == {name for name, rule in RULES.items() if rule.scheduled}


@given(st.lists(st.tuples(speeds, shares), min_size=1, max_size=8))
def test_the_frontier_is_what_nothing_beats(pairs):
    run = [Configuration(mode="block", tokens_per_second=s, accuracy=a) for s, a in pairs]
    flags = on_frontier(run)

    def beats(a, b):
        return a[0] >= b[0] and a[1] >= b[1] and a != b

    frontier = [p for p, on in zip(pairs, flags, strict=True) if on]
    for pair, on in zip(pairs, flags, strict=True):
        if None in pair:
            assert not on
        else:
            assert on != any(beats(other, pair) for other in frontier)
    assert not any(beats(a, b) for a in frontier for b in frontier)
    assert frontier or all(None in p for p in pairs)


@given(points, st.sampled_from([page.WIDE, page.NARROW]))
def test_labels_cover_neither_marks_nor_each_other(drawn, size):
    found = scatter([Point(i, "name" * (1 + i % 5), s, a, None, on) for i, (s, a, on) in enumerate(drawn)], *size)
    labels = [m.label for m in found.marks if m.label]
    boxes = [Box(label.left, label.y - 7.5, label.left + width_of(label.text), label.y + 7.5) for label in labels]
    marks = [Box(m.x - MARK, m.y - MARK, m.x + MARK, m.y + MARK) for m in found.marks]

    def overlap(a, b):
        # coordinates are rounded to a tenth
        return min(a.right, b.right) - max(a.left, b.left) > 0.3 and min(a.bottom, b.bottom) - max(a.top, b.top) > 0.3

    assert not any(overlap(a, b) for a, b in combinations(boxes, 2))
    assert not any(overlap(a, b) for a in boxes for b in marks)
    assert all(box.left >= found.area.left - 0.3 and box.right <= found.area.right + 0.3 for box in boxes)
    assert all(
        found.area.left <= m.x <= found.area.right and found.area.top <= m.y <= found.area.bottom for m in found.marks
    )
    for ticks in (found.x_ticks, found.y_ticks):
        assert len(ticks) >= 2 and len({text for _, text in ticks}) == len(ticks)


def test_a_lone_mark_is_labelled_with_its_name():
    (mark,) = scatter([Point(1, "block", 20.0, 0.5, (0.4, 0.6), True)], *page.WIDE).marks
    assert mark.label.text == "block" and mark.label.leader is None and mark.band[0] < mark.y


def test_ticks_are_at_their_values():
    found = scatter([Point(1, "a", 10.0, 0.2, None, True), Point(2, "b", 1000.0, 0.6, None, True)], *page.WIDE)
    at = {text: x for x, text in found.x_ticks}
    assert found.logarithmic and at["10"] == found.marks[0].x and at["1,000"] == found.marks[1].x
    assert dict((text, y) for y, text in found.y_ticks)["20"] == found.marks[0].y


def test_the_history_is_drawn_from_zero():
    drawn = history([50.0, None, 100.0, 25.0], ["aaaaaaa", "bbbbbbb", "ccccccc", "ddddddd"])
    heights = [None if s.y is None else drawn.base - s.y for s in drawn.steps]
    assert heights[1] is None and heights[0] == heights[2] / 2 == heights[3] * 2 > 0
    assert drawn.lines == [(drawn.steps[2], drawn.steps[3])], "no line over a run that did not measure it"
    assert [text for *_, text in drawn.values] == ["50.0", "25.0 (−75.0 %)"]
    assert [text for *_, text in drawn.commits] == ["aaaaaaa", "ddddddd"]


def test_names_tell_configurations_apart():
    def of(*cases):
        found = [Configuration(**{k: v for k, v in info(*case).items() if v is not None}) for case in cases]
        return names(found)

    assert of(("vanilla_llada",), ("vanilla",), ("block",)) == ["vanilla_llada", "vanilla", "block"]
    assert of(("vanilla_llada",), ("block", 8), ("block", 32)) == ["vanilla_llada", "block 8", "block 32"]
    assert of(("block",), ("block", 32, "entropy")) == ["block low_confidence", "block entropy"]
    assert of(("block",), ("block",)) == ["block (1)", "block (2)"]
    opened = [info("vanilla_llada"), info("block"), info("block", block_add_threshold=0.5, suffix_window=8)]
    found = [Configuration(**{k: v for k, v in one.items() if v is not None}) for one in opened]
    assert names(found) == ["vanilla_llada", "block", "block add 0.5 suffix 8"]
    assert names(found[::2]) == ["vanilla_llada", "block"]
    standard = Configuration(mode="vanilla_llada", block_length=128, denoising_steps=64)
    other = standard.model_copy(update={"denoising_steps": 128})
    assert names([standard, other]) == ["vanilla_llada 64 steps", "vanilla_llada 128 steps"]


def test_speed_up_of_nothing_is_not_known():
    nothing, something = (Configuration(mode="block", tokens_per_second=s) for s in (0.0, 2.0))
    assert speed_up(something, nothing) is None and speed_up(nothing, something) == 0.0
    assert speed_up(something, None) is None


def test_speed_ups_are_over_vanilla_with_as_many_blocks_open():
    """A suffix and a delayed commit it has not."""
    one, several = (Configuration(mode="vanilla", block_add_threshold=share) for share in (1.0, 0.5))
    for share, vanilla in ((1.0, one), (0.5, several)):
        block = Configuration(mode="block", block_add_threshold=share, suffix_window=8, commit_delay=1)
        assert baselines([one, several, block])(block)[1] is vanilla
    other = Configuration(mode="block", block_add_threshold=0.25)
    assert baselines([one, several, other])(other)[1] is None


def test_the_same_configuration_in_another_run_has_as_many_blocks_open(tmp_path):
    """An older file, which does not say how many, is of one at a time."""
    older = read_run(write(tmp_path / "older.json", results([info("block")])))
    (one,) = older.configurations
    assert {name: getattr(one, name) for name in PLAIN} == PLAIN
    opened = one.model_copy(update={"block_add_threshold": 0.5})
    assert series([opened], [older]) == [[None]] and series([one], [older]) == [[one.tokens_per_second]]


def test_baselines_of_unknown_steps_are_none():
    """A null is "no limit" and equals another; a field that the file lacks equals nothing."""
    standard, block = (Configuration(mode=m, max_tokens=64, block_length=64) for m in ("vanilla_llada", "block"))
    assert baselines([standard, block])(block)[0] is None
    known = [c.model_copy(update={"denoising_steps": None}) for c in (standard, block)]
    assert baselines(known)(known[1])[0] is known[0]


def test_names_are_cut_where_they_would_be_too_wide():
    assert shortened("block_refresh 16 low_confidence", 220) == "block_refresh 16 low_confidence"
    for name in ("W" * 100, "i" * 100, "block " * 20, "ブロック" * 9):
        cut = shortened(name, 220)
        assert cut.endswith("…") and name.startswith(cut[:-1]) and 200 < width_of(cut) <= 220


@given(points, st.sampled_from([page.WIDE, page.NARROW]))
def test_no_mark_lies_under_another(drawn, size):
    """Whatever coincides: each mark stands in its place or is tied to it, and those that cover nothing are in it."""
    drawn = drawn + drawn[:2]
    found = scatter([Point(i, "name", s, a, None, on) for i, (s, a, on) in enumerate(drawn)], *size)
    for one, other in combinations(found.marks, 2):
        assert max(abs(one.x - other.x), abs(one.y - other.y)) > 5
    moved = [m for m in found.marks if m.moved_from]
    assert len(moved) >= min(2, len(drawn) // 2)
    for mark in moved:
        x, y = mark.moved_from
        assert 0 < max(abs(mark.x - x), abs(mark.y - y)) <= 6 * MARK
        assert any(max(abs(o.x - x), abs(o.y - y)) < 6 for o in found.marks if o is not mark)


def test_marks_that_are_apart_stay_where_they_are():
    found = scatter([Point(1, "a", 10.0, 0.2, None, True), Point(2, "b", 12.0, 0.6, None, True)], *page.WIDE)
    assert [mark.moved_from for mark in found.marks] == [None, None]
