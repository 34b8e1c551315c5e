"""The page in a real browser against a server that plays a script."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.server.page.conftest import Watch
from tests.server.page.fake_server import Break, FakeServer, Refusal
from tests.server.page.pools import request, snapshot

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

OpenPage = Callable[..., Any]

CANVAS = "id => document.getElementById(id).toDataURL()"
# A flash is drawn when the counts change, then fades: so it is looked for at that moment.
NOTE_FLASH = """() => {
  const pen = document.getElementById('map-flash').getContext('2d');
  const look = () => {
    const pixels = pen.getImageData(0, 0, pen.canvas.width, pen.canvas.height).data;
    window.flashed ||= pixels.some(Boolean);
  };
  window.flashed = false;
  new MutationObserver(look).observe(document.getElementById('c-free'), {childList: true});
}"""


def send(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answers(page: Any) -> Any:
    return page.get_by_test_id("assistant")


def finished(page: Any) -> None:
    expect(page.locator("#send")).to_be_visible()


def spoken(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_an_answer_streams(page: Any, server: FakeServer) -> None:
    first, second = threading.Event(), threading.Event()
    server.steps = [first, "One", second, " two."]
    send(page, "Count")
    expect(page.locator(".pending")).to_be_visible()
    first.set()
    expect(answers(page).locator(".body")).to_have_text("One")
    expect(page.locator("#stop")).to_be_visible()
    second.set()
    expect(answers(page).locator(".body")).to_have_text("One two.")
    finished(page)
    stats = answers(page).get_by_test_id("stats")
    expect(stats).to_have_text(
        re.compile(r"^2 tokens · [\d.]+ tokens/s · first after [\d.]+ s · 64 of 100 prompt tokens")
    )
    (body,) = server.bodies
    assert spoken(body) == [("user", "Count")]
    assert body["model"] == "fake"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_the_next_message_sends_the_whole_conversation(page: Any, server: FakeServer) -> None:
    server.steps = ["Yes."]
    send(page, "First")
    finished(page)
    send(page, "Second")
    finished(page)
    assert spoken(server.bodies[1]) == [
        ("user", "First"),
        ("assistant", "Yes."),
        ("user", "Second"),
    ]


@pytest.mark.parametrize("by_key", [False, True])
def test_stop_closes_the_connection_and_keeps_the_text(
    page: Any, server: FakeServer, by_key: bool
) -> None:
    server.steps = ["Half", threading.Event(), " never"]
    send(page, "Go on")
    expect(answers(page).locator(".body")).to_have_text("Half")
    if by_key:
        page.keyboard.press("Escape")
    else:
        page.click("#stop")
    finished(page)
    assert server.abandoned.wait(20)
    expect(answers(page).locator(".body")).to_have_text("Half")
    expect(answers(page).get_by_test_id("stats")).to_contain_text("Stopped · about 1 token")


def test_regenerate_asks_again(page: Any, server: FakeServer) -> None:
    server.steps = ["Heads"]
    send(page, "Toss")
    finished(page)
    server.steps = ["Tails"]
    page.click('[data-action="regenerate"]')
    expect(answers(page).locator(".body")).to_have_text("Tails")
    finished(page)
    assert spoken(server.bodies[0]) == spoken(server.bodies[1])


def test_an_earlier_message_can_be_edited_and_sent_again(page: Any, server: FakeServer) -> None:
    for text in ("One", "Two"):
        send(page, text)
        finished(page)
    asked = page.get_by_test_id("user")
    asked.first.hover()
    asked.first.locator('[data-action="edit"]').click()
    page.keyboard.press("Escape")
    expect(page.locator(".edit")).to_have_count(0)
    asked.first.locator('[data-action="edit"]').click()
    expect(page.locator(".edit textarea")).to_have_value("One")
    page.fill(".edit textarea", "Uno")
    page.click('[data-action="resend"]')
    expect(asked).to_have_count(1)
    expect(asked.locator(".body")).to_have_text("Uno")
    finished(page)
    assert spoken(server.bodies[2]) == [("user", "Uno")]


def test_settings_reach_the_request_and_are_kept(page: Any, server: FakeServer) -> None:
    values = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 128,
        "seed": 7,
        "repetition_penalty": 1.1,
    }
    page.click("#open-settings")
    page.fill("#set-system", "Be brief.")
    for name, value in values.items():
        page.fill(f"#set-{name}", str(value))
    page.click("#close-settings")
    page.reload()
    send(page, "Hi")
    finished(page)
    assert spoken(server.bodies[0]) == [("system", "Be brief."), ("user", "Hi")]
    assert {name: server.bodies[0].get(name) for name in values} == values
    page.click("#open-settings")
    page.click("#reset-settings")
    page.fill("#set-temperature", "9")
    expect(page.locator("#set-temperature")).to_have_attribute("aria-invalid", "true")
    page.keyboard.press("Escape")
    send(page, "Again")
    finished(page)
    assert not server.bodies[1].keys() & values.keys()
    assert spoken(server.bodies[1])[0] == ("user", "Hi")


def test_theme_follows_the_system_until_chosen(open_page: OpenPage) -> None:
    page = open_page(color_scheme="dark")
    background = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.click("#theme")
    assert page.evaluate(background) != dark
    page.reload()
    assert page.evaluate(background) != dark
    expect(page.locator("#theme")).to_have_attribute("aria-pressed", "false")
    page.click("#theme")
    assert page.evaluate(background) == dark


def test_messages_and_code_are_copied_as_they_came(open_page: OpenPage, server: FakeServer) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    server.steps = ["**Sum**:\n\n```python\na < b\n  c\n```\n"]
    send(page, "Code")
    finished(page)
    read = "() => navigator.clipboard.readText()"
    page.click(".code [data-action=copy]")
    expect(page.locator(".code [data-action=copy]")).to_have_text("Copied")
    assert page.evaluate(read) == "a < b\n  c"
    page.click(".assistant .actions [data-action=copy]")
    expect(page.locator(".assistant .actions [data-action=copy]")).to_have_text("Copied")
    assert page.evaluate(read) == "**Sum**:\n\n```python\na < b\n  c\n```\n"


def test_a_server_that_went_away_and_came_back(page: Any, server: FakeServer, watch: Watch) -> None:
    watch.trouble = True
    expect(page.locator("#state")).to_have_text("ready")
    server.stop()
    send(page, "Anybody?")
    expect(page.locator(".problem")).to_contain_text("The server cannot be reached")
    expect(page.locator("#state")).to_have_attribute("data-state", "away")
    expect(page.locator("#kv-status")).to_contain_text("No answer")
    server.start()
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#kv-status")).to_be_hidden()
    page.click('[data-action="retry"]')
    expect(answers(page).locator(".body")).to_have_text("Hello.")
    expect(page.locator(".problem")).to_be_hidden()


def test_a_key_is_asked_for_and_kept_for_the_session(
    page: Any, server: FakeServer, watch: Watch
) -> None:
    watch.trouble = True
    server.api_key = "open sesame"
    send(page, "Hi")
    expect(page.locator(".problem")).to_contain_text("API key")
    page.fill("#key-input", "wrong")
    page.press("#key-input", "Enter")
    expect(page.locator("#key-note")).to_contain_text("refused")
    page.fill("#key-input", "open sesame")
    page.press("#key-input", "Enter")
    expect(answers(page).locator(".body")).to_have_text("Hello.")
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#state")).to_have_text("ready")
    page.reload()
    expect(page.locator("#state")).to_have_text("ready")
    assert page.evaluate("() => Object.values(sessionStorage)") == ["open sesame"]
    assert "sesame" not in page.evaluate("() => JSON.stringify({...localStorage})")


def test_too_many_requests_are_tried_again(page: Any, server: FakeServer, watch: Watch) -> None:
    watch.trouble = True
    server.refusals = [Refusal(429, "The queue is full.", {"Retry-After": "1"})]
    send(page, "Hi")
    expect(page.locator(".problem")).to_contain_text("The queue is full.")
    expect(answers(page).locator(".body")).to_have_text("Hello.")
    assert len(server.bodies) == 2


def test_a_wait_of_minutes_can_be_cut_short(page: Any, server: FakeServer, watch: Watch) -> None:
    watch.trouble = True
    server.refusals = [Refusal(429, "The queue is full.", {"Retry-After": "600"})]
    send(page, "Hi")
    expect(page.locator(".countdown")).to_contain_text(re.compile(r"in \d+ s"))
    page.keyboard.press("Escape")
    expect(page.locator(".countdown")).to_be_empty()
    page.click('[data-action="retry"]')
    expect(answers(page).locator(".body")).to_have_text("Hello.")


@pytest.mark.parametrize(
    ("end", "says"), [("Out of pages.", "Out of pages."), ("", "before the answer was complete")]
)
def test_a_stream_that_breaks_keeps_its_text(
    page: Any, server: FakeServer, end: str, says: str
) -> None:
    server.steps = ["Half", Break(end)]
    send(page, "Hi")
    expect(page.locator(".problem")).to_contain_text(says)
    expect(answers(page).locator(".body")).to_have_text("Half")


def test_reasoning_and_tool_calls_are_shown(page: Any, server: FakeServer) -> None:
    gate = threading.Event()
    call = {"index": 0, "function": {"name": "weather", "arguments": '{"city": '}}
    rest = {"index": 0, "function": {"arguments": '"Oslo"}'}}
    thought = {"reasoning_content": "Where is **that**?"}
    server.steps = [thought, gate, "Let me look.", {"tool_calls": [call]}, {"tool_calls": [rest]}]
    send(page, "Weather")
    expect(page.locator(".reasoning strong")).to_be_visible()
    gate.set()
    finished(page)
    expect(page.locator(".reasoning strong")).to_be_hidden()
    page.click(".reasoning summary")
    expect(page.locator(".reasoning strong")).to_be_visible()
    expect(page.locator(".tool figcaption")).to_contain_text("weather")
    expect(page.locator(".tool code")).to_have_text('{\n  "city": "Oslo"\n}')
    send(page, "Thanks")
    finished(page)
    assert spoken(server.bodies[1])[1] == ("assistant", "Let me look.")


def test_the_conversation_is_kept_until_a_new_one(page: Any) -> None:
    send(page, "Remember")
    finished(page)
    page.reload()
    expect(page.get_by_test_id("user").locator(".body")).to_have_text("Remember")
    page.click("#new-chat")
    expect(page.get_by_test_id("user")).to_have_count(0)
    page.reload()
    expect(page.get_by_test_id("user")).to_have_count(0)
    page.click("#restore")
    expect(answers(page).locator(".body")).to_have_text("Hello.")


MARKDOWN = """# Title

