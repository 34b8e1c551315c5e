from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvant.client import Events, authorization, base_url, error_text, message_of
from kvant.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "url"),
    (
        ("http://127.0.0.1:23333", "http://127.0.0.1:23333"),
        ("http://127.0.0.1:23333/v1/", "http://127.0.0.1:23333"),
        ("localhost:80", "http://localhost:80"),
        ("https://a.example/models/v1", "https://a.example/models"),
        ("http://[::1]:9", "http://[::1]:9"),
    ),
)
def test_addresses(text: str, url: str) -> None:
    assert base_url(text) == url


@pytest.mark.parametrize(
    "text",
    ("", "ftp://host", "http://", "http://host:port", "http://a:99999", "http://me:word@host",
     "http://host?a=b"),
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a server") as caught:
        base_url(text)
    assert f'"{text}"' in str(caught.value)


def test_the_key_is_the_given_one_or_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert authorization(None) == {}
    monkeypatch.setenv("OPENAI_API_KEY", "env")
    assert authorization(None) == {"Authorization": "Bearer env"}
    assert authorization("own") == {"Authorization": "Bearer own"}
    assert authorization("") == {}


@pytest.mark.parametrize(
    ("body", "said"),
    (
        ({"error": {"message": "too\nlong", "code": 400}}, "too long"),
        ({"error": "no such model"}, "no such model"),
        ({"object": "error", "message": "from vLLM"}, "from vLLM"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"detail": [{"loc": 1}]}, '{"detail": [{"loc": 1}]}'),
    ),
)
def test_words_of_errors(body: object, said: str) -> None:
    assert message_of(json.dumps(body).encode()) == said


def test_errors_are_one_line_whatever_they_are() -> None:
    assert error_text(429, b'{"error": {"message": "busy"}}', "2") == (
        "HTTP 429: busy; try again in 2 s"
    )
    assert error_text(502, b"") == "HTTP 502: no reason given"
    assert error_text(502, b"<html>\nBad gateway\xff" + b"x" * 9999).count("\n") == 0
    assert len(error_text(502, b"x" * 9999)) < 400


@given(
    st.lists(st.text(alphabet='ab {}"é', min_size=1)), st.sampled_from(("\n", "\r\n")), st.data()
)
def test_events_are_the_same_however_a_stream_is_cut(
    texts: list[str], end: str, data: st.DataObject
) -> None:
    stream = "".join(
        f"event: x{end}data: {json.dumps(text)}{end}{end}: ping{end}" for text in texts
    ).encode()
    cuts = data.draw(st.lists(st.integers(0, len(stream))))
    places = [0, *sorted(cuts), len(stream)]
    events = Events()
    found = [json.loads(event) for a, b in pairwise(places) for event in events.feed(stream[a:b])]
    assert found == texts
