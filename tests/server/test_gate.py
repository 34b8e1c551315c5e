"""What a request passes before a route sees it, and what an operator may set."""

from __future__ import annotations

import asyncio
import hmac
import io
import json
import logging
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from kvant import EngineConfig, Pipeline, pipeline
from kvant.errors import ConfigError, KvantError
from kvant.server.config import KEYS_VARIABLE, ServerConfig
from kvant.server.log import configure_log
from tests.server.conftest import PATIENCE, Served, Steps, listening, serving, wait_until

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "a", "max_tokens": 2}
KEY, OTHER = "sk-first-key", "sk-second"


def no_model() -> Pipeline:
    raise KvantError("this server never has a model")


@contextmanager
def waiting(**options: Any) -> Iterator[httpx.Client]:
    """A client of a server whose model never comes: it gets 503 where it is let in."""
    with (
        listening(no_model, **{"access_log": False} | options) as (url, *_),
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        yield client


@pytest.fixture
def bare() -> Iterator[httpx.Client]:
    with waiting() as client:
        yield client


def error_of(answer: httpx.Response) -> Any:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == answer.headers["X-Request-Id"]
    return error


# ----------------------------------------------------------------------------------------- keys


def by_option(_: Path, __: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"api_keys": [KEY, OTHER]}


def by_file(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "keys").write_text(f"# of the first team\n{KEY}\n\n  {OTHER}  \n")
    return {"api_key_file": str(folder / "keys")}


def by_environment(_: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setenv(KEYS_VARIABLE, f"{KEY}, {OTHER},")
    return {}


def by_all(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "keys").write_text(OTHER)
    patch.setenv(KEYS_VARIABLE, "sk-third")
    return {"api_keys": [KEY], "api_key_file": str(folder / "keys")}


@pytest.mark.parametrize("source", [by_option, by_file, by_environment, by_all])
def test_who_has_a_key_is_let_in(
    source: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting(**source(tmp_path, monkeypatch)) as client:
        for key in (KEY, OTHER):
            for given in (f"Bearer {key}", f"bearer {key}", f"BEARER  {key}"):
                answer = client.get("/v1/models", headers={"Authorization": given})
                assert answer.status_code == 200, given


NO_KEYS: list[str | bytes] = [
    *("", "Bearer", "Bearer sk-wrong", KEY, f"Basic {KEY}", f"Bearer {KEY}x"),
    *(f"Bearer {KEY[:-1]}", f"Bearer {KEY.upper()}", f"Bearer{KEY}", f"Bearer {KEY},{OTHER}"),
    *(f"Bearer {KEY} {OTHER}", f"Bearer Bearer {KEY}", "Bearer " + "a" * 10_000),
    *(b"Bearer \xff\xfe", b"\xff", f"Bearer {KEY}\u00e9".encode("latin-1")),
]


def test_who_has_none_is_not() -> None:
    with waiting(api_keys=[KEY, OTHER]) as client:
        for headers in ({}, *({"Authorization": given} for given in NO_KEYS)):
            for answer in (
                client.get("/v1/models", headers=headers),
                client.post(COMPLETIONS, json=BODY, headers=headers),
            ):
                assert answer.status_code == 401, headers
                error = error_of(answer)
                assert (error["type"], error["code"]) == (
                    "authentication_error",
                    "invalid_api_key",
                )
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert KEY not in answer.text


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/page/nothing.js"])
def test_some_paths_are_open(path: str) -> None:
    with waiting(api_keys=[KEY]) as client:
        assert client.get(path).status_code != 401


CLOSED = ("/v1/models", "/v1/models/tiny", "/kv", "/docs", "/openapi.json", "/nothing", "/healthy")


@pytest.mark.parametrize("path", [*CLOSED, "//health", "/page", "/v1/../health", "/health/"])
def test_others_are_not(path: str) -> None:
    with waiting(api_keys=[KEY]) as client:
        # As it stands: a client library would tidy the path up.
        assert b" 401 " in raw(client, f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").split(b"\r\n")[0]


def test_how_long_a_refusal_takes_tells_nothing_of_the_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []
    in_constant_time = hmac.compare_digest

    def compare(first: bytes, second: bytes) -> bool:
        compared.append((first, second))
        return in_constant_time(first, second)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    with waiting(api_keys=[KEY, OTHER]) as client:
        for given in (KEY, "sk-wrong"):
            client.get("/v1/models", headers={"Authorization": f"Bearer {given}"})
    assert compared == [
        (key.encode(), given.encode()) for given in (KEY, "sk-wrong") for key in (KEY, OTHER)
    ]


def raw(client: httpx.Client, text: str | bytes) -> bytes:
    """What a server answers to bytes, until it closes or has sent a head."""
    data = text.encode() if isinstance(text, str) else text
    address = urlsplit(str(client.base_url))
    with socket.create_connection((address.hostname, address.port), PATIENCE) as connection:
        connection.sendall(data)
        found = b""
        while b"\r\n\r\n" not in found and (part := connection.recv(65536)):
            found += part
        return found


# -------------------------------------------------------------------------------------- bodies


def test_a_body_may_be_as_long_as_the_limit_says() -> None:
    with waiting(max_body=1000) as client:
        body = json.dumps({"prompt": ""})
        fitting = json.dumps({"prompt": "a" * (1000 - len(body))})
        assert len(fitting) == 1000
        headers = {"Content-Type": "application/json"}
        for content in (fitting, iter([fitting.encode()])):
            assert client.post(COMPLETIONS, content=content, headers=headers).status_code == 503
        longer = fitting[:-2] + 'a"}'
        for content in (longer, iter([longer[:500].encode(), longer[500:].encode()])):
            answer = client.post(COMPLETIONS, content=content, headers=headers)
            assert answer.status_code == 413
            assert "1000" in error_of(answer)["message"]
            assert answer.headers["Connection"] == "close"


@pytest.mark.parametrize("chunked", [False, True])
def test_who_sends_far_too_much_sees_the_answer(chunked: bool) -> None:
    with waiting(max_body=1000) as client:
        content: Any = (b" " * 65536 for _ in range(500)) if chunked else b" " * 32_000_000
        answer = client.post(COMPLETIONS, content=content)
        assert answer.status_code == 413
        error_of(answer)


def test_a_body_that_is_announced_too_long_is_not_waited_for() -> None:
    with waiting(max_body=1000) as client:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n"
        assert raw(client, head).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: 100",
        "Transfer-Encoding: chunked",
        "Content-Length: 100\r\nExpect: 100-continue",
    ],
)
def test_a_body_that_does_not_come(head: str) -> None:
    with waiting(body_timeout=0.2) as client:
        text = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n"
        found = raw(client, text)
        if "Expect" in head:
            assert found.startswith(b"HTTP/1.1 100 ")
            return
        assert found.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in found.lower()


def test_a_body_that_trickles_does_not_come() -> None:
    with waiting(body_timeout=0.3) as client:
        address = urlsplit(str(client.base_url))
        with socket.create_connection((address.hostname, address.port), PATIENCE) as connection:
            connection.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n"
            )
            connection.settimeout(0.05)
            found = b""
            end = time.monotonic() + PATIENCE
            while not found and time.monotonic() < end:
                connection.sendall(b" ")
                try:
                    found = connection.recv(1000)
                except TimeoutError:
                    continue
            assert found.startswith(b"HTTP/1.1 408 ")


# ----------------------------------------------------------------------------------------- ids


def test_every_answer_has_an_id_of_its_own(bare: httpx.Client) -> None:
    paths = ("/", "/health", "/ready", "/metrics", "/v1/models", "/nothing", "/openapi.json") * 3
    found = [bare.get(path).headers["X-Request-Id"] for path in paths]
    assert len(set(found)) == len(found)
    assert all(re.fullmatch("[0-9a-f]{24}", each) for each in found)


@pytest.mark.parametrize("own", ["a", "7f3c-11:22_33.x", "A" * 128])
def test_a_clients_id_is_kept(bare: httpx.Client, own: str) -> None:
    answer = bare.post(COMPLETIONS, json=BODY, headers={"X-Request-Id": own})
    assert answer.headers["X-Request-Id"] == own
    assert error_of(answer)["request_id"] == own


@pytest.mark.parametrize(
    "own",
    ["", "a b", "A" * 129, "<script>", 'a"b', "a/b", "%0d%0aX: 1", b"\xff", "a\tb", "{}"],
)
def test_one_that_is_not_plain_is_replaced(bare: httpx.Client, own: str | bytes) -> None:
    found = bare.get("/ready", headers={"X-Request-Id": own}).headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{24}", found)


# --------------------------------------------------------------------------------------- routes


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/v1", "/v1/chat", "/page/..%2fapp.py", "/page/" + "a" * 999, "/page/%00", "/%ff"],
)
def test_what_is_not_there(bare: httpx.Client, path: str) -> None:
    answer = bare.get(path)
    assert answer.status_code == 404
    assert error_of(answer)["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", COMPLETIONS),
        ("POST", "/health"),
        ("PUT", "/tokenize"),
        ("DELETE", "/v1/models"),
        ("OPTIONS", "/kv"),
    ],
)
def test_what_is_not_done(bare: httpx.Client, method: str, path: str) -> None:
    answer = bare.request(method, path)
    assert answer.status_code == 405
    assert method not in answer.headers["Allow"]
    error_of(answer)


