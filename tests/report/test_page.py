"""The page: its figures against the file's, its markup, escaping, and that it loads nothing."""

import re
from itertools import product
from pathlib import Path

import pytest

from blockinfer.decoding.modes import MODES
from evals.report import page
from evals.report.command import main
from evals.results.wilson import wilson_interval
from tests.report.html_tree import parse, sections, table
from tests.report.sample import LOSS, info, results, write, write_run

HOSTILE = """</title></style><script>alert("1")</script><img src=http://x.example/ onerror='x'>&amp;{{ 7 * 7 }}"""


def test_the_table_holds_the_files_figures(report):
    infos = [
        info(*case) for case in product(["vanilla_llada", "vanilla", "block"], [32], ["low_confidence", "entropy"])
    ]
    rows = table(report(results(infos)))
    assert len(rows) == 6
    for i, (row, one) in enumerate(zip(rows, infos, strict=True), 1):
        assert row["mode"].removesuffix(" (on the frontier)") == f"{i}{one['mode']}"
        assert row["block positions"] == str(one["block_length"])
        assert float(row["speed tokens/s"].replace(",", "")) == pytest.approx(one["tokens_per_second"], abs=0.05)
        assert float(row["tokens /forward"]) == pytest.approx(one["tokens_per_forward"], abs=0.005)
        assert int(row["NFE forwards"].replace(",", "")) == one["nfe"]
        assert float(row["forward ms"]) == pytest.approx(one["ms_per_forward"], abs=0.05)
        assert float(row["accuracy %"]) == pytest.approx(100 * one["accuracy"], abs=0.05)
        low, high = map(float, row["interval 95 %"].split("–"))
        assert [low, high] == pytest.approx([100 * end for end in one["accuracy_interval"]], abs=0.5)
        assert float(row["latency p50, s"]) == pytest.approx(one["latency_p50"], abs=0.005)
        assert float(row["error ± %"]) == pytest.approx(100 * one["relative_error"], abs=0.05)
        assert float(row["latency p95, s"]) == pytest.approx(one["latency_p95"], abs=0.005)
        for name, mode in [("speed-up × vanilla", "vanilla"), ("speed-up × vanilla_llada", "vanilla_llada")]:
            (base,) = [o for o in infos if (o["mode"], o["unmasking"]) == (mode, one["unmasking"])]
            ratio = one["tokens_per_second"] / base["tokens_per_second"]
            assert float(row[name]) == pytest.approx(ratio, abs=0.005)
    assert {(row["rule"], row["limit steps"]) for row in rows} == {
        *(("low_confidence", "128"), ("low_confidence", "32"), ("entropy 0.15", "none"))
    }


def test_the_table_says_which_blocks_were_open(report):
    """Where not all are one at a time, which an older file does not say."""
    rows = table(report(results([info("block"), info("block", block_add_threshold=0.5, suffix_window=8)])))
    assert [row["extras"] for row in rows] == ["–", "add 0.5, suffix 8"]
    assert "extras" not in table(report(results([info("block")])))[0]


def test_several_rules_of_a_mode_have_a_score(report):
    """AUP of two rules, the slower one first, by hand."""
    few = {"tokens_per_forward": 1.0, "accuracy": 0.9}
    many = {"tokens_per_forward": 5.0, "accuracy": 0.9}
    opened = {"block_add_threshold": 0.5}
    infos = [info("block", 32, "threshold", **many), info("block", **few), info("vanilla", **few)]
    infos += [info("block", 32, "threshold", **opened, **many), info("block", **opened, **few)]
    found = table(report(results(infos)), "aup")
    assert [[cell for cell in row.values()][1:] for row in found] == [
        ["32", "one block", "2", "450"],
        ["32", "add 0.5", "2", "450"],
    ]
    assert not list(report(results([info("vanilla"), info("block")])).all("table", class_="aup"))


def test_speed_and_accuracy_are_the_columns_seen_first(report):
    """A telephone shows the modes' column and two more."""
    assert list(table(report(results([info("block")])))[0])[:3] == ["mode", "speed tokens/s", "accuracy %"]


