"""What no HTTP client would send: slow, huge and garbled heads, bodies that lie, streams unread."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest

from kvant import EngineConfig, pipeline
from tests.server.conftest import PATIENCE, Served, listening, serving, wait_until
from tests.server.test_gate import no_model

HOST = b"Host: a\r\n"
GET = b"GET /ready HTTP/1.1\r\n" + HOST + b"\r\n"
POST = b"POST /tokenize HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"

Connect = Callable[[], socket.socket]


@contextmanager
def connecting(**options: Any) -> Iterator[Connect]:
    """Connections to a server without a model, closed at the end."""
    found: list[socket.socket] = []
    with listening(no_model, **{"access_log": False} | options) as (url, *_):

        def connect() -> socket.socket:
            address = urlsplit(url)
            found.append(socket.create_connection((address.hostname, address.port), PATIENCE))
            return found[-1]

        try:
            yield connect
        finally:
            for connection in found:
                connection.close()


@pytest.fixture(scope="module")
def connect() -> Iterator[Connect]:
    with connecting() as found:
        yield found


def all_of(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def answer(connection: socket.socket) -> bytes:
    """The next answer, whole, of a connection that stays open."""
    found = b""
    while not found.partition(b"\r\n\r\n")[1]:
        found += _more(connection)
    head, _, body = found.partition(b"\r\n\r\n")
    (length,) = re.findall(rb"(?i)^content-length: *(\d+)", head, flags=re.MULTILINE)
    while len(body) < int(length):
        body += _more(connection)
    return head + b"\r\n\r\n" + body


def _more(connection: socket.socket) -> bytes:
    part = connection.recv(65536)
    assert part, "the server closed the connection"
    return part


def check_refusal(found: bytes, *statuses: int) -> None:
    """One whole answer in OpenAI's shape, and no more."""
    head, _, body = found.partition(b"\r\n\r\n")
    first, *lines = head.decode("ascii").split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert int(first.split()[1]) in statuses, first
    assert int(headers["content-length"]) == len(body)
    assert headers["connection"] == "close"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == headers["x-request-id"]


def check_good(connect: Connect) -> None:
    """The server answers others."""
    connection = connect()
    connection.sendall(GET.replace(HOST, HOST + b"Connection: close\r\n"))
    assert all_of(connection).startswith(b"HTTP/1.1 503 ")


# ---------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("start", [b"", b"G", b"GET /ready HTTP/1.1\r\n", GET[:-2]])
def test_a_head_that_does_not_come(start: bytes) -> None:
    with connecting(header_timeout=0.5) as connect:
        connection = connect()
        connection.sendall(start)
        check_refusal(all_of(connection), 408)
        check_good(connect)


def test_a_head_that_trickles_does_not_come() -> None:
    with connecting(header_timeout=0.3) as connect:
        connection = connect()
        connection.sendall(GET[:-2])
        connection.settimeout(0.02)
        found = b""
        end = time.monotonic() + PATIENCE
        while not found and time.monotonic() < end:
            connection.sendall(b"X: a\r\n")
            with suppress(TimeoutError):
                found = connection.recv(65536)
        check_refusal(found, 408)


def test_the_next_head_has_its_own_time() -> None:
    with connecting(header_timeout=1) as connect:
        connection = connect()
        for _ in range(3):
            connection.sendall(GET)
            assert answer(connection).startswith(b"HTTP/1.1 503 ")
            time.sleep(0.5)
        connection.sendall(GET[:-2])
        check_refusal(all_of(connection), 408)


def test_an_idle_connection_is_closed() -> None:
    with connecting(keep_alive=1) as connect:
        connection = connect()
        connection.sendall(GET)
        assert all_of(connection).startswith(b"HTTP/1.1 503 ")