def test_docs_are_served(bare: httpx.Client) -> None:
    for path in ("/docs", "/redoc"):
        assert "text/html" in bare.get(path).headers["Content-Type"]
    document = bare.get("/openapi.json").json()
    assert document["info"]["title"] == "kvant"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert {"200", "500"} <= set(operation["responses"]), path
            assert "422" not in operation["responses"]
            assert operation["summary"]
            assert operation["description"]


def test_the_page_is_served(bare: httpx.Client) -> None:
    answer = bare.get("/")
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    parts = re.findall(r'(?:src|href)="(/?page/[^"]+)"', answer.text)
    assert parts
    for part in parts:
        assert bare.get(part).status_code == 200, part


# ----------------------------------------------------------------------------------------- CORS

ORIGIN = "https://app.example"
ASKING = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def test_other_origins_are_not_let_in_by_default(bare: httpx.Client) -> None:
    for answer in (
        bare.get("/v1/models", headers={"Origin": ORIGIN}),
        bare.options(COMPLETIONS, headers=ASKING),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_an_origin_is_let_in() -> None:
    with waiting(allow_origins=[ORIGIN], api_keys=[KEY], max_body=1000) as client:
        asked = client.options(COMPLETIONS, headers=ASKING)  # as browsers ask: without a key
        assert asked.status_code == 200
        assert asked.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "POST" in asked.headers["Access-Control-Allow-Methods"]
        assert "authorization" in asked.headers["Access-Control-Allow-Headers"].lower()
        key = {"Authorization": f"Bearer {KEY}"}
        for headers, content, status in (
            (key, b"{}", 400),
            (key, b" " * 1001, 413),
            ({}, b"{}", 401),
        ):
            answer = client.post(
                COMPLETIONS, content=content, headers={"Origin": ORIGIN, **headers}
            )
            assert answer.status_code == status
            assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
            assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]
        other = client.get("/v1/models", headers={"Origin": "https://evil.example", **key})
        assert "Access-Control-Allow-Origin" not in other.headers
        assert client.options(COMPLETIONS).status_code == 401  # asks nothing about origins