def test_marks_of_the_same_figures_are_both_seen_and_the_page_says_how(report):
    same = {"tokens_per_second": 90.0, "accuracy": 0.7}
    root = report(results([info("vanilla"), info("block", **same), info("block_refresh", **same)]))
    for size in ("wide", "narrow"):
        (svg,) = root.all("svg", class_=size)
        marks = [g.children[1].attributes["transform"] for g in svg.all("g") if "data-number" in g.attributes]
        assert len(set(marks)) == 3
        assert len(list(svg.all("line", class_="moved"))) == 1
    said = "A mark that would cover another one stands beside it, on a line to its place."
    assert said in root.text and said not in report(results([info("vanilla"), info("block")])).text


def test_a_ratio_stands_with_its_interval_or_says_that_there_was_one_round(report):
    """In the table and in the headline; the ratio to itself has neither."""
    intervals = {"interval_over_vanilla": [4.5, 6.25], "interval_over_standard": None}
    root = report(results([info("vanilla_llada", rounds=1), info("vanilla"), info("block", **intervals)]))
    standard, vanilla, block = table(root)
    assert block["speed-up × vanilla"] == "5.28 (4.50–6.25)"
    assert block["speed-up × vanilla_llada"] == "6.14 (one round)"
    assert vanilla["speed-up × vanilla"] == standard["speed-up × vanilla_llada"] == "1.00"
    assert "5.28 (4.50–6.25) × vanilla, 6.14 (one round) × vanilla_llada" in root.text


def test_the_page_names_the_environment(report):
    root = report(results([info("block")]))
    (about,) = root.all(class_="about")
    said = {d.children[0].text: d.children[1].text for d in about.all("div")}
    one = info("block")
    for name, field in [("model", "model"), ("dtype", "dtype"), ("GPU", "gpu"), ("torch", "torch"), ("rows", "n")]:
        assert said[name] == str(one[field])
    assert said["weights"] == "checkpoint" and said["device"] == "cuda" and said["dataset"] == "rows.jsonl"
    assert said["commit"] == one["commit"] and said["tokens, at most"] == "128" and said["requests at once"] == "32"
    assert "stop token" not in said


def test_the_frontier_is_marked_in_table_and_plots(report):
    pairs = {"vanilla": (10.0, 0.8), "prefix_cache": (20.0, 0.8), "dual_cache": (30.0, 0.6), "block": (25.0, 0.7)}
    infos = [info(mode, tokens_per_second=s, accuracy=a) for mode, (s, a) in pairs.items()]
    root = report(results(infos))
    frontier = ["prefix_cache", "dual_cache", "block"]
    assert [r["mode"][1:].split()[0] for r in table(root) if "frontier" in r["mode"]] == frontier
    for size in ("wide", "narrow"):
        (svg,) = root.all("svg", class_=size)
        marks = {g.children[0].text.split(":")[0]: g.children[1] for g in svg.all("g") if "data-number" in g.attributes}
        assert [name for name, m in marks.items() if "on" in m.attributes["class"].split()] == frontier
        at = {n: [float(v) for v in re.findall(r"[\d.]+", m.attributes["transform"])] for n, m in marks.items()}
        assert at["vanilla"][0] < at["prefix_cache"][0] < at["block"][0] < at["dual_cache"][0]
        assert at["vanilla"][1] == at["prefix_cache"][1] < at["block"][1] < at["dual_cache"][1]
        (line,) = svg.all("polyline")
        corners = [tuple(map(float, c.split(","))) for c in line.attributes["points"].split()]
        assert {tuple(at[name]) for name in frontier} < set(corners)
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(corners, corners[1:], strict=False))
    (plain,) = root.all("table", class_="plain")
    assert [th.text for th in plain.all("th", scope="row")] == ["dual_cache", "block", "prefix_cache"]


def test_the_paired_losses_are_those_of_the_file(report):
    root = report(results([info("vanilla"), info("block", against_vanilla=LOSS | {"won": 15, "loss": -0.03})]))
    (row,) = table(root, "paired")
    assert row == {
        "configuration": "2block",
        **{"lost rows": "9", "won rows": "15", "McNemar p": "0.27"},
        **{"loss points": "−3.0", "at least points": "−0.7", "at most points": "+6.0"},
    }
    assert not list(report(results([info("vanilla")])).all("table", class_="paired"))


