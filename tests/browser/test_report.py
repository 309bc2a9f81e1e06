"""The report in a browser: nothing overlaps, overflows or is hard to read, at both widths and in both schemes.

`nox -s screenshots` runs this; the pictures are left in build/screenshots.
"""

import os
from pathlib import Path

import pytest

from evals.report.command import main
from tests.report.sample import answers, info, lines, results, write, write_run

CHROMIUM = os.environ.get("CHROMIUM")
if not CHROMIUM:
    pytest.skip("nox -s screenshots runs this, in Chromium", allow_module_level=True)

from PIL import Image  # noqa: E402
from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

PICTURES = Path("build/screenshots")
CHECKS = Path(__file__).with_name("checks.js").read_text(encoding="utf-8")
NAMES = ("few", "many", "long", "random")
# words without an end
LONG = {"text": "W" * 3000, "extracted": None, "prompt": "p" * 3000}
OFFLINE = (
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def browser():
    # its profile is a new folder each time
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OFFLINE, chromium_sandbox=os.geteuid() != 0)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of a few configurations, of many, of the longest names, of random weights, and with answers, by name."""
    folder = tmp_path_factory.mktemp("pages")
    files = {name: folder / name for name in (*NAMES, "answers")}
    for one in files.values():
        one.mkdir()
    wide = {"model": "M" * 300, "commit": "c" * 300}
    long = [info(mode) | wide | {"mode": mode + "W" * 300} for mode in ("vanilla", "block")]
    slower = [one | {"tokens_per_second": 9.0} for one in long]
    nothing = {"weights": "random", "accuracy": None, "accuracy_by_source": {}, "against_vanilla": None}
    arguments = {
        "few": write_run(files["few"]),
        "many": write_run(files["many"], (8, 16, 32), ("low_confidence", "threshold"), 24),
        "long": [
            str(write(files["long"] / f"{'f' * 200}{i}.json", results(r, 9 - i))) for i, r in enumerate([long, slower])
        ],
        "random": [str(write(files["random"] / "out.json", results([info("block", **nothing)])))],
    }
    modes = [info(mode) for mode in ("vanilla", "block", "block_refresh")]
    same = [one | {"tokens_per_second": 90.0, "accuracy": 0.7} if "block" in one["mode"] else one for one in modes]
    write(files["answers"] / "samples.jsonl", lines(*map(answers, same[:2]), answers(same[2], **LONG)))
    arguments["answers"] = [str(write(files["answers"] / "out.json", results(same)))]
    for name, given in arguments.items():
        assert main([*given, "-o", str(folder / f"{name}.html")]) == 0
    return {name: folder / f"{name}.html" for name in arguments}


def visit(browser: Browser, file: Path, width: int, scheme: str) -> tuple[Page, list[str]]:
    """The page, and what the browser asked for or complained of besides the file itself."""
    page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    noise: list[str] = []
    page.on("request", lambda request: request.url == file.as_uri() or noise.append(request.url))
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.goto(file.as_uri())
    return page, noise


def problems(page: Page) -> list[str]:
    return page.evaluate(CHECKS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1200])
@pytest.mark.parametrize("name", [*NAMES, "answers"])
def test_the_page_is_in_order(browser, pages, name, width, scheme):
    page, noise = visit(browser, pages[name], width, scheme)
    PICTURES.mkdir(parents=True, exist_ok=True)
    picture = PICTURES / f"{name}-{width}-{scheme}.png"
    page.screenshot(path=picture, full_page=True)
    assert problems(page) == [] and noise == []
    with Image.open(picture) as image:
        assert image.width == width and image.height > 800
        colours = sorted(image.convert("L").getcolors(256), reverse=True)
    share, shade = colours[0]
    assert share > 0.5 * image.width * image.height, "most of the page is its background"
    assert shade > 240 if scheme == "light" else shade < 40
    assert len(colours) > 50
    page.context.close()


@pytest.mark.parametrize("width", [360, 1200])
def test_answers_unfold_and_stay_inside_the_page(browser, pages, width):
    page, _ = visit(browser, pages["answers"], width, "light")
    text = page.get_by_text("vanilla says", exact=False).first
    assert not text.is_visible()
    folded = page.evaluate("document.body.scrollHeight")
    page.locator(".answers > details > summary").first.click()
    assert not text.is_visible(), "a row is unfolded by itself"
    page.locator(".answer > summary").first.click()
    assert text.is_visible() and page.evaluate("document.body.scrollHeight") > folded + 100
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.screenshot(path=PICTURES / f"unfolded-{width}.png", full_page=True)
    assert problems(page) == []
    page.context.close()


@pytest.mark.parametrize("name", ["few", "many"])
def test_a_telephone_shows_speed_and_accuracy_first(browser, pages, name):
    page, _ = visit(browser, pages[name], 360, "light")
    box = page.locator(".scroll").first
    edges = box.bounding_box()
    for number in (0, 1):
        cell = box.locator("tbody tr").first.locator("td").nth(number).bounding_box()
        assert cell["x"] + cell["width"] <= edges["x"] + edges["width"], "seen without scrolling"
    assert [box.locator("thead th").nth(i).inner_text().split()[0] for i in (1, 2)] == ["speed", "accuracy"]
    page.context.close()


@pytest.mark.parametrize("width", [360, 1200])
def test_the_table_scrolls_inside_its_box(browser, pages, width):
    page, _ = visit(browser, pages["few"], width, "light")
    box = page.locator(".scroll").first
    wider = box.evaluate("box => box.scrollWidth - box.clientWidth")
    assert wider > 300 if width == 360 else wider == 0
    box.evaluate("box => box.scrollLeft = box.scrollWidth")
    first, last = box.locator("tbody tr").first.locator("th"), box.locator("tbody tr").first.locator("td").last
    edges = box.bounding_box()
    assert first.bounding_box()["x"] == pytest.approx(edges["x"] + 1, abs=1), "the names stay"
    assert last.bounding_box()["x"] + last.bounding_box()["width"] == pytest.approx(
        edges["x"] + edges["width"] - 1, abs=1
    )
    page.context.close()


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ("body { min-width: 500px }", "wider than the window"),
        (".scroll { overflow: visible }", "wider than the window"),
        ("svg text { font-size: 30px }", "overlaps"),
        (".plot svg text.halo { transform: translate(0, 10px) }", "is covered by a mark"),
        (".panels svg { margin-left: -20px } .panels svg text { transform: translate(-20px, 0) }", "is cut off"),
        (":root { --muted: #999 !important }", "has a contrast of"),
        (":root { --m2: #fde68a !important }", "has a contrast of"),
        ("svg text { font-size: 7px }", "is small"),
        ("td.number { text-align: left }", "is not right-aligned"),
        (".plot svg { display: none !important }", "no plot is to be seen"),
    ],
)
def test_the_checks_see_what_is_wrong(browser, pages, style, message):
    page, _ = visit(browser, pages["few"], 360, "light")
    page.add_style_tag(content=style)
    assert any(message in problem for problem in problems(page))
    page.context.close()