# ------------------------------------------------------------------------------------------ log

SECRET = "the secret of the pyramid"


@contextmanager
def logged(form: str) -> Iterator[io.StringIO]:
    """What goes to the log, which is as before afterwards."""
    loggers = [logging.getLogger(name) for name in ("kvant", "uvicorn")]
    before = [(each.handlers[:], each.level, each.propagate) for each in loggers]
    configure_log("info", form)
    written = io.StringIO()
    (handler,) = loggers[0].handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(written)
    try:
        yield written
    finally:
        for each, (handlers, level, propagate) in zip(loggers, before, strict=True):
            each.handlers[:], each.propagate = handlers, propagate
            each.setLevel(level)


def ask_all(served: Served) -> None:
    message = {"role": "user", "content": SECRET}
    for path, body in (
        (COMPLETIONS, {"prompt": SECRET}),
        (COMPLETIONS, {"prompt": [SECRET], "stream": True}),
        ("/generate", {"prompt": SECRET}),
        ("/v1/chat/completions", {"messages": [message]}),
        ("/v1/chat/completions", {"messages": [message], "guided_regex": f"({SECRET}"}),
        ("/v1/chat/completions", {"messages": [message], "temperature": SECRET}),
        ("/v1/chat/completions", {"messages": [message], SECRET: 1}),
        ("/v1/chat/completions", {"messages": [{**message, "role": SECRET}]}),
        (COMPLETIONS, {"prompt": SECRET * 1000}),
        ("/tokenize", {"prompt": SECRET}),
    ):
        limit = {} if path == "/tokenize" else {"max_tokens": 1}
        served.post(path, {**body, **limit})