def test_what_was_resumed_has_no_speed_and_is_named(report):
    unknown = dict.fromkeys(["tokens_per_second", "ms_per_forward", "latency_p50", "latency_p95", "relative_error"])
    root = report(results([info("vanilla"), info("block", resumed=3, **unknown)]))
    row = table(root)[1]
    assert (row["speed tokens/s"], row["speed-up × vanilla"], row["error ± %"]) == ("–", "–", "–")
    assert row["NFE forwards"] == "15,360" and "leaves the speed unknown: block." in root.text
    assert "Not drawn, for want of an accuracy or a speed: block." in root.text


def test_shards_say_which_they_are(report):
    text = report(results([info("block", shard={"index": 2, "of": 4, "positions": [1], "rows": "h"})])).text
    assert "shard2 of 4" in text and "merged shards" not in text
    text = report(results([info("block", shards=4)])).text
    assert "merged shards4" in text and "The time of merged shards is the slowest one's." in text


def drawn(root):
    """What the charts of the history describe, by configuration."""
    charts = [s for s in root.all("svg") if (s.attributes.get("aria-labelledby") or "").startswith("history")]
    return {next(s.all("title")).text.removeprefix("Tokens per second of "): s for s in charts}


def test_the_history_goes_by_date_whatever_the_order(report):
    now = results([info("block", tokens_per_second=90.0), info("vanilla", tokens_per_second=9.0)], day=3)
    first = results([info("block", tokens_per_second=100.0, commit="aaaaaaaaaaaa+"), info("dual_cache")], day=1)
    commit = "v1.2-3-gbbbbbbbbbbbb"
    second = results([info(m, tokens_per_second=s, commit=commit) for m, s in [("vanilla", 8.0), ("block", 120.0)]], 2)
    for root in [report(now, *order) for order in ([first, second], [second, first, first, now])]:
        said = {name: next(svg.all("desc")).text for name, svg in drawn(root).items()}
        assert said == {
            "block": "aaaaaaa+: 100.0, bbbbbbb: 120.0, 0123456: 90.0.",
            "vanilla": "aaaaaaa+: not measured, bbbbbbb: 8.0, 0123456: 9.0.",
        }
        assert "90.0 (−25.0 %)" in [t.text for t in drawn(root)["block"].all("text")]
        (runs,) = [t for t in root.all("table") if t.text.startswith("commit")]
        assert [th.text for th in runs.all("th", scope="row")] == ["aaaaaaaaaaaa+", commit, "0123456789ab"]


def test_an_older_run_that_lacks_a_field_is_still_compared(report):
    older = {k: v for k, v in info("block").items() if k not in ("prompts_version", "batch_size", "rule_value")}
    root = report(results([info("block")], day=1), results([older | {"tokens_per_second": 100.0}]))
    assert list(drawn(root)) == ["block"]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("dtype", "float32", "dtype: float32, not bfloat16"),
        ("gpu", "NVIDIA A100", "gpu: NVIDIA A100, not NVIDIA H200"),
        ("weights", "random", "weights: random, not checkpoint"),
        ("n", 32, "n: 32, not 200"),
        ("max_tokens", 64, "max_tokens: 64, not 128"),
        ("rows", [["another", 1, 1, True]], "other rows"),
        ("shards", 4, "shards: 4, not 1"),
    ],
)
def test_a_run_under_other_conditions_is_left_out_with_the_reason(report, field, value, reason):
    root = report(results([info("block")], day=1), results([info("block", **{field: value})]))
    said = sections(root)["History"]
    assert f"1.json: {reason}" in said and "No earlier run to compare with" in said
    assert not drawn(root)


def test_another_step_limit_is_another_configuration(report):
    earlier = results([info("block", denoising_steps=8)])
    said = sections(report(results([info("block")], day=1), earlier))["History"]
    assert "None of these configurations was measured in the earlier runs" in said


def test_bars_are_as_long_as_the_accuracies(report):
    by_source = {"gsm8k": 0.3, "mmlu": 0.0}
    infos = [info("block", accuracy_by_source=by_source), info("vanilla", accuracy_by_source={"gsm8k": 1.0})]
    root = report(results(infos))
    panels = [s for s in root.all("svg") if (s.attributes.get("aria-labelledby") or "").startswith("source")]
    assert [[bar.attributes["width"] for bar in p.all("rect", class_="bar")] for p in panels] == [
        ["30%", "100%"],
        ["0%"],
    ]
    assert [next(p.all("desc")).text for p in panels] == [
        "block: 30.0 %, vanilla: 100.0 %.",
        "block: 0.0 %, vanilla: not known.",
    ]
    interval = next(panels[0].all("line", class_="interval")).attributes
    ends = wilson_interval(15, 50)
    assert [float(interval[x].rstrip("%")) for x in ("x1", "x2")] == pytest.approx([100 * e for e in ends], abs=0.01)


