"""``kvant serve`` as a process: how it begins, and all the ways in which it may end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvant.cli import main
from tests.cli.conftest import Done, start
from tests.server.conftest import PATIENCE, wait_until

LONG = {"prompt": "once", "max_tokens": 5000, "ignore_eos": True, "temperature": 0}
ENDLESS = LONG | {"max_tokens": 16000}


@dataclass(frozen=True)
class Process:
    """A server process and what it wrote to stderr."""

    popen: subprocess.Popen[bytes]
    stderr: Path

    @property
    def log(self) -> str:
        return self.stderr.read_text()

    @property
    def port(self) -> int:
        return int(self.wait_for(r"listening on https?://\S+:(\d+)"))

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE)

    def wait_for(self, pattern: str) -> str:
        """The first group of what the log is to match."""
        compiled = re.compile(pattern)
        wait_until(lambda: compiled.search(self.log) is not None or self.popen.poll() is not None)
        found = compiled.search(self.log)
        assert found, f"exit code {self.popen.returncode}: {self.log}"
        return found[1] if compiled.groups else found[0]

    def exit_code(self) -> int:
        return self.popen.wait(PATIENCE)

    def assert_one_error(self, code: int, *words: str) -> None:
        """It ended with one line that says why."""
        assert self.exit_code() == code, self.log
        errors = [line for line in self.log.splitlines() if line.startswith("kvant: error: ")]
        assert len(errors) == 1 and all(word in errors[0] for word in words), self.log
        assert "Traceback" not in self.log


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start ``kvant serve`` with these words; what still runs at the end is killed."""
    started: list[Process] = []

    def serve(*words: str, ready: bool = True) -> Process:
        path = tmp_path / f"stderr-{len(started)}"
        with path.open("wb") as stderr:
            popen = start("serve", *words, stderr=stderr, stdout=subprocess.DEVNULL)
        process = Process(popen, path)
        started.append(process)
        if ready:
            process.wait_for("ready: ")
        return process

    yield serve
    for process in started:
        process.popen.kill()
        process.popen.wait()


@contextmanager
def streaming(client: httpx.Client, body: dict[str, Any]) -> Iterator[Iterator[str]]:
    """The lines of a stream that has begun."""
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert next(lines).startswith("data: ")
        yield lines


@contextmanager
def asking(process: Process, body: dict[str, Any]) -> Iterator[Callable[[], httpx.Response]]:
    """A request that has no answer yet, and a way to wait for it."""
    with process.client() as client, ThreadPoolExecutor(1) as pool:
        before = client.get("/kv").json()["running"]
        future = pool.submit(client.post, "/v1/completions", json=body)
        wait_until(lambda: client.get("/kv").json()["running"] > before)
        yield lambda: future.result(PATIENCE)


@pytest.fixture
def endless_model(tiny: str, tmp_path: Path) -> str:
    """A model that is being loaded for ever: nobody writes to the pipe that it reads."""
    folder = tmp_path / "endless"
    folder.mkdir()
    for path in Path(tiny).iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return str(folder)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish_and_no_new_ones_in(
    tiny: str, serve: Callable[..., Process], sig: int
) -> None:
    process = serve("api_server", tiny, "--server-port", "0")
    with (
        process.client() as client,
        asking(process, LONG) as answered,
        streaming(client, LONG) as lines,
    ):
        process.popen.send_signal(sig)
        process.wait_for("draining: 2 ")
        with process.client() as other:
            refused = other.post("/v1/completions", json=LONG)
            assert other.get("/ready").json() == {"status": "draining"}
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
        assert "shutting down" in refused.json()["error"]["message"]

        *_, last, done = lines
        assert done == "data: [DONE]" and '"finish_reason": "length"' in last
        assert answered().json()["usage"]["completion_tokens"] == LONG["max_tokens"]
    assert process.exit_code() == 0, process.log


def test_what_runs_when_the_drain_limit_is_over_gets_an_error(
    tiny: str, serve: Callable[..., Process]
) -> None:
    process = serve(tiny, "--server-port", "0", "--drain-timeout", "0")
    with (
        process.client() as client,
        asking(process, ENDLESS) as answered,
        streaming(client, ENDLESS) as lines,
    ):
        process.popen.terminate()
        error = json.loads([*lines][-1].removeprefix("data: "))["error"]
        assert error["code"] == 503 and "shutting down" in error["message"]
        cut = answered()
        assert cut.status_code == 503 and "Retry-After" in cut.headers
        assert "shutting down" in cut.json()["error"]["message"]
    assert process.exit_code() == 0, process.log


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_server_at_once(
    tiny: str, serve: Callable[..., Process], sig: int
) -> None:
    process = serve(tiny, "--server-port", "0")
    with process.client() as client, streaming(client, ENDLESS) as lines:
        process.popen.send_signal(sig)
        process.wait_for("draining: ")
        process.popen.send_signal(sig)
        with pytest.raises(httpx.TransportError):
            list(lines)
    assert process.exit_code() == 128 + sig, process.log


