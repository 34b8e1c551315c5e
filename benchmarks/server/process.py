"""``kvant serve`` as a process of its own, and what can be seen of it from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.error import URLError
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Server"]

_LOADING_SECONDS = 120
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Server:
    """A server on a free port, until the context ends. ``words`` follow ``kvant serve``;
    ``program`` replaces ``python -m kvant``."""

    def __init__(
        self, words: Sequence[str], program: Sequence[str] = (sys.executable, "-m", "kvant")
    ) -> None:
        self.command = ["kvant", "serve", *words, "--server-port", "0"]
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)  # noqa: SIM115
        self._process = subprocess.Popen([*program, *self.command[1:]], stderr=self._log)
        try:
            self.port = int(self._wait_for(r"listening on http://[^ ]*:(\d+)"))
            self._wait_for(r"(ready): ")
        except BaseException:
            self._process.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._log.close()
        if error is None:
            Path(self._log.name).unlink()

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return Path(self._log.name).read_text()

    @property
    def rss_mib(self) -> float:
        """Its resident memory."""
        resident = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return round(int(resident) * _PAGE / 2**20, 1)

    @property
    def cpu_seconds(self) -> float:
        """Processor time that it took so far, user and system."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def get(self, path: str) -> Any:
        """JSON of a path."""
        return json.loads(self._read(path))

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name and these labels."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self._read("/metrics").decode())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def _read(self, path: str) -> bytes:
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            found: bytes = answer.read()
        return found

    def _wait_for(self, pattern: str) -> str:
        end = time.monotonic() + _LOADING_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            if found := re.search(pattern, self.log):
                return found[1]
            time.sleep(0.1)
        raise URLError(f"the server did not start:\n{self.log}")