def test_what_the_files_say_is_escaped(tmp_path, capsys):
    """Every string hostile: the page has the elements of the same page with harmless strings, and shows the text."""

    def tags(replace):
        infos = [info(mode) for mode in ("vanilla", "block")]
        for one in infos:
            one |= {k: replace(v) for k, v in one.items() if isinstance(v, str) and k not in ("mode", "weights")}
            for field in ("accuracy_by_source", "n_by_source"):
                one[field] = {replace(source): value for source, value in one[field].items()}
        infos[1]["mode"] = replace("block")
        paths = [
            write(tmp_path / (replace("run").replace("/", "_") + f"{day}.json"), results(infos, day)) for day in (2, 1)
        ]
        other = [one | {"dtype": replace("other")} for one in infos]
        paths.append(write(tmp_path / "other.json", results(other)))
        assert main([*map(str, paths), "-o", str(tmp_path / "page.html")]) == 0
        root = parse((tmp_path / "page.html").read_text(encoding="utf-8"))
        kept = [e for e in root.all() if "label" not in e.attributes.get("class", "") and e.tag not in ("line", "text")]
        return root, [(e.tag, sorted(e.attributes)) for e in kept]

    harmless, expected = tags(lambda text: "x" * len(HOSTILE) + text)
    hostile, found = tags(lambda text: HOSTILE + text)
    assert found == expected
    assert next(hostile.all("title")).text == f"BlockInfer: {HOSTILE}example/llada-8b"
    assert next(hostile.all("h1")).text == next(hostile.all("title")).text
    assert table(hostile)[1]["mode"].startswith(f"2{HOSTILE}block")
    assert not list(hostile.all("script")) and not list(hostile.all("img"))


def test_the_page_loads_nothing(tmp_path, capsys):
    assert main([*write_run(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    root = parse(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//|url\(|@import|data:", text, re.IGNORECASE)
    assert not {e.tag for e in root.all()} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "image",
        "use",
        "form",
    }
    attributes = {name for e in root.all() for name in e.attributes}
    assert not {a for a in attributes if a.startswith("on") or a in ("src", "href", "xlink:href", "srcset", "action")}
    policy = next(m for m in root.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"].startswith("default-src 'none'; style-src 'unsafe-inline';")


def test_the_page_can_be_read_without_seeing_it(tmp_path, capsys):
    assert main([*write_run(tmp_path, (8, 32)), "-o", str(tmp_path / "page.html")]) == 0
    root = parse((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert next(root.all("html")).attributes["lang"] == "en"
    ids = [e.attributes["id"] for e in root.all() if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    by_id = {e.attributes["id"]: e for e in root.all() if "id" in e.attributes}
    drawings = [s for s in root.all("svg") if s.attributes.get("aria-hidden") != "true"]
    assert len(drawings) == 2 + 4 + 11
    for svg in drawings:
        title, desc = (by_id[i] for i in svg.attributes["aria-labelledby"].split())
        assert svg.attributes["role"] == "img" and (title.tag, desc.tag) == ("title", "desc")
        assert title in svg.children and desc in svg.children and title.text and desc.text.endswith(".")
    assert {th.attributes.get("scope") for th in root.all("th")} == {"col", "row"}
    for found in root.all("table"):
        assert all(len(list(row.all("th", scope="row"))) == 1 for row in next(found.all("tbody")).all("tr"))
    for box in root.all(class_="scroll"):
        assert box.attributes["tabindex"] == "0" and box.attributes["aria-labelledby"] in by_id


def test_every_mode_has_a_colour_of_its_own_in_both_schemes():
    css = (Path(page.__file__).parent / "style.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--(m\d): (#\w+);", part)) for part in css.split("prefers-color-scheme: dark")[:2])
    assert len(light) == len(set(light.values())) == len(dark) == len(set(dark.values())) == len(page.MARKS)
    assert not set(light.values()) & set(dark.values()) and MODES.keys() < set(page.MODES)