@pytest.fixture
def make(tiny: str) -> Callable[..., AbstractContextManager[Served]]:
    def make(**options: Any) -> AbstractContextManager[Served]:
        config = EngineConfig(kv_tokens=4096, max_batch_size=1, check=True)
        return serving(pipeline(tiny, config), **options)

    return make


@pytest.mark.parametrize("form", ["text", "json"])
def test_prompts_are_not_logged(
    make: Callable[..., AbstractContextManager[Served]], form: str
) -> None:
    with logged(form) as written, make() as served:
        ask_all(served)
    assert written.getvalue().count(COMPLETIONS) >= 3
    assert not any(word in written.getvalue() for word in ("secret", "pyramid"))


def test_so_much_of_a_prompt_is_logged(make: Callable[..., AbstractContextManager[Served]]) -> None:
    with logged("text") as written, make(max_log_len=10) as served:
        served.post(COMPLETIONS, {"prompt": SECRET, "max_tokens": 1})
        served.post(COMPLETIONS, {"prompt": "a\nb\x1b[31m", "max_tokens": 1})
    assert f"'{SECRET[:10]}'" in written.getvalue()
    assert SECRET[:11] not in written.getvalue()
    assert r"'a\nb\x1b[31m'" in written.getvalue()


def test_lines_are_json_and_carry_the_id() -> None:
    with logged("json") as written, waiting(access_log=True) as client:
        client.post(COMPLETIONS, json=BODY, headers={"X-Request-Id": "mine"})
        client.get('/a%0a{"level": "error"}%1b[31m')
        client.get("/health")  # 503: no good answer, so it is no debugging
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    about = [line for line in lines if line["logger"] == "kvant.server" and "status" in line]
    assert [line["status"] for line in about] == [503, 404, 503]
    first = about[0]
    assert first["request_id"] == "mine"
    assert (first["method"], first["path"], first["client"]) == ("POST", COMPLETIONS, "127.0.0.1")
    assert first["level"] == "info"
    assert first["duration_ms"] >= 0
    assert about[1]["path"] == '/a\n{"level": "error"}\x1b[31m'


def test_a_client_writes_no_lines_of_the_log() -> None:
    with logged("text") as written, waiting(access_log=True) as client:
        client.get("/a%0a2026-01-01%20ERROR%20forged%0d%1b[31m", headers={"X-Request-Id": "mine"})
    (line,) = [line for line in written.getvalue().splitlines() if "forged" in line]
    assert "INFO" in line
    assert " mine " in line
    assert "\x1b" not in written.getvalue()


def test_lines_about_requests_can_be_left_out() -> None:
    with logged("text") as written, waiting(access_log=False) as client:
        client.get("/nothing")
    assert "nothing" not in written.getvalue()


# --------------------------------------------------------------------------------------- states


