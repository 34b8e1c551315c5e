"""A server in this process, on a free port, and ways to ask it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn

from kvant import EngineConfig, Pipeline, pipeline
from kvant.server.config import ServerConfig
from kvant.server.serve import uvicorn_config
from kvant.server.service import Service

PATIENCE = 60.0  # seconds that a test waits for what must happen


@dataclass(frozen=True)
class Served:
    """A running server. ``service`` lives on the server's loop: read, do not call."""

    url: str
    service: Service
    pipe: Pipeline
    server: uvicorn.Server

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **options)

    def ask(self, path: str, **body: Any) -> Any:
        """The answer to a request that must succeed."""
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream that must end well, without its [DONE]."""
        answer = self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        *events, done = answer.text.removesuffix("\n\n").split("\n\n")
        assert done == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def refusal(self, path: str, **body: Any) -> Any:
        """What is wrong with a request that must get 400."""
        answer = self.post(path, body)
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]


@contextmanager
def serving(pipe: Pipeline, **options: Any) -> Iterator[Served]:
    """Serve a pipeline, which is closed at the end."""
    with listening(lambda: pipe, **options) as (url, service, server):
        wait_until(lambda: service.state == "ready")
        yield Served(url, service, pipe, server)


@contextmanager
def listening(
    load: Callable[[], Pipeline], **options: Any
) -> Iterator[tuple[str, Service, uvicorn.Server]]:
    """A server that listens while ``load`` makes the pipeline; its address first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = ServerConfig(**({"model_name": "tiny"} | options)).resolved("tiny")
        service = Service(config, load)
        server = uvicorn.Server(uvicorn_config(config, service))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service, server
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not end"


class Steps:
    """Holds the steps of an engine back; ``allow`` lets so many of them happen."""

    def __init__(self, pipe: Pipeline, patch: pytest.MonkeyPatch) -> None:
        self._permits = threading.Semaphore(0)
        self.patch = patch
        model = pipe.model.engine._model
        forward = model.forward

        def held(*arguments: Any) -> Any:
            assert self._permits.acquire(timeout=PATIENCE), "no step was allowed"
            return forward(*arguments)

        patch.setattr(model, "forward", held)

    def allow(self, count: int) -> None:
        self._permits.release(count)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as ``condition`` holds; fail if it does not come to hold."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "what should happen did not"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def tiny_server(tiny: str) -> Iterator[Served]:
    """A server of the tiny model with default options; tests must leave it as it was."""
    with serving(pipeline(tiny, EngineConfig(kv_tokens=8192, check=True))) as served:
        yield served
