"""uvicorn's HTTP protocol with limits that it does not have: slow or huge headers, and clients that
do not read."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvant.server.config import ServerConfig

__all__ = ["protocol_of"]

_MOST_HEADER_BYTES = 64 * 1024


class _Protocol(HttpToolsProtocol):
    """Closes a connection whose headers take longer than ``header_timeout`` seconds or are longer
    than 64 KiB, and one whose client leaves what was sent unread for ``write_timeout`` seconds."""

    header_timeout: float
    write_timeout: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_bytes = 0
        self._in_headers = True
        self._writing: asyncio.TimerHandle | None = None
        self._reading = self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > _MOST_HEADER_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_headers:
            self._in_headers, self._header_bytes = True, 0
            self._reading = self._wait_for_headers()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._reading.cancel()
        super().on_headers_complete()

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

    def _wait_for_headers(self) -> asyncio.TimerHandle:
        return self.loop.call_later(self.header_timeout, self._refuse, b"408 Request Timeout")

    def _refuse(self, status: bytes) -> None:
        self.transport.write(
            b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        )
        self.transport.close()


def protocol_of(config: ServerConfig) -> type[Any]:
    """The protocol with the limits of a server; uvicorn takes a class."""
    limits = {"header_timeout": config.header_timeout, "write_timeout": config.write_timeout}
    return type("Protocol", (_Protocol,), limits)
