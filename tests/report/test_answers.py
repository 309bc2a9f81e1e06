"""Single answers on the page: which are shown, beside which, and from which file."""

import pytest

from evals.report import rows
from evals.report.command import main
from tests.report.html_tree import parse, sections
from tests.report.sample import answers, info, lines, results, write

# of vanilla and block to the rows, lost, won, and with nothing to judge
RIGHT = {"vanilla": [True, True, False, False, True], "block": [True, False, True, False, False]}
NOTHING = {("block", 3), ("block", 4), ("vanilla", 3)}
HOSTILE = "</pre></details><script>alert(1)</script> {{ 7 * 7 }}"


def configuration(mode, **changed):
    right = RIGHT[mode]
    own = {"n": len(right), "rows": [[f"row-{i}", 7, 9, one] for i, one in enumerate(right)]}
    return info(mode) | own | changed


def samples(mode, **changed):
    found = answers(configuration(mode), source="gsm8k")
    for i, one in enumerate(found):
        one |= {"prompt": f"How many are {i}? {HOSTILE}", "text": f"{mode} says {i}"}
        one |= ({"extracted": None} if (mode, i) in NOTHING else {}) | changed
    return found


@pytest.fixture
def page(tmp_path, capsys):
    """page(configurations, {name: samples file}, *options) -> the page, and what was printed."""

    def make(infos, files, *options, code=0):
        out = write(tmp_path / "out.json", results(infos))
        for name, content in files.items():
            write(tmp_path / name, content)
        assert main([str(out), "-o", str(tmp_path / "page.html"), *options]) == code
        printed = capsys.readouterr()
        return code or parse((tmp_path / "page.html").read_text(encoding="utf-8")), printed.out + printed.err

    return make


def shown(root):
    """By configuration and group: the ids, and the text under each."""
    found = {}
    for section in root.all("section", class_="answers"):
        for group in section.elements:
            if group.tag == "details":
                title, inner = group.elements[0].text, [e for e in group.elements if e.tag == "details"]
                found[section.elements[0].text, title] = {e.elements[0].text.split(", ")[1]: e for e in inner}
    return found


RUN = [configuration("vanilla"), configuration("block")]


def test_lost_won_and_unreadable_rows_are_shown_with_both_answers_and_the_gold(page):
    root, _ = page(RUN, {"samples.jsonl": lines(samples("vanilla"), samples("block"))})
    found = shown(root)
    assert {key: list(ids) for key, ids in found.items()} == {
        ("vanilla", "1 with nothing to judge"): ["row-3"],
        ("block", "2 lost against vanilla"): ["row-1", "row-4"],
        ("block", "1 won against vanilla"): ["row-2"],
        ("block", "2 with nothing to judge"): ["row-3", "row-4"],
    }
    told = [e.text for e in found["block", "2 lost against vanilla"]["row-4"].all("dd")]
    assert told == [f"How many are 4? {HOSTILE}", "gold-4", "block says 4", "vanilla says 4"]
    read = [e.text for e in found["block", "2 lost against vanilla"]["row-1"].all(class_="verdict")]
    assert read == ["wrong; read as block-1", "right; read as vanilla-1"]
    verdicts = [e.text for e in found["block", "2 with nothing to judge"]["row-3"].all(class_="verdict")]
    assert verdicts == ["wrong; nothing to judge"] * 2
    alone = found["vanilla", "1 with nothing to judge"]["row-3"]
    assert [e.text for e in alone.all("dt")][2:] == ["vanilla wrong; nothing to judge"]
    # folded away, without a script
    assert not any("open" in e.attributes for e in root.all("details")) and not list(root.all("script"))


