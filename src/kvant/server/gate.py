"""What every request passes before a route sees it: :class:`Gate` gives it an id and a line in the
log, :class:`Guard` wants a key and looks at its size."""

from __future__ import annotations

import asyncio
import hmac
import logging
import string
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from kvant.server.config import ServerConfig
from kvant.server.errors import ApiError, error_response
from kvant.server.log import log, new_id, request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from kvant.server.metrics import Metrics

__all__ = ["Gate", "Guard"]

_OPEN = ("/", "/health", "/ready", "/metrics", "/favicon.ico")
"""Paths that need no key: the page, which asks for one, and what orchestrators ask."""
_OPEN_BELOW = "/page/"
_POLLED = ("/health", "/ready", "/metrics", "/kv")
"""Asked all the time: lines about them are for debugging."""
_ID_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-_.:")
_LONGEST_ID = 128
_LINGER_SECONDS = 2.0


class _LeftError(Exception):
    """The client left before its body was complete."""


class _Arriving:
    """A body on its way; ``more`` says whether a part of it is to come."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.more = True

    async def part(self) -> bytes:
        """The next part."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _LeftError
        self.more = message.get("more_body", False)
        return bytes(message.get("body", b""))


class Gate:
    """ASGI middleware around everything: ids, the log, and the time and status for metrics."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the application answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, answered = time.perf_counter(), 0, False
        name = _id_of(scope["headers"])
        request_id.set(name)

        async def stamped(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)
            answered = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._app(scope, receive, stamped)
        except Exception:
            # Starlette answers and logs what nobody expected, and then raises it again.
            if not answered:
                raise
        finally:
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.http(route, status, seconds)
        if status == 400:
            self._metrics.rejected("invalid")
        if self._config.access_log:
            client = scope.get("client")
            facts = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "duration_ms": round(seconds * 1e3, 1),
                "client": client[0] if client else None,
            }
            polled = scope["path"] in _POLLED and status == 200
            log.log(
                logging.DEBUG if polled else logging.INFO,
                '%s "%s %s" %s %.1f ms',
                *_shown(facts),
                seconds * 1e3,
                extra={"facts": facts},
            )


class Guard:
    """ASGI middleware around the application: nobody without a key, no body that is too large or
    too slow."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics
        self._keys = [key.encode() for key in config.api_keys or ()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or have the application answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arriving = _Arriving(receive)
        try:
            self._check_key(scope)
            body = await self._read(scope, arriving)
        except _LeftError:
            return
        except ApiError as error:
            await _refuse(error, arriving, send)
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if not self._keys or path in _OPEN or path.startswith(_OPEN_BELOW):
            return
        kind, _, given = _header(scope["headers"], b"authorization").partition(b" ")
        known = 0
        for key in self._keys:  # all of them, so that time tells nothing
            known |= hmac.compare_digest(key, given.strip())
        if kind.lower() != b"bearer" or not known:
            self._metrics.rejected("unauthorized")
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    async def _read(self, scope: Scope, arriving: _Arriving) -> bytes:
        limit = self._config.body_limit
        announced = _header(scope["headers"], b"content-length")
        if announced.isdigit() and int(announced) > limit:
            raise self._too_large(int(announced))
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._config.body_timeout):
                while arriving.more:
                    parts.append(await arriving.part())
                    size += len(parts[-1])
                    if size > limit:
                        raise self._too_large(size)
        except TimeoutError:
            seconds = self._config.body_timeout
            raise ApiError(
                408, f"the body did not come within {seconds:g} s; send it faster"
            ) from None
        return b"".join(parts)

    def _too_large(self, size: int) -> ApiError:
        self._metrics.rejected("too_large")
        return ApiError(
            413,
            f"the body has {size} bytes or more, and the limit is {self._config.body_limit}; "
            "shorten it, or raise max_body",
        )


async def _refuse(error: ApiError, arriving: _Arriving, send: Send) -> None:
    """Answer while the body still comes. The connection is of no use afterwards; but if it were
    closed with bytes unread, it would be reset, and the client might never see the answer."""
    response = error_response(error, {"Connection": "close"})
    headers = response.raw_headers
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with suppress(TimeoutError, _LeftError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while arriving.more:
                await arriving.part()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _shown(facts: dict[str, object]) -> tuple[object, ...]:
    # A path is the client's, who must not write lines of the log.
    path = str(facts["path"]).encode("unicode_escape").decode()
    return facts["client"], facts["method"], path, facts["status"] or "gone"


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for key, value in headers if key == name), b"")


def _id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own id if it is short and plain, else a new one."""
    given = _header(headers, b"x-request-id").decode("latin-1")
    if 0 < len(given) <= _LONGEST_ID and _ID_CHARACTERS.issuperset(given):
        return given
    return new_id()
