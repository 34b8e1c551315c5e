"""What clients of an OpenAI-compatible server share: its address, its errors, its streams."""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import urlsplit

from kvant.errors import ConfigError

__all__ = [
    "DEFAULT_URL",
    "Events",
    "authorization",
    "base_url",
    "error_text",
    "message_of",
    "reason",
    "unreachable",
]

DEFAULT_URL = "http://127.0.0.1:23333"
"""Where ``kvant serve`` listens unless told otherwise."""

_MOST = 300  # characters of a server's words that fit one line


def base_url(text: str) -> str:
    """A server's address without ``/v1``, from what people call it: ``host:port`` will do.

    Raises:
        ConfigError: it is none.
    """
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        known = known and parts.username is None  # it would be stored with results
    except ValueError:
        known = False
    if not known or parts.query or parts.fragment:
        raise ConfigError(f'"{text}" is no address of a server; give one as {DEFAULT_URL}')
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that shows a key: the given one, or that of the environment (OPENAI_API_KEY)."""
    key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
    return {"Authorization": f"Bearer {key}"} if key else {}


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def unreachable(url: str, error: BaseException) -> str:
    """One line for a server that cannot be reached."""
    return (
        f"no server answers at {url} ({reason(error)}); start one, as with kvant serve MODEL, or "
        "give another address"
    )


def error_text(status: int, body: bytes, retry_after: str | None = None) -> str:
    """One line for an answer that is an error."""
    text = f"HTTP {status}: {message_of(body)}"
    return text if retry_after is None else f"{text}; try again in {retry_after} s"


def message_of(body: bytes) -> str:
    """What an error says, in whichever of the usual shapes it comes."""
    text = body.decode(errors="replace")
    try:
        found: Any = json.loads(text)
    except ValueError:
        found = text
    for name in ("error", "detail", "message"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    words = " ".join((found if isinstance(found, str) else text).split())
    return words[:_MOST] or "no reason given"


class Events:
    """Cuts a stream of server-sent events, which comes in pieces of any length."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of all events that are complete now; each is one line, as these servers
        write them."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