def test_while_it_starts(bare: httpx.Client) -> None:
    for path, body in (
        (COMPLETIONS, BODY),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/generate", BODY),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        answer = bare.post(path, json=body)
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert error_of(answer)["type"] == "unavailable_error"
    assert bare.get("/ready").status_code == bare.get("/health").status_code == 503
    assert bare.get("/ready").json() == {"status": "starting"}
    assert bare.get("/kv").json()["state"] == "starting"
    assert bare.get("/v1/models").json()["data"][0]["max_model_len"] is None
    assert bare.get("/metrics").status_code == 200
    assert bare.post(COMPLETIONS, json={}).status_code == 400


@pytest.fixture
def busy(tiny: str) -> Iterator[Served]:
    """A server with room for one sequence, and a queue for one more."""
    config = EngineConfig(kv_tokens=4096, max_batch_size=1, check=True)
    with serving(pipeline(tiny, config), max_queue=1) as served:
        yield served


def test_a_full_queue(busy: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(busy.pipe, monkeypatch)
    engine = busy.pipe.model.engine
    with ThreadPoolExecutor() as threads:
        running = [threads.submit(busy.post, COMPLETIONS, BODY) for _ in range(2)]
        wait_until(lambda: busy.service._admitted == 2)
        for body in (BODY, {**BODY, "stream": True}, {**BODY, "n": 2}):
            answer = busy.post(COMPLETIONS, body)
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) > 0
            assert error_of(answer)["type"] == "rate_limit_error"
        assert busy.post(COMPLETIONS, {"prompt": 1}).status_code == 400
        assert busy.get("/v1/models").status_code == 200
        steps.allow(1000)
        assert [each.result().status_code for each in running] == [200, 200]
    assert busy.post(COMPLETIONS, BODY).status_code == 200
    assert 'reason="queue_full"} 3.0' in busy.get("/metrics").text
    assert engine.stats().pages_held == 0


def test_while_it_drains(busy: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(busy.pipe, monkeypatch)
    assert busy.service._courier is not None
    loop = busy.service._courier._loop
    with ThreadPoolExecutor() as threads:
        running = threads.submit(busy.post, COMPLETIONS, BODY)
        wait_until(lambda: len(busy.service._active) == 1)
        draining = asyncio.run_coroutine_threadsafe(busy.service.drain(), loop)
        wait_until(lambda: busy.service.state == "draining")
        answer = busy.post(COMPLETIONS, BODY)
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert "shutting down" in error_of(answer)["message"]
        assert busy.get("/ready").status_code == 503
        assert not draining.done()
        steps.allow(1000)
        assert running.result().status_code == 200
        draining.result(PATIENCE)


def test_an_error_that_nobody_expected(busy: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a secret detail")

    monkeypatch.setattr(busy.service, "check_model", broken)
    with busy.client() as client, logged("text") as written:
        for _ in range(2):  # the connection goes on
            answer = client.post(COMPLETIONS, json=BODY)
            assert answer.status_code == 500
            assert "secret" not in answer.text
            assert error_of(answer)["type"] == "server_error"
            assert answer.headers["X-Request-Id"] in written.getvalue()
    assert "a secret detail" in written.getvalue()
    assert "ASGI" not in written.getvalue()


# ------------------------------------------------------------------------------------------ TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, found = folder / "key.pem", folder / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(found)]
    try:
        subprocess.run([*command.split(), *name, *files], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    return key, found


def test_tls(certificate: tuple[Path, Path]) -> None:
    key, found = certificate
    options = {"ssl_keyfile": str(key), "ssl_certfile": str(found)}
    with listening(no_model, **options) as (url, *_):
        trusting = ssl.create_default_context(cafile=found)
        with httpx.Client(base_url=url.replace("http:", "https:"), verify=trusting) as client:
            assert client.get("/ready").status_code == 503
            assert client.post("/tokenize", json={"prompt": 1}).status_code == 400
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/ready")


def test_tls_files_that_are_none(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    key, found = map(str, certificate)
    other = tmp_path / "other.pem"
    other.write_text("no key")
    for options in (
        {"ssl_keyfile": key},
        {"ssl_certfile": found},
        {"ssl_keyfile": key, "ssl_certfile": "/nothing"},
    ):
        with pytest.raises(ConfigError):
            ServerConfig(**options)
    with (
        pytest.raises(ConfigError, match="TLS"),
        listening(no_model, ssl_keyfile=str(other), ssl_certfile=found),
    ):
        pass


# --------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    "wrong",
    [
        {"server_port": -1},
        {"server_port": 65536},
        {"server_port": "80"},
        {"server_port": True},
        {"max_queue": -1},
        {"max_body": "many"},
        {"max_body": -1},
        {"max_grammar": "1 potato"},
        {"max_n": 0},
        {"max_n": 129},
        {"max_stop": -1},
        {"max_logit_bias": 1025},
        {"max_log_len": -1},
        {"grammar_timeout": 0},
        {"header_timeout": 0},
        {"header_timeout": float("nan")},
        {"body_timeout": float("inf")},
        {"write_timeout": -1},
        {"keep_alive": 0},
        {"stall_timeout": 0},
        {"drain_timeout": -1},
        {"drain_timeout": None},
        {"log_level": "loud"},
        {"log_format": "xml"},
        {"tool_call_parser": "hermess"},
    ],
    ids=str,
)
def test_wrong_options(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError) as raised:
        ServerConfig(**wrong)
    assert name in str(raised.value) or "max_" in name


@pytest.mark.parametrize("keys", [[""], ["  "], [KEY, ""], ["a\nb"], ["schl\u00fcssel"], ["\x00"]])
def test_wrong_keys(keys: list[str]) -> None:
    with pytest.raises(ConfigError, match="API key"):
        ServerConfig(api_keys=keys).resolved("tiny")


def test_wrong_files_of_keys(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("# none yet\n\n")
    binary.write_bytes(b"\xff\xfe")
    for path in (empty, binary, tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            ServerConfig(api_key_file=str(path)).resolved("tiny")


def test_no_threads_are_left() -> None:
    before = threading.active_count()
    with waiting() as client:
        client.get("/ready")
    wait_until(lambda: threading.active_count() <= before)