def test_a_signal_while_the_model_is_loaded_ends_the_server(
    endless_model: str, serve: Callable[..., Process]
) -> None:
    process = serve(endless_model, "--server-port", "0", ready=False)
    with process.client() as client:
        assert client.get("/ready").status_code == 503
        refused = client.post("/v1/completions", json=LONG)
        assert refused.status_code == 503 and "loaded" in refused.json()["error"]["message"]
    process.popen.terminate()
    assert process.exit_code() == 0, process.log
    assert "ready: " not in process.log


def test_clients_of_a_killed_server_know_at_once_and_the_next_one_answers_the_same(
    tiny: str, serve: Callable[..., Process]
) -> None:
    question = LONG | {"max_tokens": 40}
    first = serve(tiny, "--server-port", "0")
    with first.client() as client:
        before = client.post("/v1/completions", json=question).json()["choices"]
    with (
        first.client() as client,
        asking(first, ENDLESS) as answered,
        streaming(client, ENDLESS) as lines,
    ):
        first.popen.kill()
        with pytest.raises(httpx.TransportError):
            list(lines)
        with pytest.raises(httpx.TransportError):
            answered()

    again = serve(tiny, "--server-port", str(first.port))
    with again.client() as client:
        assert client.post("/v1/completions", json=question).json()["choices"] == before


def test_a_port_that_is_taken(tiny: str, serve: Callable[..., Process]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = serve(tiny, "--server-port", port, ready=False)
        process.assert_one_error(2, "cannot listen", port, "--server-port")


def test_a_model_that_cannot_be_loaded(
    tiny: str, tmp_path: Path, serve: Callable[..., Process]
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in Path(tiny).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").write_bytes(b"nothing of use")
    process = serve(str(folder), "--server-port", "0", ready=False)
    process.assert_one_error(3, "model.safetensors")
    assert process.log.splitlines()[-1].startswith("kvant: error: ")


def test_a_server_that_is_open_to_others_without_a_key_says_so_in_json(
    endless_model: str, serve: Callable[..., Process]
) -> None:
    words = ("--server-name", "0.0.0.0", "--log-format", "json")
    process = serve(endless_model, "--server-port", "0", *words, ready=False)
    process.wait_for("no API key")
    with process.client() as client:
        assert client.get("/health", headers={"X-Request-Id": "mine"}).status_code == 503
    process.wait_for("/health")
    process.popen.terminate()
    assert process.exit_code() == 0, process.log
    lines = [json.loads(line) for line in process.log.splitlines()]
    assert all(
        {"time", "level", "logger", "message", "request_id"} <= line.keys() for line in lines
    )
    (warning,) = (line for line in lines if line["level"] == "warning")
    assert "0.0.0.0 is open" in warning["message"] and "--api-keys" in warning["message"]
    (access,) = (line for line in lines if line.get("path") == "/health")
    assert access["request_id"] == "mine" and access["status"] == 503


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("no-such-model-anywhere",), 3, ("no-such-model-anywhere",)),
        (("tiny", "--server-prot", "1"), 2, ("--server-prot", "--server-port")),
        (("tiny", "--server-port", "70000"), 2, ("70000", "65535")),
        (("tiny", "--log-format", "xml"), 2, ("xml", "json")),
        (("tiny", "--ssl-keyfile", "k.pem"), 2, ("ssl_certfile",)),
        (("tiny", "--api-key-file", "/no/file"), 2, ("/no/file",)),
        (("tiny", "--tool-call-parser", "lama"), 2, ("lama", "llama")),
        (("api_server", "one", "two"), 2, ("one two",)),
        ((), 2, ("MODEL",)),
    ],
)
def test_what_is_wrong_is_said_before_anything_listens(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, said: tuple[str, ...]
) -> None:
    exit_code = main(["serve", *words])
    captured = capsys.readouterr()
    Done(exit_code, captured.out, captured.err).assert_error(code, *said)
