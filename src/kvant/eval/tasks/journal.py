"""A file of answers, so that an evaluation that was interrupted goes on where it was.

The first line says whose answers they are; each other line is one answer under the digest of what
was asked. A line counts once it is complete: of a line that a kill cut short nothing is used.
Answers are looked up by what is asked, so nothing is counted twice, whatever the order.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from kvant.errors import RequestError

__all__ = ["Journal", "digest"]

Answer = list[float | bool] | float | str


def digest(*asked: Any) -> str:
    """A key for what JSON can write."""
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Journal:
    """Answers by digest; with a file they outlive the process. Use as a context manager.

    Args:
        path: the file, which is made if it is not there; None for memory only.
        identity: what all answers depend on, such as the model and its precision.

    Raises:
        RequestError: the file is somebody else's, damaged, in use or cannot be written.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._answers: dict[str, Answer] = {}
        self._file: BinaryIO | None = None
        try:
            if path is not None:
                self._file = path.open("a+b")
                self._lock()
                self._read(dict(identity))
        except OSError as error:
            self.close()
            raise RequestError(f"cannot keep answers in {path}: {error.strerror}") from None
        except RequestError:
            self.close()
            raise

    @property
    def found(self) -> int:
        """How many answers there are."""
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        """An answer, or None."""
        return self._answers.get(key)

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer."""
        self._answers[key] = answer
        self._write({"key": key, "answer": answer})

    def remove(self) -> None:
        """Delete the file: its answers are in the results now."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file. Safe to repeat."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                f"{self.path} is in use by another evaluation; wait for it or choose another "
                "--output"
            ) from None

    def _read(self, identity: dict[str, Any]) -> None:
        """Take in what is there, and cut a last line that is not complete."""
        assert self._file is not None
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            kept = sum(map(len, lines[:-1]))
            os.ftruncate(self._file.fileno(), kept)
            lines.pop()
        if not lines:
            self._write({"identity": identity})
            return
        self._check(self._parse(1, lines[0], identity=dict), json.loads(json.dumps(identity)))
        for number, line in enumerate(lines[1:], start=2):
            entry = self._parse(number, line, key=str, answer=(str, list, float))
            self._answers[entry["key"]] = entry["answer"]

    def _parse(self, number: int, line: bytes, **kinds: Any) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(name), kind) for name, kind in kinds.items()
        ):
            raise RequestError(
                f"line {number} of {self.path} is damaged; delete the file to begin anew"
            )
        return entry

    def _check(self, entry: dict[str, Any], identity: dict[str, Any]) -> None:
        before = entry["identity"]
        for name, value in identity.items():
            other = before.get(name) if isinstance(before, dict) else None
            if other != value:
                raise RequestError(
                    f"{self.path} has answers of another run ({name} {other!r}, now {value!r}); "
                    "delete it or choose another --output"
                )

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._file is not None:
            line = json.dumps(entry, ensure_ascii=False) + "\n"
            self._file.write(line.encode("utf-8", "surrogatepass"))
            self._file.flush()
