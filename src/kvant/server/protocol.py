"""uvicorn's HTTP protocol with limits that it does not have: slow or huge headers, and clients that
do not read."""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from kvant.server.config import ServerConfig
from kvant.server.errors import ApiError, error_response
from kvant.server.log import new_id, request_id

__all__ = ["protocol_of"]

_MOST_HEADER_BYTES = 64 * 1024
_PIECE_BYTES = 4 * 1024
_LINGER_SECONDS = 2.0
_UPGRADE = re.compile(rb"\r\nupgrade(?=[ \t]*:)", re.IGNORECASE)


class _Protocol(HttpToolsProtocol):
    """Closes a connection whose headers take longer than ``header_timeout`` seconds or are longer
    than 64 KiB, and one whose client leaves what was sent unread for ``write_timeout`` seconds."""

    header_timeout: float
    write_timeout: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_bytes = 0
        self._in_headers = True
        self._refused = False
        self._cycles: list[RequestResponseCycle] = []
        self._writing: asyncio.TimerHandle | None = None
        self._reading = self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        if self._in_headers and self._reading.cancelled():
            self._reading = self._wait_for_headers()
        # Headers in pieces: one call may bring too many of them together with their end.
        while data and not self._refused and not self.transport.is_closing():
            size = _PIECE_BYTES if self._in_headers else len(data)
            piece, data = data[:size], data[size:]
            if self._in_headers:
                self._header_bytes += len(piece)
                piece = _without_upgrade(piece)
            if self._header_bytes > _MOST_HEADER_BYTES + _PIECE_BYTES:
                limit = f"the headers have more than {_MOST_HEADER_BYTES} bytes; send less"
                self._refuse(ApiError(431, limit))
                return
            super().data_received(piece)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_headers = True

    def on_headers_complete(self) -> None:
        self._in_headers, self._header_bytes = False, 0
        self._reading.cancel()
        super().on_headers_complete()
        self._cycles = [*self._unanswered(), self.cycle]

    def _unanswered(self) -> list[RequestResponseCycle]:
        """What is being answered and, of a client that does not wait for answers, what is next."""
        return [cycle for cycle in self._cycles if not cycle.response_complete]

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._reading.cancel()
        if self._writing is not None:
            self._writing.cancel()
        super().connection_lost(exc)
        for cycle in self._unanswered():  # uvicorn tells the last one only
            cycle.disconnected = True
            cycle.message_event.set()

    def _wait_for_headers(self) -> asyncio.TimerHandle:
        late = f"the headers did not come within {self.header_timeout:g} s; send them faster"
        return self.loop.call_later(self.header_timeout, self._refuse, ApiError(408, late))

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, f"this is no HTTP/1.1: {msg}"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        self._refused = True
        if not any(cycle.response_started for cycle in self._unanswered()):
            request_id.set(name := new_id())
            response = error_response(error, {"Connection": "close", "X-Request-Id": name})
            lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
            lines += [b"%b: %b" % header for header in response.raw_headers]
            self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        if self._in_headers and self.transport.can_write_eof():
            # To close while bytes come is to reset: the client might never see the answer.
            self.transport.write_eof()
            self.loop.call_later(_LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()


def _without_upgrade(data: bytes) -> bytes:
    """Headers under which an offer of another protocol is none: the parser drops the body of a
    request with one, and there are clients (Java's) that offer HTTP/2 with all they send."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nx-upgrd", head) + end + rest


def protocol_of(config: ServerConfig) -> type[Any]:
    """The protocol with the limits of a server; uvicorn takes a class."""
    limits = {"header_timeout": config.header_timeout, "write_timeout": config.write_timeout}
    return type("Protocol", (_Protocol,), limits)
