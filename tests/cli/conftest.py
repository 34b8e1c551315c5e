"""Ways to run a command line."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

import kvant
from kvant.cli import main


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.out.split("\n")[:-1]]

    def assert_error(self, code: int, *words: str) -> None:
        """One line that says what is wrong, and nothing else on stderr."""
        assert self.code == code, self
        assert self.err.startswith("kvant: error: "), self
        assert self.err.count("\n") == 1 and self.err.endswith("\n"), self
        assert all(word in self.err for word in words), self


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def run(*words: str) -> Done:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


def start(*words: str, **streams: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """``python -m kvant`` as a user would run it."""
    env = os.environ | {"PYTHONPATH": str(Path(kvant.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    env.pop("KVANT_DEBUG", None)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", "kvant", *words],
        env=env,
        # A test run in the background of a script has SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **(pipes | streams),
    )


def finish(process: subprocess.Popen[bytes], timeout: float = 60) -> Done:
    out, err = process.communicate(timeout=timeout)
    return Done(process.returncode, (out or b"").decode(), (err or b"").decode())


class Terminal:
    """The user's side of a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self._end, theirs = pty.openpty()
        self.process: subprocess.Popen[bytes] = start(
            *words, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str, *, least: int = 0, timeout: float = 60) -> str:
        """Read until ``text`` and ``least`` more characters; returns what came."""
        came, end = "", time.monotonic() + timeout
        while text not in came or len(came) < came.index(text) + len(text) + least:
            assert time.monotonic() < end, came
            if select.select([self._end], [], [], 0.5)[0]:
                try:
                    came += os.read(self._end, 4096).decode(errors="replace")
                except OSError:  # the other side has gone
                    break
        return came

    def say(self, text: str) -> None:
        os.write(self._end, text.encode())

    def leave(self) -> int:
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._end)
