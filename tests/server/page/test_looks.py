"""The page at several sizes in both themes: nothing is cut off, all text can be read. Every state
leaves a screenshot, for people to judge the rest."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.server.page.conftest import Shoot, Watch
from tests.server.page.fake_server import Break, FakeServer
from tests.server.page.pools import busy, request, snapshot

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

SIZES = {"wide": (1440, 900), "middle": (1024, 768), "phone": (390, 844)}

ANSWER = """### What a page is

A **page** holds 64 positions of one sequence, *all* layers and heads, in one range of bytes. See
`cache/paged.py` or [the docs](https://example.org/kv).

1. Prefill writes pages.
2. Decoding appends to the last one:
   - a full page gets a hash,
   - a later prompt that begins alike finds it.

| Format | Bits | Tokens in 1 GiB |
|---|---:|---:|
| f16 | 16.00 | 46,603 |
| k8v4 | 6.56 | 113,700 |

```python
def tokens(memory: int, bits: float, elements: int = 5760) -> int:
    return int(memory * 8 / (bits * elements))  # a line that is longer than a telephone is wide
```

> Quantization is not free, but it is cheap.
"""

# Text whose contrast with what is behind it is below AA: 4.5, for large text 3.
FAINT = """() => {
  const parse = (colour) => {
    const found = colour.match(/[\\d.]+/g).map(Number);
    return [...found.slice(0, 3), found[3] ?? 1];
  };
  const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3]));
  const light = (rgb) => rgb
    .map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    if (!node) return [255, 255, 255];
    const colour = parse(getComputedStyle(node).backgroundColor);
    return colour[3] === 1 ? colour.slice(0, 3) : over(colour, behind(node.parentElement));
  };
  const seen = { opacityProperty: true, visibilityProperty: true };
  const unseen = (node) => !node.checkVisibility(seen)
    || node.closest('.sr, .skip, :disabled, .stale');
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || unseen(node)) continue;
    const style = getComputedStyle(node);
    const below = behind(node);
    const [a, b] = [light(over(parse(style.color), below)), light(below)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const least = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    if ((a + 0.05) / (b + 0.05) < least) faint.push(walker.currentNode.data.trim());
  }
  return faint;
}"""

WIDER = "() => document.documentElement.scrollWidth - innerWidth"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_state_can_be_read(
    open_page: Callable[..., Any],
    server: FakeServer,
    watch: Watch,
    shoot: Shoot,
    theme: str,
    size: str,
) -> None:
    watch.trouble = True
    width, height = SIZES[size]
    phone = size == "phone"
    moments = itertools.count(44)
    server.kv = lambda: busy(512, next(moments))
    page = open_page(
        viewport={"width": width, "height": height},
        color_scheme=theme,
        has_touch=phone,
        is_mobile=phone,
        device_scale_factor=2 if phone else 1,
    )

    def look(state: str) -> None:
        shoot(page, f"{theme}-{size}-{state}")
        assert page.evaluate(WIDER) <= 0
        assert page.evaluate(FAINT) == []

    def see_cache(state: str) -> None:
        if phone:
            page.click("#view-kv")
        expect(page.locator("#map")).to_be_visible()
        look(state)
        if phone:
            page.click("#view-chat")

    def send(text: str) -> None:
        page.fill("#prompt", text)
        page.press("#prompt", "Enter")

    expect(page.locator("#c-held")).not_to_have_text("0")
    look("empty")
    gate = threading.Event()
    server.steps = [{"reasoning_content": "Pages first."}, ANSWER[:400], gate, ANSWER[400:]]
    send("What is a page of the cache, and how many tokens does a GiB hold?")
    expect(page.locator(".markdown ul")).to_be_visible()
    look("streaming")
    gate.set()
    expect(page.locator("#send")).to_be_visible()
    look("long")
    see_cache("busy")
    server.steps = ["The first", Break("The request does not fit: 9000 tokens, at most 8192.")]
    send("And this?")
    expect(page.locator(".last .problem")).to_be_visible()
    look("error")
    page.click("#open-settings")
    look("settings")
    page.click("#close-settings")
    all_held = tuple(request(i, [[0, 8], [8 + 28 * i, 28]], hits=50) for i in range(18))
    queue = tuple(request(i, [], status="waiting", prompt=900) for i in range(18, 24))
    server.kv = snapshot(512, all_held + queue, preemptions=12)
    expect(page.locator("#c-free")).to_have_text("0")
    see_cache("full")
    server.kv = busy(200_000, 50_000)
    expect(page.locator("#map-caption")).to_contain_text("200,000 pages")
    see_cache("large")
    server.api_key = "secret"
    expect(page.locator("#key-form")).to_be_visible()
    look("key")
