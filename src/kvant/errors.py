"""Every error that kvant raises on purpose.

    KvantError                  exit 1
    ├── ConfigError             an option or a format name is wrong          exit 2, HTTP 400
    ├── RequestError            one request cannot be served as asked        exit 2, HTTP 400
    ├── ModelError              a model cannot be found, read or supported   exit 3
    └── EngineDeadError         the step loop failed; the cause is chained   exit 1, HTTP 500

Each message names the value, the limit and the remedy in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ConfigError", "EngineDeadError", "KvantError", "ModelError", "RequestError"]


class KvantError(Exception):
    """Base of all deliberate errors. ``exit_code`` is what the CLI returns, ``http_status``
    what a server answers."""

    exit_code = 1
    http_status = 500


class ConfigError(KvantError):
    """An engine option, a KV format name or a combination of options is not valid."""

    exit_code = 2
    http_status = 400


class RequestError(KvantError):
    """A request asks for something that cannot be done (its prompt, its sampling options)."""

    exit_code = 2
    http_status = 400


class ModelError(KvantError):
    """A model is missing, damaged or of an architecture that kvant does not know."""

    exit_code = 3


class EngineDeadError(KvantError):
    """The engine's step loop raised; requests that ran were failed and no more are taken."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``'; did you mean "x"?'`` for the nearest known name, or a full stop."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f'; did you mean "{near[0]}"?' if near else "."