FLOODS = {
    "a long header": GET[:-2] + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    "many headers": GET[:-2] + b"X: a\r\n" * 40_000 + b"\r\n",
    "a long name": GET[:-2] + b"X" * 200_000 + b": a\r\n\r\n",
    "a long path": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "a long query": b"GET /ready?" + b"a" * 200_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "no end": GET[:-2] + b"X: " + b"a" * 2_000_000,
}


@pytest.mark.parametrize("again", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_headers(connect: Connect, flood: str, again: bool) -> None:
    connection = connect()
    if again:
        connection.sendall(GET)
        assert answer(connection).startswith(b"HTTP/1.1 503 ")
    with suppress(ConnectionError):  # it may be closed before all was sent
        connection.sendall(FLOODS[flood])
    check_refusal(all_of(connection), 431)
    check_good(connect)


@pytest.mark.parametrize("size", [1000, 60_000])
def test_headers_that_are_not_too_long(connect: Connect, size: int) -> None:
    connection = connect()
    for _ in range(5):
        connection.sendall(GET[:-2] + b"X: " + b"a" * size + b"\r\n\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 503 ")


def test_long_bodies_are_no_headers(connect: Connect) -> None:
    connection = connect()
    body = json.dumps({"prompt": "a" * 500_000}).encode()
    for _ in range(3):
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert answer(connection).startswith(b"HTTP/1.1 503 ")


# -------------------------------------------------------------------------------------- garbage

EMPTY = POST + b"Content-Length: 0\r\n"
GARBLED = {
    "nothing of HTTP": b"hello\r\n\r\n",
    "zeros": b"\x00" * 100,
    "random": bytes((i * 89 + 7) % 256 for i in range(1000)),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x11" * 500,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9": b"GET / HTTP/9.9\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.0\r\n",
    "SOCKS": b"\x05\x01\x00",
    "a method that is none": b"GE T / HTTP/1.1\r\n\r\n",
    "an unknown method": b"BREW /pot HTTP/1.1\r\n" + HOST + b"\r\n",
    "a long method": b"A" * 10_000 + b" / HTTP/1.1\r\n\r\n",
    "a path with a space": b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path without slash": b"GET a HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path of bytes": b"GET /\xff\xfe HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path with NUL": b"GET /\x00 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a header without colon": GET[:-2] + b"nothing\r\n\r\n",
    "a header without name": GET[:-2] + b": a\r\n\r\n",
    "a name with a space": GET[:-2] + b"X Y: a\r\n\r\n",
    "a name with a space at its end": GET[:-2] + b"X : a\r\n\r\n",
    "a name of bytes": GET[:-2] + b"\xff: a\r\n\r\n",
    "a value with NUL": GET[:-2] + b"X: a\x00b\r\n\r\n",
    "a value with a control character": GET[:-2] + b"X: a\x01b\r\n\r\n",
    "a lonely CR": GET[:-2] + b"X: a\rY: b\r\n\r\n",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n",
    "a length that is none": POST + b"Content-Length: many\r\n\r\n",
    "a length with a sign": POST + b"Content-Length: +5\r\n\r\n{}   ",
    "a length in hexadecimal": POST + b"Content-Length: 0x2\r\n\r\n{}",
    "an empty length": POST + b"Content-Length:\r\n\r\n{}",
    "a huge length": POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}",
    "a length of many digits": POST + b"Content-Length: " + b"9" * 6000 + b"\r\n\r\n{}",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
    "a list of lengths": POST + b"Content-Length: 2, 3\r\n\r\n{} ",
    "length and chunks": EMPTY + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an unknown encoding": POST + b"Transfer-Encoding: wrong\r\n\r\n{}",
    "chunks in chunks": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
}
CHUNKS = {
    "no size": b"hello\r\n",
    "a negative size": b"-1\r\n{}\r\n",
    "a huge size": b"f" * 30 + b"\r\n{}\r\n",
    "a size that is too small": b"1\r\n{}\r\n0\r\n\r\n",
    "a size with a space": b" 2\r\n{}\r\n0\r\n\r\n",
    "no line after a chunk": b"2\r\n{}0\r\n\r\n",
    "garbage behind a chunk": b"2\r\n{}\r\nzz\r\n",
    "garbage for a trailer": b"0\r\nno trailer\r\n\r\n",
    "NUL": b"\x00" * 100,
}
GARBLED |= {
    f"chunks: {name}": POST + b"Transfer-Encoding: chunked\r\n\r\n" + text
    for name, text in CHUNKS.items()
}


