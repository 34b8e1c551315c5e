"""Log lines that carry the id of their request; as text or as JSON."""

from __future__ import annotations

import json
import logging
import secrets
import sys
import time
from contextvars import ContextVar
from typing import Any

__all__ = ["configure_log", "log", "log_prompt", "new_id", "request_id"]

log = logging.getLogger("kvant.server")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being answered here."""


def new_id() -> str:
    """An id for a request that has none."""
    return secrets.token_hex(12)


def log_prompt(text: str, length: int) -> None:
    """Write the beginning of a prompt, for operators who ask for it."""
    if length:
        log.info("prompt: %s", ascii(text[:length]))


class _Stamp(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get() or "-"
        return True


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(request_id)s %(message)s",
            "%Y-%m-%dT%H:%M:%S",
        )
        self.converter = time.gmtime


class _Json(logging.Formatter):
    """One object a line; what a record has in ``facts`` are fields of it."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        found: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": getattr(record, "request_id", None),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found)


def configure_log(level: str, form: str) -> None:
    """Send the lines of kvant and uvicorn to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    handler.addFilter(_Stamp())
    for name, least in (("kvant", logging.DEBUG), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(max(least, logging.getLevelNamesMapping()[level.upper()]))
        logger.propagate = False
