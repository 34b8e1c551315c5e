"""The page in a real browser against a real server of the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvant import EngineConfig, pipeline
from tests.server.conftest import Served, serving, wait_until
from tests.server.page.conftest import WAIT_MS, Shoot, Watch

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

WHOLE_MAP = "document.getElementById('map').toDataURL()"


@pytest.fixture
def served(tiny: str) -> Iterator[Served]:
    with serving(pipeline(tiny, EngineConfig(kv_tokens=16384, kv="int8", check=True))) as served:
        yield served


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    watch = Watch(served.url, trouble=True)  # the server goes away in the end
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    watch.follow(page)
    page.goto(served.url)
    yield page
    context.close()
    watch.check()


def ask(page: Any, text: str) -> Any:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    return page.get_by_test_id("assistant").last.locator(".body")


def test_a_conversation_with_a_real_server(page: Any, served: Served, shoot: Shoot) -> None:
    expect(page.locator("#model-name")).to_have_text("tiny")
    expect(page.locator("#kv-label")).to_have_text("int8")
    empty = page.evaluate(WHOLE_MAP)

    page.click("#open-settings")
    page.fill("#set-temperature", "0")
    page.fill("#set-max_tokens", "16000")
    page.press("#set-max_tokens", "Escape")
    answer = ask(page, "hello")
    expect(page.locator("#stop")).to_be_visible()
    expect(answer).not_to_have_text("")
    expect(page.locator("#n-running")).to_have_text("1")
    expect(page.locator("#requests tbody tr")).to_have_count(1)
    shoot(page, "real-streaming")
    assert page.evaluate(WHOLE_MAP) != empty

    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    wait_until(lambda: served.pipe.model.engine.stats().pages_held == 0)
    expect(page.locator("#n-running")).to_have_text("0")
    expect(page.locator("#c-cached")).not_to_have_text("0")

    page.click("#open-settings")
    page.fill("#set-max_tokens", "12")
    page.press("#set-max_tokens", "Escape")
    page.click('[data-action="regenerate"]')
    expect(page.get_by_test_id("stats").last).to_contain_text("12 tokens")

    served.server.should_exit = True
    expect(page.locator("#state")).to_have_attribute("data-state", "away")
    ask(page, "are you there?")
    expect(page.locator(".problem").last).to_be_visible()
    shoot(page, "real-server-gone")
