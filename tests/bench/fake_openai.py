"""An OpenAI-compatible server of scripted tokens, pauses and failures, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class FakeOpenAI:
    """What a server does, and what it saw.

    ``plan`` has an entry for each completion that is asked for, in order; those after its end are
    "ok":

        ok                 as many tokens as asked for
        429, 500, ...      an error of this status
        cut                two chunks, then the connection is gone
        error              two chunks, then an event that says so
        unfinished         two chunks, then an end without [DONE]
        mute               no text at all, but an end and usage
        hang               nothing, until the client has gone
        slow               a chunk now and then, until the client has gone
    """

    plan: list[str | int] = field(default_factory=list)
    tokens_per_chunk: int = 1
    usage: bool = True
    cached_tokens: int | None = None
    key: str | None = None
    models: tuple[str, ...] = ("fake", "other")
    thoughts: tuple[str, ...] = ()
    most_tokens: int = 10**9
    gate: int = 0
    """Answer nothing until so many requests are here at the same time."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    here: int = 0
    most_here: int = 0
    gone: threading.Event = field(default_factory=threading.Event)
    """A client went away before the end of its answer."""
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    async def list_models(self, request: web.Request) -> web.Response:
        if not self._knows(request):
            return _error(401, "wrong key")
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        act = self.plan[len(self.bodies)] if len(self.bodies) < len(self.plan) else "ok"
        self.bodies.append(body)
        self.paths.append(request.path)
        self.here += 1
        self.most_here = max(self.here, self.most_here)
        try:
            if self.here >= self.gate:
                self._open.set()
            if self.gate:
                await self._open.wait()
            return await self._act(request, body, act)
        except (asyncio.CancelledError, ConnectionResetError):
            self.gone.set()
            raise
        finally:
            self.here -= 1

    async def _act(
        self, request: web.Request, body: dict[str, Any], act: str | int
    ) -> web.StreamResponse:
        if not self._knows(request):
            return _error(401, "wrong key")
        if body["model"] not in self.models:
            return _error(404, f"no model {body['model']}")
        if isinstance(act, int):
            return _error(act, f"scripted {act}")
        if act == "hang":
            await asyncio.sleep(3600)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self._write(request, response, body, act)
        return response

    async def _write(
        self, request: web.Request, response: web.StreamResponse, body: dict[str, Any], act: str
    ) -> None:
        chat = "messages" in body
        if chat:
            await response.write(_delta(role="assistant", content=""))
        for thought in self.thoughts:
            await response.write(_delta(reasoning_content=thought))
        texts = _texts(body)[: self.most_tokens]
        size = self.tokens_per_chunk
        chunks = ["".join(texts[at : at + size]) for at in range(0, len(texts), size)]
        if act == "slow":
            chunks = ["slow "] * 10_000
        for number, text in enumerate([] if act == "mute" else chunks):
            if act in ("cut", "error", "unfinished") and number == 2:
                return await self._break(request, response, act)
            await response.write(_delta(content=text) if chat else _text(text))
            if act == "slow":
                await asyncio.sleep(0.02)
        await response.write(_finish(chat))
        if self.usage and body["stream_options"]["include_usage"]:
            await response.write(self._usage(body, len(texts)))
        await response.write(b"data: [DONE]\n\n")
        return None

    async def _break(self, request: web.Request, response: web.StreamResponse, act: str) -> None:
        if act == "cut":
            assert request.transport is not None
            request.transport.close()
        if act == "error":
            await response.write(_event({"error": {"message": "out of pages", "code": 500}}))

    def _usage(self, body: dict[str, Any], tokens: int) -> bytes:
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        count = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        usage: dict[str, Any] = {"prompt_tokens": count, "completion_tokens": tokens}
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return _event({"choices": [], "usage": usage})

    def _knows(self, request: web.Request) -> bool:
        return self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}"


def _texts(body: dict[str, Any]) -> list[str]:
    """The tokens of an answer: the prompt's last message again, or numbered words."""
    if "messages" in body and "max_tokens" not in body:
        turns = len(body["messages"])
        return [f"{turns} messages, ", "the last: ", body["messages"][-1]["content"]]
    return [f"w{number} " for number in range(body["max_tokens"])]


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _text(text: str) -> bytes:
    return _event({"choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": None})


def _delta(**delta: str) -> bytes:
    return _event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def _finish(chat: bool) -> bytes:
    part = {"delta": {}} if chat else {"text": ""}
    return _event({"choices": [{"index": 0, **part, "finish_reason": "length"}]})


def _error(status: int, message: str) -> web.Response:
    headers = {"Retry-After": "7"} if status == 429 else {}
    return web.json_response({"error": {"message": message}}, status=status, headers=headers)


@contextmanager
def serve(fake: FakeOpenAI | None = None) -> Iterator[FakeOpenAI]:
    """Run it; ``url`` says where."""
    fake = fake or FakeOpenAI()
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", fake.list_models)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, fake.complete)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        fake.url = f"http://{host}:{port}"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
