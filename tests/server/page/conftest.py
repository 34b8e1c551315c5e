"""A browser, a fake server and a page in it. Without Chromium the tests of the page are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.server.page.fake_server import FakeServer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT_MS = 20_000  # a limit for busy machines; nothing waits longer than it has to
FROM_NETWORK = "Failed to load resource"  # what the browser itself says of error statuses

Shoot = Callable[[Any, str], None]


@dataclass
class Watch:
    """What a page said and asked for. A test in which requests fail sets ``trouble``."""

    home: str
    trouble: bool = False
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def follow(self, page: Any) -> None:
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith((self.home, "data:")):
            self.elsewhere.append(request.url)

    def check(self) -> None:
        errors = [e for e in self.errors if not (self.trouble and e.startswith(FROM_NETWORK))]
        assert not errors
        assert not self.elsewhere


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    playwright.expect.set_options(timeout=WAIT_MS)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def one_server() -> Iterator[FakeServer]:
    server = FakeServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(one_server: FakeServer) -> FakeServer:
    one_server.reset()
    return one_server


@pytest.fixture
def watch(server: FakeServer) -> Watch:
    return Watch(server.url)


@pytest.fixture
def open_page(browser: Any, server: FakeServer, watch: Watch) -> Iterator[Callable[..., Any]]:
    """Opens the page in a context of its own with these settings; at the end no page may have
    complained or asked another host."""
    contexts = []

    def open_page(**settings: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | settings)
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        page = context.new_page()
        watch.follow(page)
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    watch.check()


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()


@pytest.fixture
def shoot(tmp_path: Path) -> Shoot:
    """Takes a screenshot, into KVANT_SCREENSHOTS if that is set."""
    folder = Path(os.environ.get("KVANT_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"{name}.png")