@pytest.mark.parametrize("name", GARBLED)
def test_what_is_no_http(connect: Connect, name: str) -> None:
    connection = connect()
    connection.sendall(GARBLED[name])
    connection.shutdown(socket.SHUT_WR)
    check_refusal(all_of(connection), 400, 404, 405, 413)
    check_good(connect)


CUT = {
    "in the first line": b"GET /re",
    "in the headers": GET[:-2],
    "in the body": POST + b"Content-Length: 100\r\n\r\n{",
    "in a chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n64\r\n{",
    "between chunks": POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
}


@pytest.mark.parametrize("name", CUT)
def test_who_stops_in_the_middle(connect: Connect, name: str) -> None:
    connection = connect()
    connection.sendall(CUT[name])
    connection.shutdown(socket.SHUT_WR)
    assert all_of(connection) == b""  # there is nobody to answer
    check_good(connect)


# ---------------------------------------------------------------------------------- well-formed


def test_requests_in_one_piece_are_answered_in_order(connect: Connect) -> None:
    connection = connect()
    ids = [f"number-{i}" for i in range(5)]
    text = b"".join(GET.replace(HOST, HOST + f"X-Request-Id: {i}\r\n".encode()) for i in ids)
    connection.sendall(text)
    found = b""
    while found.count(b"x-request-id: ") < len(ids):
        part = connection.recv(65536)
        assert part
        found += part
    places = [found.index(i.encode()) for i in ids]
    assert places == sorted(places)


def test_a_head_may_come_in_single_bytes(connect: Connect) -> None:
    connection = connect()
    for byte in GET:
        connection.sendall(bytes([byte]))
    assert answer(connection).startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize(
    "header",
    [
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
        b"X: \xff\xfe\r\n",
        b"Cookie: \xc3\xa9\r\n",
        b"Accept-Encoding: gzip;q=nan\r\n",
        b"Authorization: \xff\r\n",
    ],
)
def test_odd_headers_do_no_harm(connect: Connect, header: bytes) -> None:
    connection = connect()
    body = b'{"prompt": "a"}'
    connection.sendall(POST + header + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert answer(connection).startswith(b"HTTP/1.1 503 ")
    check_good(connect)


# --------------------------------------------------------------------------------------- unread


@pytest.fixture
def streaming(tiny: str) -> Iterator[Served]:
    pipe = pipeline(tiny, EngineConfig(kv_tokens=16384, check=False))
    with serving(pipe, write_timeout=0.3, access_log=False) as served:
        yield served


def test_a_stream_that_nobody_reads_is_cut(streaming: Served) -> None:
    engine = streaming.pipe.model.engine
    n, length = 8, 1900
    message = {"role": "user", "content": "a"}
    wanted: dict[str, Any] = {"messages": [message], "n": n, "max_tokens": length, "stream": True}
    wanted |= {"ignore_eos": True, "logprobs": True, "top_logprobs": 20}  # some 2 KB for a token
    body = json.dumps(wanted).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    address = urlsplit(streaming.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE)
        connection.connect((address.hostname, address.port))
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: engine.stats().running == n)
        wait_until(lambda: engine.stats().running == 0)
        found = b""
        with suppress(ConnectionError):
            found = all_of(connection)
    assert engine.stats().generated_tokens < n * length
    assert b"[DONE]" not in found
    wait_until(lambda: engine.stats().pages_held == 0)
    assert streaming.ask("/v1/completions", prompt="a", max_tokens=2)["choices"]
    assert "kvant:requests_aborted_total" in streaming.get("/metrics").text
