"""Several blocks open at once, and editing: the suite's options, who reads them, and what differs in them alone."""

import json

import pytest

from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from evals.conftest import _id
from evals.results.comparison import write_comparison
from evals.results.record import question
from evals.results.table import aup_lines, table
from evals.runs import configurations
from evals.runs.extras import _READERS
from evals.runs.resume import settings_hash
from tests.suite.test_samples import lines

SCHEDULED = ["low_confidence", "scheduled_threshold"]
OPEN = {"block_add_threshold": 0.5}
EDITED = {"editing_threshold": 0.9, "max_post_steps": 2}


def ids(s):
    return [_id(case, s.several_rules) for case in s.cases]


def given(cases, name):
    default = configurations.PLAIN[name]
    return {c.mode for c in cases if getattr(c.params, name) != default}


def test_what_is_known_without_torch_is_what_the_engine_has(settings):
    (params,) = {c.params for c in settings(mode=["block"]).cases}
    assert {name: getattr(params, name) for name in configurations.EXTRAS} == configurations.PLAIN
    assert {name: RULES[name].default for name in configurations.RULE_DEFAULTS} == configurations.RULE_DEFAULTS
    assert _READERS.keys() == configurations.EXTRAS.keys()


def test_an_option_reaches_the_modes_that_read_it(settings):
    cases = settings(**OPEN).cases
    assert given(cases, "block_add_threshold") == set(MODES), "and not the standard decoding"
    cases = settings(suffix_window=8, commit_delay=1).cases
    assert given(cases, "suffix_window") == {"block", "block_refresh"} and given(cases, "commit_delay") == {"block"}
    rules = [*SCHEDULED, "threshold"]
    both = settings(**OPEN, decoded_token_threshold=0.5, unmasking=rules, mode=["vanilla_llada", "block"]).cases
    read = [(c.mode, c.unmasking) for c in both if c.params.decoded_token_threshold < 1]
    assert read == [("block", rule) for rule in SCHEDULED]
    limited = settings(**OPEN, decoded_token_threshold=0.5, unmasking=rules, mode=["block"], denoising_steps=4).cases
    assert [c.params.decoded_token_threshold for c in limited] == [0.5, 0.5, 0.5]
    edited = settings(**EDITED).cases
    assert given(edited, "editing_threshold") == given(edited, "max_post_steps") == set(MODES)
    rules = ["threshold", "entropy_threshold", "factor", "entropy"]
    four = settings(unmasking=rules, mode=["block"], entropy_threshold=0.1, factor=0.5, entropy_bound=2.0).cases
    assert [c.params.rule_value for c in four] == [0.9, 0.1, 0.5, 2.0]
    assert [configurations.variant(c.params) for c in four] == ["", "0.1", "0.5", "2"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"entropy_threshold": 0.1},
            "--entropy-threshold is read by --unmasking entropy_threshold alone, got low_conf",
        ),
        ({"factor": 2.0}, "--factor is read by --unmasking factor alone, got low_conf"),
        ({"entropy_bound": 2.0}, "--entropy-bound is read by --unmasking entropy alone, got low_conf"),
        (
            {**OPEN, "mode": ["vanilla_llada"]},
            "--block-add-threshold is read by modes but vanilla_llada alone, got --mode",
        ),
        ({"block_add_threshold": 1.5}, "block_add_threshold must be between 0.0 and 1.0, got 1.5"),
        ({"block_add_threshold": float("nan")}, "block_add_threshold must be a finite number"),
        (
            {"decoded_token_threshold": 0.5},
            "--decoded-token-threshold is read below --block-add-threshold 1 alone: pass that too",
        ),
        ({**OPEN, "decoded_token_threshold": -1.0}, "decoded_token_threshold must be between 0.0 and 1.0, got -1.0"),
        (
            {**OPEN, "decoded_token_threshold": 0.5, "unmasking": ["threshold"]},
            "--decoded-token-threshold is read by .* at rules with a schedule, .*--unmasking threshold",
        ),
        (
            {"suffix_window": 8, "mode": ["vanilla"]},
            "--suffix-window is read by modes block and block_refresh alone, got",
        ),
        (
            {"commit_delay": 1, "mode": ["block_refresh"]},
            "--commit-delay is read by mode block alone, got --mode block_r",
        ),
        ({**EDITED, "mode": ["vanilla_llada"]}, "--editing-threshold is read by modes but vanilla_llada alone, got"),
        ({"max_post_steps": 2}, "--max-post-steps is read with --editing-threshold alone: pass that too"),
        ({**EDITED, **OPEN}, "editing_threshold=0.9"),
    ],
)
def test_what_no_chosen_mode_and_rule_reads_is_refused(settings, changed, message):
    with pytest.raises(pytest.UsageError, match=message):
        settings(**changed)


