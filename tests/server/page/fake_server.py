"""A server that plays what a test tells it to, for the page alone: no model, no engine.

Run as a program it shows the page with a busy pool, to look at by hand.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.server.page.pools import busy, snapshot

PAGE = Path(__file__).parents[3] / "src" / "kvant" / "server" / "page"
CSP = "default-src 'self'; img-src 'self' data:"
GATE_S = 30.0


@dataclass(frozen=True)
class Refusal:
    """An answer with an error status instead of a stream."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Break:
    """The stream ends here, with an error event if there is a message."""

    message: str = ""


# Text, a delta, a pause until a test opens it, or an end before the end.
Step = str | dict[str, Any] | threading.Event | Break


class FakeServer:
    """Serves on a port of its own, in a thread, until ``stop``; ``start`` takes the port again.

    A test sets ``steps`` (what answers are made of), ``refusals`` (taken first, one for each
    request), ``api_key`` and ``kv`` (the snapshot, or a function that makes one), and reads
    ``bodies`` (of the requests that came) and ``abandoned`` (a client went away).
    """

    def __init__(self) -> None:
        self.reset()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._app = Starlette(
            routes=[
                Route("/", self._index),
                Route("/page/{name}", self._file),
                Route("/v1/models", self._models),
                Route("/kv", self._kv),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    def reset(self) -> None:
        """As if nothing had been asked or told yet."""
        self.steps: list[Step] = ["Hello."]
        self.refusals: list[Refusal] = []
        self.api_key = ""
        self.kv: dict[str, Any] | Callable[[], dict[str, Any]] = snapshot()
        self.bodies: list[dict[str, Any]] = []
        self.abandoned = threading.Event()

    def start(self) -> None:
        config = uvicorn.Config(
            self._app,
            port=self.port,
            log_level="error",
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the fake server could not start"
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(GATE_S)

    async def _index(self, request: Request) -> Response:
        return self._send("index.html")

    async def _file(self, request: Request) -> Response:
        return self._send(request.path_params["name"])

    def _send(self, name: str) -> Response:
        if not (PAGE / name).is_file():
            return Response(status_code=404)
        return FileResponse(PAGE / name, headers={"Content-Security-Policy": CSP})

    def _refused(self, request: Request) -> Response | None:
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return _error(Refusal(401, "The API key is missing or wrong."))
        return None

    async def _models(self, request: Request) -> Response:
        model = {"id": "fake", "object": "model", "created": 0, "owned_by": "kvant"}
        models = {"object": "list", "data": [model | {"max_model_len": 4096}]}
        return self._refused(request) or JSONResponse(models)

    async def _kv(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse(self.kv() if callable(self.kv) else self.kv)

    async def _chat(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        refused = self._refused(request)
        if refused:
            return refused
        if self.refusals:
            return _error(self.refusals.pop(0))
        headers = {"X-Request-Id": f"req-{len(self.bodies)}"}
        stream = self._stream(request, list(self.steps))
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    async def _stream(self, request: Request, steps: list[Step]) -> AsyncIterator[str]:
        sent = 0
        try:
            for step in steps:
                if isinstance(step, threading.Event):
                    await _opened(step)
                elif isinstance(step, Break):
                    if step.message:
                        yield _event({"error": {"message": step.message}})
                    return
                else:
                    sent += 1
                    yield _event(_chunk(step if isinstance(step, dict) else {"content": step}))
        except asyncio.CancelledError:
            self.abandoned.set()
            raise
        yield _event(_chunk({}, "stop"))
        yield _event({"choices": [], "usage": _usage(sent)})
        yield "data: [DONE]\n\n"


async def _opened(gate: threading.Event) -> None:
    for _ in range(int(GATE_S * 100)):
        if gate.is_set():
            return
        await asyncio.sleep(0.01)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def _usage(tokens: int) -> dict[str, Any]:
    cached = {"cached_tokens": 64}
    counts = {"prompt_tokens": 100, "completion_tokens": tokens, "total_tokens": 100 + tokens}
    return counts | {"prompt_tokens_details": cached}


def _error(refusal: Refusal) -> Response:
    error = {"message": refusal.message, "type": "error", "param": None, "code": None}
    body = {"error": error | {"request_id": "req-refused"}}
    return JSONResponse(body, refusal.status, refusal.headers)


if __name__ == "__main__":
    started = time.monotonic()
    server = FakeServer()
    server.kv = lambda: busy(512, int(2 * (time.monotonic() - started)))
    server.start()
    print(server.url)  # noqa: T201
    threading.Event().wait()
