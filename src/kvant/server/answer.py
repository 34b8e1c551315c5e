"""From a body to an answer, whole or as a stream of events: what all endpoints share."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from starlette.responses import Response

from kvant.errors import RequestError
from kvant.request import Output, Request
from kvant.server.errors import ApiError, error_body, error_of
from kvant.server.running import Running
from kvant.server.service import Service

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest
    from starlette.types import Message, Receive, Scope, Send

__all__ = ["Form", "answer", "usage"]

_JSON = "application/json"
_CLIENT_GONE = 499  # as nginx logs it; nobody reads it


class Form(Protocol):
    """How one endpoint writes outputs."""

    def begin(self) -> Iterable[str]:
        """JSON of the first events of a stream."""
        ...

    def add(self, index: int, output: Output) -> Iterable[str]:
        """Take an output of sequence ``index``; JSON of the events that it makes."""
        ...

    def end(self) -> Iterable[str]:
        """JSON of the last events of a stream."""
        ...

    def whole(self) -> dict[str, Any]:
        """The answer of all that was added."""
        ...


async def answer(
    service: Service,
    http: HttpRequest,
    count: int,
    prepare: Callable[[], tuple[list[Request], Form]],
    *,
    stream: bool | None,
    constraint: str | None,
) -> Response:
    """Run the ``count`` sequences that ``prepare`` makes (beside the loop), and answer.
    ``constraint`` is the field that says what the answer must be, if one does.

    Raises:
        ApiError: the request is refused, or failed.
        KvantError: what ``prepare`` found wrong.
    """
    arrived = time.perf_counter()
    with ExitStack() as admission:
        admission.enter_context(service.admission(count))
        preparing = service.prepare(prepare, compiles=constraint is not None)
        try:
            async with _watched(http.receive, preparing.cancel) as client:
                requests, form = await preparing
        except RequestError as error:
            raise _about(str(error), constraint) or error from None
        except asyncio.CancelledError:
            if client.gone:
                return Response(status_code=_CLIENT_GONE)
            raise
        running = service.run(requests, arrived, stream=bool(stream))
        if stream:
            return _EventStream(running, form, constraint, admission.pop_all())
        async with _watched(http.receive, running.abort) as client:
            async for events in running.events():
                for index, output in events:
                    if client.gone:
                        return Response(status_code=_CLIENT_GONE)
                    _check(output, constraint)
                    form.add(index, output)
        return Response(json.dumps(form.whole()), media_type=_JSON)


def usage(requests: Iterable[Request], generated: int) -> dict[str, Any]:
    """Tokens of a request; a prompt with several completions counts once."""
    prompts = [request for request in requests if request.leader is None]
    prompt = sum(request.num_prompt for request in prompts)
    cached = sum(request.cached_tokens for request in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class _EventStream(Response):
    """Server-sent events. If something fails there is an event ``{"error": ...}``, and no
    ``[DONE]``."""

    def __init__(
        self, running: Running, form: Form, constraint: str | None, admission: ExitStack
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self._constraint = constraint
        self._running, self._form, self._admission = running, form, admission

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        # Proxies must not collect what should be seen at once.
        headers.append((b"x-accel-buffering", b"no"))
        with self._admission:
            async with _watched(receive, self._running.abort):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await self._write(send)
            await send({"type": "http.response.body", "body": b""})

    async def _write(self, send: Send) -> None:
        try:
            await send(_events(self._form.begin()))
            async for outputs in self._running.events():
                pieces: list[str] = []
                for index, output in outputs:
                    _check(output, self._constraint)
                    pieces += self._form.add(index, output)
                if pieces:
                    await send(_events(pieces))
            await send(_events([*self._form.end(), "[DONE]"]))
        except Exception as error:
            self._running.abort()
            await send(_events([json.dumps(error_body(error_of(error)))]))


def _events(data: Iterable[str]) -> Message:
    """A part of the body."""
    text = "".join(f"data: {each}\n\n" for each in data)
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}


def _about(message: str, constraint: str | None) -> ApiError | None:
    """An error about a constraint, under the name that the client gave it; None of others."""
    if not message.startswith("response_format") or constraint in (None, "response_format"):
        return None
    return ApiError(400, re.sub(r"^\w+(\.\w+)?", constraint, message), param=constraint)


def _check(output: Output, constraint: str | None) -> None:
    """Raise what a client is told of a sequence that did not end well."""
    if output.finish_reason == "error":
        message = output.error or "the request failed"
        if message.startswith("response_format"):  # it cannot be followed to the end
            raise _about(message, constraint) or RequestError(message)
        raise ApiError(500, message)
    if output.finish_reason == "abort":
        raise ApiError(503, "the request was cut: the server is shutting down", retry_after=5)


class _Client:
    """Whoever waits for an answer."""

    gone = False


@asynccontextmanager
async def _watched(receive: Receive, stop: Callable[[], object]) -> AsyncIterator[_Client]:
    """While inside, the client's leaving stops what is done for it; so does leaving early."""
    client = _Client()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        client.gone = True
        stop()

    watcher = asyncio.create_task(watch())
    try:
        yield client
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
        stop()
