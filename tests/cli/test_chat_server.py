"""``kvant chat --server``."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.bench.fake_openai import FakeOpenAI, serve
from tests.cli.conftest import Done, Run, Terminal


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with serve() as fake:
        yield fake


@pytest.fixture
def talk(run: Run, fake: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Chat with these lines as input."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def talk(lines: str, *words: str) -> Done:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return run("chat", "--server", fake.url, *words)

    return talk


def said(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_turns_build_on_each_other(talk: Run, fake: FakeOpenAI) -> None:
    done = talk("one\ntwo\n/clear\nthree\n", "--system", "be kind")
    assert done.code == 0 and "the conversation starts anew" in done.err
    texts = done.out.splitlines()
    assert texts == [
        "2 messages, the last: one", "4 messages, the last: two", "2 messages, the last: three"
    ]  # fmt: skip
    assert said(fake.bodies[1]) == [
        ("system", "be kind"), ("user", "one"), ("assistant", texts[0]), ("user", "two"),
    ]  # fmt: skip
    assert said(fake.bodies[2]) == [("system", "be kind"), ("user", "three")]
    assert {body["model"] for body in fake.bodies} == {"fake"}


def test_nothing_is_asked_for_but_what_was_given(talk: Run, fake: FakeOpenAI) -> None:
    own = {"model", "messages", "stream", "stream_options"}
    assert talk("one\n").code == 0 and set(fake.bodies[0]) == own
    done = talk(
        "one\n", "other", "--max-new-tokens", "3", "--min-new-tokens", "1", "--temperature", "0.5",
        "--top-k", "4", "--min-p", "0.1", "--repetition-penalty", "1.1", "--random-seed", "7",
        "--stop-words", "a", "--stop-words", "b", "--ignore-eos", "--do-sample",
    )  # fmt: skip
    assert done.out == "w0 w1 w2 \n" and "cut at max_new_tokens=3" in done.err
    assert fake.bodies[1]["model"] == "other"
    assert {name: value for name, value in fake.bodies[1].items() if name not in own} == {
        "max_tokens": 3, "min_tokens": 1, "temperature": 0.5, "top_k": 4, "min_p": 0.1,
        "repetition_penalty": 1.1, "seed": 7, "stop": ["a", "b"], "ignore_eos": True,
    }  # fmt: skip
    assert talk("one\n", "--no-do-sample").code == 0 and fake.bodies[2]["temperature"] == 0


def test_stats(talk: Run, fake: FakeOpenAI) -> None:
    fake.cached_tokens, fake.tokens_per_chunk = 64, 5
    done = talk("/stats\na b c\n/stats\n", "--max-new-tokens", "20")
    assert "last answer: 0 tokens" in done.out and "context: unknown tokens" in done.out
    assert "last answer: 20 tokens in" in done.out  # as the server counts, in four chunks
    assert f"context: 3 tokens, 64 found cached; fake at {fake.url}" in done.out


def test_thoughts_are_shown_and_forgotten(talk: Run, fake: FakeOpenAI) -> None:
    fake.thoughts = ("hm, ", "well")
    done = talk("one\ntwo\n")
    assert done.out.startswith("hm, well\n\n1 messages, the last: one\n")
    assert said(fake.bodies[1])[1] == ("assistant", "1 messages, the last: one")


def test_the_key(talk: Run, fake: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = "secret"
    talk("one\n").assert_error(1, "HTTP 401: wrong key", "--api-key or OPENAI_API_KEY")
    assert talk("one\n", "--api-key", "secret").code == 0
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert talk("one\n").code == 0


@pytest.mark.parametrize(
    ("act", "words"),
    (
        (429, "HTTP 429: scripted 429; try again in 7 s]"),
        (500, "HTTP 500: scripted 500]"),
        (400, "HTTP 400: scripted 400; /clear starts a new conversation]"),
        ("cut", "the answer broke off: "),
        ("error", "the answer broke off: out of pages]"),
        ("unfinished", "the answer broke off: the stream ended without [DONE]]"),
    ),
)
def test_a_turn_that_fails_is_one_line_and_leaves_no_trace(
    talk: Run, fake: FakeOpenAI, act: str | int, words: str
) -> None:
    fake.plan = [act]
    done = talk("lost\none\n")
    assert done.code == 1 and words in done.err, done
    assert sum(line.startswith("[") and "cut at" not in line for line in done.err.splitlines()) == 1
    assert done.out.endswith("1 messages, the last: one\n")
    assert said(fake.bodies[1]) == [("user", "one")]


def test_servers_that_cannot_be_talked_to(talk: Run, run: Run, fake: FakeOpenAI) -> None:
    done = talk("one\n", "third")
    assert done.code == 1 and "[HTTP 404: no model third]" in done.err
    fake.models = ()
    talk("one\n").assert_error(1, "lists no model")
    with serve() as gone:
        pass
    run("chat", "--server", gone.url).assert_error(1, f"no server answers at {gone.url}")


@pytest.mark.parametrize(
    ("words", "text"),
    (
        ((), "which MODEL? Name one, or a server with --server URL"),
        (("a-model", "--api-key", "x"), "--api-key goes with --server"),
        (("--server", "ftp://x"), '"ftp://x" is no address'),
        (("--server", "x", "--kv", "int8"), "--kv does not go with --server"),
        (("--server", "x", "--no-enable-prefix-caching"), "does not go with --server"),
        (("--server", "x", "--chat-template", "a"), "--chat-template does not go with"),
        (("--server", "x", "--bad-token-ids", "1"), "--bad-token-ids does not go with"),
        (("--server", "x", "--temperature", "3"), "temperature=3.0 must be from 0 to 2"),
    ),
)
def test_wrong_words(run: Run, words: tuple[str, ...], text: str) -> None:
    run("chat", *words).assert_error(2, text)


def test_ctrl_c_closes_the_connection_and_the_conversation_goes_on(fake: FakeOpenAI) -> None:
    fake.plan = ["slow"]
    terminal = Terminal("chat", "--server", fake.url)
    assert f"fake at {fake.url}. /help" in terminal.wait_for(">>> ")
    terminal.say("hello\n")
    terminal.wait_for("slow slow slow")
    terminal.process.send_signal(signal.SIGINT)
    assert "Traceback" not in terminal.wait_for("[stopped]\r\n>>> ", timeout=5)
    assert fake.gone.wait(10)  # so the server stops computing
    terminal.say("again\n")
    assert "3 messages, the last: again" in terminal.wait_for(">>> ")
    assert said(fake.bodies[1])[1][1].startswith("slow slow")
    time.sleep(0.5)  # readline overlooks a signal between its prompt and its wait for a key
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.leave() == 0
