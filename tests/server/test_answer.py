"""Requests that do not end well: clients leave, engines fail, requests fail alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from kvant import EngineConfig, pipeline
from kvant.engine.engine import EngineStats
from kvant.request import Request
from tests.server.conftest import PATIENCE, Served, Steps, serving, wait_until

PROMPT = "an unlikely beginning " * 6
ENDPOINTS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}], "n": 2},
    "/v1/completions": {"prompt": [PROMPT, "b"], "n": 2},
    "/generate": {"prompt": PROMPT},
}
SEQUENCES = {"/v1/chat/completions": 2, "/v1/completions": 4, "/generate": 1}
ENDLESS = {"max_tokens": 4000, "ignore_eos": True}
FAILING = {"prompt": "a", "guided_choice": ["x"], "bad_words": ["x"]}
"""It allows no token at all, which is noticed when one is sampled."""


@pytest.fixture
def served(tiny: str) -> Iterator[Served]:
    config = EngineConfig(kv_tokens=8192, max_batch_size=4, check=True)
    with serving(pipeline(tiny, config), max_queue=0) as found:
        yield found


@pytest.fixture
def steps(served: Served) -> Iterator[Steps]:
    with pytest.MonkeyPatch.context() as patch:
        yield Steps(served.pipe, patch)


def stats(served: Served) -> EngineStats:
    return served.pipe.worker.ask(lambda engine: engine.stats()).result(PATIENCE)


def events_of(answer: httpx.Response) -> Iterator[Any]:
    for line in answer.iter_lines():
        if line:
            found = line.removeprefix("data: ")
            yield found if found == "[DONE]" else json.loads(found)


def watch_aborts(served: Served, steps: Steps) -> set[int]:
    """The requests that the server has told the engine to give up, from now on."""
    given_up: set[int] = set()
    abort = served.pipe.worker.abort

    def spy(request: Request) -> None:
        abort(request)
        given_up.add(request.id)

    steps.patch.setattr(served.pipe.worker, "abort", spy)
    return given_up


# ----------------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_who_leaves_is_forgotten_within_a_step(
    served: Served, steps: Steps, path: str, stream: bool
) -> None:
    given_up = watch_aborts(served, steps)
    body = {**ENDPOINTS[path], **ENDLESS, "stream": stream}
    with served.client() as client:
        if stream:
            steps.allow(12)
            with client.stream("POST", path, json=body) as answer:
                assert sum(1 for _ in zip(range(4), events_of(answer), strict=False)) == 4
        else:
            impatient = httpx.Timeout(PATIENCE, read=0.5)
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json=body, timeout=impatient)
            steps.allow(12)
    wait_until(lambda: len(given_up) == SEQUENCES[path])
    steps.allow(1)  # a step may be under way; the next one must not be
    after = stats(served)
    assert (after.running, after.waiting, after.pages_held) == (0, 0, 0)
    assert after.steps <= 13
    # And the place in the queue is free again, though max_queue is 0.
    steps.allow(100)
    for _ in range(4):
        assert served.ask("/generate", prompt="a", max_tokens=1)


def test_who_leaves_is_no_error(served: Served, steps: Steps) -> None:
    given_up = watch_aborts(served, steps)
    with served.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/generate", json={"prompt": "a"}, timeout=httpx.Timeout(PATIENCE, read=0.2))
    wait_until(lambda: len(given_up) == 1)
    steps.allow(2)
    wait_until(lambda: not stats(served).running)
    wait_until(lambda: 'route="/generate"' in served.get("/metrics").text)
    lines = served.get("/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith("kvant:http_requests_total")]
    assert not [line for line in counts if 'route="/generate"' in line and 'status="5xx"' in line]


def test_others_go_on_when_one_leaves(served: Served, steps: Steps) -> None:
    given_up = watch_aborts(served, steps)
    with ThreadPoolExecutor() as threads, served.client() as client:
        staying = threads.submit(served.ask, "/generate", prompt="a", temperature=0, max_tokens=20)
        with client.stream(
            "POST", "/generate", json={"prompt": "b", **ENDLESS, "stream": True}
        ) as answer:
            steps.allow(6)
            next(events_of(answer))
        wait_until(lambda: len(given_up) == 1)
        steps.allow(100)
        found = staying.result(PATIENCE)
    assert found == served.ask("/generate", prompt="a", temperature=0, max_tokens=20)


# ------------------------------------------------------------------------------- one that fails


def test_a_request_that_fails_alone(served: Served) -> None:
    answer = served.post("/v1/completions", FAILING)
    assert answer.status_code == 500
    assert "no token can be chosen" in answer.json()["error"]["message"]
    assert served.ask("/generate", prompt="a", max_tokens=1)
    assert served.get("/health").status_code == 200


def test_a_stream_that_fails_says_so(served: Served) -> None:
    with served.client() as client:
        body = {**FAILING, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            *_, last = events_of(answer)
    assert "no token can be chosen" in last["error"]["message"]
    assert last["error"]["type"] == "server_error"
    assert last["error"]["request_id"] == answer.headers["x-request-id"]


def test_others_go_on_when_one_fails(served: Served, steps: Steps) -> None:
    good = {"prompt": "a", "temperature": 0, "max_tokens": 20}
    with ThreadPoolExecutor() as threads:
        staying = threads.submit(served.ask, "/generate", **good)
        failing = threads.submit(served.post, "/v1/completions", FAILING)
        wait_until(lambda: served.service._admitted == 2)
        steps.allow(100)
        assert failing.result(PATIENCE).status_code == 500
        found = staying.result(PATIENCE)
    assert found == served.ask("/generate", **good)
    assert stats(served).pages_held == 0


# ------------------------------------------------------------------------- an engine that fails


@pytest.fixture
def failed(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[httpx.Response]:
    """Answers to a stream and two whole requests in whose midst the engine fails."""
    engine = served.pipe.model.engine
    forward = engine._model.forward

    def breaking(*arguments: Any) -> Any:
        if engine.stats().running < 3:
            return forward(*arguments)
        raise RuntimeError("the memory is on fire")

    monkeypatch.setattr(engine._model, "forward", breaking)
    bodies: list[dict[str, Any]] = [{"stream": True}, {}, {}]
    with ThreadPoolExecutor() as threads:
        asked = [
            threads.submit(served.post, "/generate", {"prompt": "a", **ENDLESS, **body})
            for body in bodies
        ]
        return [each.result(PATIENCE) for each in asked]


def test_what_runs_when_the_engine_fails(failed: list[httpx.Response]) -> None:
    stream, *whole = failed
    for answer in whole:
        assert answer.status_code == 500
        assert "the memory is on fire" in answer.json()["error"]["message"]
    assert stream.status_code == 200
    *_, last = events_of(stream)
    assert "the memory is on fire" in last["error"]["message"]


def test_after_the_engine_failed(served: Served, failed: list[httpx.Response]) -> None:
    health = served.get("/health")
    assert health.status_code == 503
    assert health.json()["status"] == "failed"
    assert "the memory is on fire" in health.json()["error"]
    assert served.get("/ready").status_code == 503
    assert served.get("/kv").json()["state"] == "failed"
    assert "kvant:engine_up" in served.get("/metrics").text
    for path, body in ENDPOINTS.items():
        for stream in (False, True):
            answer = served.post(path, {**body, "stream": stream})
            assert answer.status_code == 500
            assert "the memory is on fire" in answer.json()["error"]["message"]
    assert served.get("/v1/models").status_code == 200