Some **bold**, *slanted*, ~~gone~~ and `code_with_parts` in snake_case_words,
[a link](https://example.org/a_(b)) and https://example.org/bare_one.

3. three
4. four
   - inner

   > quoted

| a | b |
|:--|--:|
| 1 | x \\| y |

---

~~~
plain <b>
~~~
"""


def test_markdown_becomes_elements(page: Any, server: FakeServer) -> None:
    server.steps = [MARKDOWN[i : i + 9] for i in range(0, len(MARKDOWN), 9)]
    send(page, "Show")
    finished(page)
    body = answers(page).locator(".body")
    for tag, text in {
        "h4": "Title",
        "strong": "bold",
        "em": "slanted",
        "del": "gone",
        "p > code": "code_with_parts",
        "ol > li > ul > li": "inner",
        "ol > li > blockquote": "quoted",
        "td.right": "x | y",
        "pre": "plain <b>",
    }.items():
        expect(body.locator(tag)).to_have_text(text)
    expect(body.locator("ol")).to_have_attribute("start", "3")
    expect(body.locator("hr")).to_have_count(1)
    expect(body.locator("p").first).to_contain_text("in snake_case_words")
    links = body.locator("a").evaluate_all("links => links.map(a => [a.href, a.target, a.rel])")
    assert [link[0] for link in links] == [
        "https://example.org/a_(b)",
        "https://example.org/bare_one",
    ]
    assert all(target == "_blank" and "noopener" in rel for _, target, rel in links)


HOSTILE = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2">

[one](javascript:window.hacked=3) [two](JaVaScRiPt:alert(1)) [three](data:text/html,<script>)
[four](vbscript:x) <javascript:alert(1)> ![five](https://evil.example/pixel.png)
[six](//evil.example)

| <img src=x onerror=alert(1)> |
|---|
| <svg onload=alert(1)> |

```"><script>window.hacked = 4</script>
</code></pre><script>window.hacked = 5</script>
```
"""


def test_nothing_that_a_model_writes_is_run_or_loaded(page: Any, server: FakeServer) -> None:
    server.steps = [{"reasoning_content": HOSTILE}, HOSTILE]
    send(page, HOSTILE)
    finished(page)
    messages = page.locator("#messages")
    expect(messages.locator("script, img, svg, iframe, [onerror], [onload]")).to_have_count(0)
    expect(answers(page).locator(".body")).to_contain_text("<script>window.hacked = 1</script>")
    expect(answers(page).locator(".body")).to_contain_text(
        '<img src=x onerror="window.hacked = 2">'
    )
    hrefs = messages.locator("a").evaluate_all("links => links.map(a => a.href)")
    assert set(hrefs) == {"https://evil.example/pixel.png"}
    assert page.evaluate("() => window.hacked === undefined")


def test_markup_without_an_end_takes_no_time(page: Any, server: FakeServer) -> None:
    parts = ("*a **b ", "[", "`", "> ", "- ", "(", "|-", "_x", "https://e.org/)")
    server.steps = ["".join(part * 4000 + "\n\n" for part in parts), "Done."]
    send(page, "Go")
    finished(page)
    expect(answers(page).locator(".body")).to_contain_text("Done.")


def test_the_map_follows_the_cache(page: Any, server: FakeServer) -> None:
    server.kv = snapshot(64, (request(7, [[0, 3]]),), [[10, 6]])
    chart = page.locator("#map")
    expect(chart).to_have_attribute("aria-label", re.compile("3 held, 0 of them shared, 6 cached"))
    before = page.evaluate(CANVAS, "map")
    both = (request(7, [[0, 3]], hits=50), request(8, [[0, 2], [20, 2]]))
    queue = request(9, [], status="waiting")
    server.kv = snapshot(64, (*both, queue), [[10, 6]], preemptions=3)
    expect(chart).to_have_attribute(
        "aria-label", re.compile("5 held, 2 of them shared, 6 cached, 53 free")
    )
    assert page.evaluate(CANVAS, "map") != before
    expect(page.locator("#requests tbody tr")).to_have_count(3)
    row = page.locator('[data-request="7"]')
    expect(row.locator("td")).to_have_text(["100", "0", "50 %", "3"])
    expect(page.locator('[data-request="9"]')).to_contain_text("waiting")
    for name, text in {
        "c-held": "5",
        "c-shared": "2",
        "c-cached": "6",
        "c-free": "53",
        "n-running": "2",
        "n-room": "3,776",
        "n-hits": "25 %",
        "n-preempted": "3",
        "kv-label": "K int8, V int4",
        "kv-gain": "2.7\u00d7 the tokens",
        "kv-bytes": "8.6 kB per token, 0.38 of 16 bit (23.0 kB)",
    }.items():
        expect(page.locator(f"#{name}")).to_have_text(text)
    still = page.evaluate(CANVAS, "map")
    row.hover()
    assert page.evaluate(CANVAS, "map") != still
    chart.hover(position={"x": 5, "y": 5})
    expect(page.locator("#map-readout")).to_have_text("0: #7, #8")
    assert page.evaluate(CANVAS, "map") == still


def test_speed_comes_from_differences(page: Any, server: FakeServer) -> None:
    expect(page.locator("#kv-body")).to_be_visible()
    tokens = {"prompt": 0, "cached": 0, "generated": 90}
    server.kv = snapshot(tokens=tokens, uptime_s=4.0)
    expect(page.locator("#n-speed")).to_have_text("30.0")
    expect(page.locator("#n-hits")).to_have_text("0 %")


def test_a_very_large_pool_is_drawn_in_shares(page: Any, server: FakeServer) -> None:
    many = tuple(request(i, [[i * 390, 390]]) for i in range(256))
    server.kv = snapshot(200_000, many, [[100_000, 50_000]], running=300)
    expect(page.locator("#map-caption")).to_contain_text(
        re.compile(r"^200,000 pages, \d+ in a square$")
    )
    expect(page.locator("#requests tbody tr")).to_have_count(256)
    expect(page.locator("#more-requests")).to_contain_text("44 more")
    expect(page.locator("#map")).to_have_attribute("aria-label", re.compile(r"is \d+ pages\.$"))


def test_the_free_part_of_a_large_pool_is_not_drawn_at_first(page: Any, server: FakeServer) -> None:
    caption = page.locator("#map-caption")
    server.kv = snapshot(20_000, (request(1, [[0, 9]]),))
    expect(caption).to_have_text("The first 512 of 20,000 pages")
    server.kv = snapshot(20_000, (request(1, [[0, 9], [600, 1]]),))
    expect(caption).to_have_text("The first 1,024 of 20,000 pages")
    page.click("#map-whole")
    expect(caption).to_have_text(re.compile(r"^20,000 pages, \d+ in a square$"))
    page.click("#map-whole")
    expect(caption).to_have_text("The first 1,024 of 20,000 pages")


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_changed_pages_flash_unless_motion_is_unwanted(
    open_page: OpenPage, server: FakeServer, motion: str
) -> None:
    page = open_page(reduced_motion=motion)
    expect(page.locator("#c-free")).to_have_text("64")
    page.evaluate(NOTE_FLASH)
    server.kv = snapshot(64, (request(1, [[3, 2]]),))
    expect(page.locator("#c-free")).to_have_text("62")
    assert page.evaluate("() => window.flashed") is (motion == "no-preference")


def test_a_server_that_still_loads_says_so(page: Any, server: FakeServer) -> None:
    server.kv = {"model": "fake", "uptime_s": 1.0, "state": "starting"}
    expect(page.locator("#state")).to_have_text("starting")
    expect(page.locator("#kv-status")).to_contain_text("loaded")
    server.kv = snapshot()
    expect(page.locator("#kv-body")).to_be_visible()
    expect(page.locator("#state")).to_have_text("ready")


def test_on_a_phone_the_cache_is_a_view_of_its_own(open_page: OpenPage, server: FakeServer) -> None:
    server.kv = snapshot(64, (request(7, [[0, 3]]),))
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    expect(page.locator("#kv")).to_be_hidden()
    send(page, "Hi")
    finished(page)
    page.tap("#view-kv")
    expect(page.locator("#map")).to_be_visible()
    expect(page.locator("#c-held")).to_have_text("3")
    expect(page.locator("#chat")).to_be_hidden()
    assert page.evaluate("() => document.getElementById('map').width") > 300
    page.tap('[data-request="7"] button')
    expect(page.locator('[data-request="7"] button')).to_have_attribute("aria-pressed", "true")
    page.tap("#view-chat")
    expect(answers(page).locator(".body")).to_have_text("Hello.")


def test_all_can_be_done_with_the_keyboard(page: Any, server: FakeServer) -> None:
    server.kv = snapshot(64, (request(7, [[0, 3]]), request(8, [[5, 2]])))
    keys = page.keyboard
    focus = page.locator(":focus")
    expect(page.locator("#requests tbody tr")).to_have_count(2)
    expect(page.locator("#prompt")).to_be_focused()
    keys.type("Two")
    keys.press("Shift+Enter")
    keys.type("lines")
    keys.press("Enter")
    finished(page)
    assert spoken(server.bodies[0]) == [("user", "Two\nlines")]
    keys.press("ArrowUp")
    expect(page.locator(".edit textarea")).to_be_focused()
    keys.press("ControlOrMeta+A")
    keys.type("One line")
    keys.press("Enter")
    expect(page.get_by_test_id("user").locator(".body")).to_have_text("One line")
    finished(page)
    expect(page.locator("#prompt")).to_be_focused()
    keys.press("Shift+Tab")
    expect(focus).to_have_text("Regenerate")
    assert page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keys.press("Enter")
    finished(page)
    assert len(server.bodies) == 3
    page.focus("#send")
    keys.press("Tab")
    expect(page.locator('[data-request="7"] button')).to_be_focused()
    keys.press("ArrowDown")
    expect(page.locator('[data-request="8"] button')).to_be_focused()
    expect(page.locator('[data-request="8"]')).to_have_class("lit")
    keys.press("Enter")
    expect(focus).to_have_attribute("aria-pressed", "true")
    page.focus("#open-settings")
    keys.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    keys.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#open-settings")).to_be_focused()