@pytest.mark.parametrize("option", ["--suffix-window=-1", "--commit-delay=1.5", "--block-add-threshold=half"])
def test_what_is_no_number_is_refused(pytestconfig, option):
    with pytest.raises((pytest.UsageError, SystemExit), match=f"argument {option.partition('=')[0]}: "):
        pytestconfig._parser.parse([option])


def test_ids_are_the_same_with_the_defaults_and_say_what_differs(settings):
    default = [f"{mode}-32" for mode in ("vanilla_llada", *MODES)]
    said = {"block_add_threshold": 1.0, "suffix_window": 0, "commit_delay": 0}
    assert ids(settings()) == ids(settings(**said)) == default
    assert ids(settings(unmasking=["entropy_threshold"], mode=["block"])) == ["block-32-entropy_threshold"]
    opened = settings(**OPEN, decoded_token_threshold=0.25, suffix_window=8, commit_delay=2)
    assert ids(opened) == [
        "vanilla_llada-32",
        *(f"{mode}-32-add0.5-active0.25" for mode in ("vanilla", "prefix_cache", "dual_cache")),
        "block-32-add0.5-active0.25-suffix8-delay2",
        "block_refresh-32-add0.5-active0.25-suffix8",
    ]
    assert ids(settings(**EDITED, mode=["block"])) == ["block-32-edit0.9-post2"]
    other = settings(unmasking=["entropy_threshold"], mode=["block"], entropy_threshold=0.1, **OPEN)
    assert ids(other) == ["block-32-entropy_threshold-0.1-add0.5"] == [case.name for case in other.cases]


VARIANTS = [
    {},
    OPEN,
    {**OPEN, "decoded_token_threshold": 0.5},
    {"suffix_window": 8},
    {"commit_delay": 1},
    {"editing_threshold": 0.9},
    EDITED,
    {"entropy_threshold": 0.1},
]


def test_no_two_configurations_are_taken_for_the_same(settings):
    """By nothing that tells them apart: ids, what is kept for resuming, what is stored and compared."""
    rule = {"unmasking": ["entropy_threshold"], "mode": ["block"], "denoising_steps": 8}
    found = [settings(**rule, **v) for v in VARIANTS]
    cases = [case for s in found for case in s.cases]
    about = {"model": "m", "dtype": "float32"}
    for names in (
        [case.name for case in cases],
        [settings_hash("model", case.params) for case in cases],
        [str(question(case, s, 0, about)) for case, s in zip(cases, found, strict=True)],
        [configurations.rule_name(case.params) for case in cases],
    ):
        assert len(set(names)) == len(VARIANTS)


def test_a_run_says_which_blocks_were_open(make_suite, tmp_path):
    """In its record, its answers, its file of ratios and its table; and the answers are those of several blocks."""
    path = tmp_path / "answers.jsonl"
    changed = dict(**OPEN, suffix_window=8, block_length=[4], unmasking=["threshold", "entropy_threshold"])
    changed |= dict(mode=["vanilla_llada", "vanilla", "block"], entropy_threshold=8.0, threshold=0.0)
    suite = make_suite(samples=str(path), **changed)
    runs = [suite.measure(case, None) for case in suite.settings.cases]
    infos = {run.case.name: suite.extra_info(run) for run in runs}
    assert list(infos) == [
        "vanilla_llada-4-threshold",
        "vanilla_llada-4-entropy_threshold-8",
        "vanilla-4-threshold-add0.5",
        "vanilla-4-entropy_threshold-8-add0.5",
        "block-4-threshold-add0.5-suffix8",
        "block-4-entropy_threshold-8-add0.5-suffix8",
    ]
    block = infos["block-4-threshold-add0.5-suffix8"]
    assert [block[name] for name in configurations.EXTRAS] == [0.5, 1.0, 8, 0, None, None]
    assert infos["vanilla_llada-4-threshold"]["block_add_threshold"] == 1.0
    variants = [one["variant"] for one in lines(path)]
    assert list(dict.fromkeys(variants)) == ["", "8", "add0.5", "8-add0.5", "add0.5-suffix8", "8-add0.5-suffix8"]
    write_comparison(str(tmp_path / "results.json"), runs, suite.settings, suite.environment)
    written = json.loads((tmp_path / "results.json").read_text())
    assert [written["settings"][name] for name in configurations.EXTRAS] == [0.5, 1.0, 8, 0, None, None]

    head, *rows = table(runs)
    assert [row[21 : head.index("tokens/s")].split("  ")[0].strip() for row in rows] == [
        " ".join(filter(None, [run.case.unmasking, *configurations.variant(run.case.params).split("-")]))
        for run in runs
    ]
    ends = {row.index(" %") for row in rows}
    assert len(ends) == 1, "the columns stand under each other"
    (line,) = aup_lines(runs)
    assert line.count("(2 rules)") == 3 and "block 4 add 0.5 suffix 8 " in line and "vanilla_llada 4 " in line
    assert aup_lines(runs[::2]) == []
