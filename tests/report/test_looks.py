"""The page in a browser: nothing asked of a network, nothing cut off, all of it legible."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvant.report import make_report, read_results, render_page
from tests.report.results import EVERY, write

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDER = "() => document.documentElement.scrollWidth - innerWidth"

# Text whose contrast with what is behind it is below AA.
FAINT = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb
    .map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => node
    ? [...behind(node.parentElement), getComputedStyle(node).backgroundColor] : ['white'];
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    const style = getComputedStyle(node);
    const below = behind(node);
    const ink = node.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(over([...below, ink])), light(over(below))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(walker.currentNode.data.trim());
  }
  return faint;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    results = write(folder, **EVERY, again=EVERY["fidelity"] | {"model": "a-long-name" * 12})
    path = folder / "report.html"
    path.write_text(render_page(make_report(read_results([results])), "kvant report " + "x" * 400))
    return path


@pytest.fixture
def open_page(browser: Any, file: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end it may have complained of nothing and asked for nothing."""
    contexts, said = [], []

    def open_page(**settings: Any) -> Any:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [each for each in said if each != file.as_uri() and not each.startswith("data:")] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 375, 768, 1280, 1600])
def test_the_page_fits_and_can_be_read(
    open_page: Callable[..., Any], width: int, theme: str
) -> None:
    page = open_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    assert page.evaluate(WIDER) <= 0
    assert page.evaluate(FAINT) == []


@pytest.mark.parametrize("width", [375, 1280])
def test_every_figure_has_a_picture_of_the_width_and_words(
    open_page: Callable[..., Any], width: int
) -> None:
    page = open_page(viewport={"width": width, "height": 900})
    figures = page.locator("figure")
    assert figures.count() >= 5
    for figure in figures.all():
        assert len(figure.locator("figcaption").inner_text()) > 40
        shown = [svg for svg in figure.locator("svg").all() if svg.is_visible()]
        assert len(shown) == 1
        assert shown[0].bounding_box()["width"] <= width
        assert shown[0].locator("text").count() > 3


def test_wide_tables_scroll_in_their_box(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport={"width": 375, "height": 800})
    assert page.evaluate(
        "() => [...document.querySelectorAll('.table')]"
        ".some((box) => box.scrollWidth > box.clientWidth)"
    )
    assert page.evaluate(
        "() => [...document.querySelectorAll('.table')].every((box) => box.tabIndex === 0)"
    )


def test_headings_are_in_order_and_links_lead_somewhere(open_page: Callable[..., Any]) -> None:
    page = open_page()
    levels = page.evaluate("() => [...document.querySelectorAll('h1,h2,h3')].map((h) => h.tagName)")
    assert levels[0] == "H1" and levels.count("H1") == 1 and "H2" in levels
    assert page.evaluate(
        "() => [...document.querySelectorAll('a')]"
        ".every((a) => document.getElementById(a.hash.slice(1)))"
    )


def test_it_prints(open_page: Callable[..., Any]) -> None:
    page = open_page(color_scheme="dark")
    pdf = page.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    page.emulate_media(media="print")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") in (
        "rgb(255, 255, 255)", "rgba(0, 0, 0, 0)",
    )  # fmt: skip
    assert not page.locator("nav").is_visible()
    assert page.evaluate(
        "() => [...document.querySelectorAll('h2, h2 + p, .reason + p')]"
        ".every((each) => getComputedStyle(each).breakAfter === 'avoid')"
    )