def test_a_cap_on_what_is_shown_is_told(page, monkeypatch):
    monkeypatch.setattr(rows, "SHOWN", 1)
    monkeypatch.setattr(rows, "LENGTH", 30)
    long = samples("block", text="a" * 1000 + "b" * 1234)
    root, _ = page(RUN, {"samples.jsonl": lines(samples("vanilla"), long)})
    assert list(shown(root)["block", "2 lost against vanilla"]) == ["row-1"]
    assert "The first 1 of 2 are shown; all are in samples.jsonl." in root.text
    assert "The first 1 of 1" not in root.text
    assert "a" * 15 + " [… 2,204 characters …] " + "b" * 15 in root.text


def test_without_vanilla_nothing_is_lost_or_won(page):
    alone = [configuration("block", against_vanilla=None)]
    for infos in (alone, RUN):
        root, _ = page(infos, {"samples.jsonl": lines(samples("block"))})
        assert [title for _, title in shown(root)] == ["2 with nothing to judge"]
    readable = samples("block", extracted="5")
    assert "There was something to judge in each." in page(alone, {"samples.jsonl": lines(readable)})[0].text


def test_the_answers_of_all_shards_are_found(page):
    halves = [[one for i, one in enumerate(samples("block")) if i % 2 == half] for half in (0, 1)]
    files = {f"samples-{i}-2.jsonl": lines(half) for i, half in enumerate(halves, 1)}
    own = configuration("block", shards=2, against_vanilla=None)
    assert list(shown(page([own], files)[0])["block", "2 with nothing to judge"]) == ["row-4", "row-3"]
    shard = configuration("block", against_vanilla=None, shard={"index": 2, "of": 2})
    shard |= {"rows": [own["rows"][1], own["rows"][3]], "n": 2}
    assert list(shown(page([shard], files)[0])["block", "1 with nothing to judge"]) == ["row-3"]


BAD = {
    "another run": (lines(samples("block", forwards=8)), "of another run: block answered the row 'row-0' otherwise"),
    "no grades": (lines(samples("block", correct=None)), "none of them is a graded answer of one of its config"),
    "no samples": ('{"id": 3}\n', "line 1 is no answer of the suite: id: Input should be a valid string"),
    "no JSON": ("notes\n", "line 1 is no answer of the suite: "),
}


@pytest.mark.parametrize("kind", BAD)
def test_answers_that_are_not_the_run_s(page, tmp_path, kind):
    """Where they were named an error, where they were found a remark."""
    content, message = BAD[kind]
    root, text = page(RUN, {"samples.jsonl": content})
    note = sections(root)["Single answers"]
    assert note.startswith("The answers are not shown: ") and message in note and message in text
    (tmp_path / "page.html").unlink()
    _, text = page(RUN, {"samples.jsonl": content}, "--samples", str(tmp_path / "samples.jsonl"), code=2)
    assert message in text and text.count("\n") == 1 and not (tmp_path / "page.html").exists()


def test_named_answers_are_read_and_not_written_over(page, tmp_path):
    content = lines(samples("vanilla"), samples("block"))
    path = write(tmp_path / "mine.jsonl", content)
    assert len(shown(page(RUN, {}, f"--samples={path}")[0])) == 4
    _, text = page(RUN, {}, f"--samples={path}", f"--output={path}", code=2)
    assert "mine.jsonl' cannot be written: it is read too" in text and path.read_text() == content
    assert "Single answers" not in sections(page(RUN, {})[0])
    _, text = page(RUN, {}, "--samples=no.jsonl", code=2)
    assert text == "no.jsonl: cannot be read: No such file or directory\n"


@pytest.mark.parametrize(("number", "is_told"), [(5, False), (6, True)])
def test_many_answers_with_nothing_to_judge_are_told(report, number, is_told):
    """In more than a tenth of a source's 50."""
    root = report(results([info("vanilla"), info("block", unextracted_by_source={"gsm8k": number, "mmlu": 0})]))
    told = f"block: in {number} of 50 answers to gsm8k the grader found nothing to judge."
    assert [e.text for e in root.all("p", class_="unextracted")] == [told] * is_told
