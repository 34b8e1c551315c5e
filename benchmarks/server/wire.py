"""A light HTTP client: what a load needs, and ways to misbehave.

It shares the cores with the server that it loads, so it takes little of them: bytes are kept as
they come, with their times, and parsed when the answer is complete.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "Connection", "events", "post"]

_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"\r\n0\r\n\r\n"


def post(path: str, body: Any) -> bytes:
    """A request; bytes are sent as they are, all else as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: kvant\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


@dataclass(slots=True)
class Answer:
    """What came, and when: seconds of ``time.perf_counter``. ``complete`` says whether all did."""

    sent: float
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    complete: bool = False

    @property
    def first(self) -> float:
        """When the first bytes after the head came."""
        size = 0
        for when, data in self.reads:
            size += len(data)
            if size > self._head_size:
                return when
        return self.reads[-1][0]

    @property
    def last(self) -> float:
        """When the last bytes came."""
        return self.reads[-1][0]

    @property
    def status(self) -> int | None:
        """The status code, None if nothing came."""
        return int(self.reads[0][1].split(b" ", 2)[1]) if self.reads else None

    @property
    def body(self) -> bytes:
        """The body without the frames of its chunks."""
        head, _, body = b"".join(data for _, data in self.reads).partition(_HEAD_END)
        return _unchunked(body) if _is_chunked(head) else body

    @property
    def _head_size(self) -> int:
        return b"".join(data for _, data in self.reads).find(_HEAD_END) + len(_HEAD_END)


def events(body: bytes) -> list[Any]:
    """The objects of a stream's events, without the last word ``[DONE]``."""
    lines = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def _is_chunked(head: bytes) -> bool:
    return b"transfer-encoding: chunked" in head.lower()


def _unchunked(body: bytes) -> bytes:
    parts, place = [], 0
    while (end := body.find(b"\r\n", place)) >= 0 and (size := int(body[place:end], 16)):
        parts.append(body[end + 2 : end + 2 + size])
        place = end + 2 + size + 2
    return b"".join(parts)


class Connection(asyncio.Protocol):
    """A connection to the server on this machine; made by :meth:`open`."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer = Answer(0.0)
        self._done: asyncio.Future[None] | None = None
        self._leave_after: int | None = None
        self._left: int | None = None  # bytes to come; None if the answer is chunked
        self._tail = b""
        self._in_head = True

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect; raises OSError if nobody listens."""
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(cls, "127.0.0.1", port))[1]

    @property
    def is_open(self) -> bool:
        """Whether it can be used (again)."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, payload: bytes, *, leave_after: int | None = None) -> Answer:
        """Send a request and take the answer. The connection is cut after ``leave_after`` reads,
        and if the caller is cancelled."""
        assert self._transport is not None
        self._answer = Answer(time.perf_counter())
        self._done = asyncio.get_running_loop().create_future()
        self._leave_after, self._in_head, self._tail = leave_after, True, b""
        self._transport.write(payload)
        try:
            await self._done
        except asyncio.CancelledError:
            self.cut()
            raise
        return self._answer

    def cut(self) -> None:
        """Leave without a word."""
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Leave when all is written."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._answer.reads.append((time.perf_counter(), data))
        if len(self._answer.reads) == self._leave_after:
            self.cut()
        elif self._ends(data):
            self._answer.complete = True
            self._end()

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        self._end()

    def _end(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _ends(self, data: bytes) -> bool:
        if self._in_head:
            data = self._tail = self._tail + data
            head, end, data = data.partition(_HEAD_END)
            if not end:
                return False
            self._in_head, self._tail = False, b"\r\n"
            self._left = None if _is_chunked(head) else _content_length(head)
            if b"connection: close" in head.lower():
                self.close()
        if self._left is not None:
            self._left -= len(data)
            return self._left <= 0
        self._tail = (self._tail + data)[-len(_LAST_CHUNK) :]
        return self._tail == _LAST_CHUNK


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    return 0
