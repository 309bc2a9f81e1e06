"""The server's page in a browser: an answer lands block by block, every step is shown, and all comes from one file.

`nox -s page` runs this, on the small model; the pictures are left in build/screenshots.
"""

import re

import pytest

from tests.browser.test_report import PICTURES, browser, problems  # noqa: F401
from tests.serve.test_process import Process

QUESTION = "Tom has 14 apples. He buys 23 more. How many apples does Tom have now?"
QUESTION += "\n\nSolve the problem step by step. End with: The answer is N."
# keeps every canvas that is shown
WATCH = """() => {
  window.canvases = [];
  new MutationObserver(() => window.canvases.push(
    [...document.querySelectorAll("#canvas i")].map((cell) => cell.className === "masked" ? null : cell.textContent)
  )).observe(document.querySelector("#canvas"), { childList: true });
}"""


@pytest.fixture(scope="module")
def url():
    with Process("evals/llada_tiny", "--max-model-len", "512") as server:
        yield server.url


@pytest.fixture
def visit(browser):  # noqa: F811
    """visit(url, width, scheme) -> the page; it must ask for nothing from elsewhere, nor complain."""
    contexts, noise = [], []

    def go(url, width=1000, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("request", lambda request: request.url.startswith((url, "data:")) or noise.append(request.url))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.goto(url)
        return page

    yield go
    for context in contexts:
        context.close()
    assert noise == []


def ended(page):
    page.wait_for_selector("#stop[disabled]", timeout=30_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000])
def test_an_answer_lands_block_by_block(visit, url, width, scheme):
    page = visit(url, width, scheme)
    assert not page.locator("#key").is_visible()
    page.get_by_label("prompt").fill(QUESTION)
    page.get_by_label("block length").fill("8")
    page.evaluate(WATCH)
    page.get_by_role("button", name="Answer").click()
    ended(page)
    assert page.locator("#wrong").inner_text() == ""
    answer = page.locator("#blocks").inner_text()
    assert answer.endswith("The answer is 37.") and page.locator("#model").inner_text() == "evals/llada_tiny"
    blocks = page.locator(".block").all_inner_texts()
    assert len(blocks) >= 4 and "".join(page.locator(".block").all_text_contents()) == answer
    canvases = page.evaluate("window.canvases")
    shown = [[token is not None for token in canvas] for canvas in canvases if canvas]
    assert len(shown) > 20 and {len(canvas) for canvas in shown} == {8}
    assert {sum(canvas) for canvas in shown} >= set(range(1, 8)), "one more position after each step"
    assert page.locator("#canvas i").count() == 0
    figures = page.locator("#figures").inner_text()
    tokens, forwards = (int(re.search(rf"(\d+) {name}", figures)[1]) for name in ("tokens", "forwards"))
    assert tokens > 20 and forwards >= tokens and f"{tokens / forwards:.2f} tokens a forward" in figures
    assert re.search(r"[\d.]+ tokens/s", figures) and re.search(r"first block after [\d.]+ s", figures)
    assert "ended by itself" in figures
    assert problems(page) == []
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"serve-{width}-{scheme}.png", full_page=True)


def test_a_text_is_gone_on_with_and_steps_need_not_be_shown(visit, url):
    page = visit(url)
    page.get_by_label("prompt").fill("Once")
    page.get_by_label("as").select_option("text to go on")
    page.get_by_label("new tokens").fill("20")
    page.get_by_label("show every step").uncheck()
    page.evaluate(WATCH)
    page.get_by_role("button", name="Answer").click()
    ended(page)
    assert page.locator("#wrong").inner_text() == "" and page.locator("#forwards").inner_text() != "0"
    assert not any(page.evaluate("window.canvases"))


def test_an_answer_can_be_stopped_and_another_asked_for(visit, url):
    page = visit(url)
    page.get_by_label("prompt").fill(QUESTION)
    page.get_by_label("mode").select_option("vanilla")
    page.get_by_label("new tokens").fill("400")
    page.get_by_role("button", name="Answer").click()
    page.wait_for_selector("#canvas i")
    page.get_by_role("button", name="Stop").click()
    ended(page)
    assert "stopped" in page.locator("#figures").inner_text()
    page.get_by_label("new tokens").fill("8")
    page.get_by_role("button", name="Answer").click()
    ended(page)
    assert "ended by its length" in page.locator("#figures").inner_text()


def test_what_is_refused_is_told_as_text(visit, url):
    page = visit(url)
    page.get_by_label("prompt").fill("<b>hi</b>")
    page.get_by_label("new tokens").fill("4000")
    page.get_by_role("button", name="Answer").click()
    ended(page)
    assert "more than max_model_len=512" in page.locator("#wrong").inner_text()
    assert problems(page) == []


def test_a_key_is_asked_for(visit):
    with Process("evals/llada_tiny", "--api-key", "sk-page") as server:
        page = visit(server.url)
        page.wait_for_selector("#key")
        assert "this server asks for its key" in page.locator("#wrong").inner_text()
        page.get_by_label("key").fill("sk-page")
        page.get_by_label("prompt").fill(QUESTION)
        page.get_by_role("button", name="Answer").click()
        ended(page)
        assert page.locator("#blocks").inner_text().endswith("The answer is 37.")
