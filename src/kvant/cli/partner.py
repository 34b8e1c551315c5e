"""Who answers in ``kvant chat``: a model in this process, or one behind a server."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kvant.cli.terminal import kv_text
from kvant.client import Events, authorization, base_url, error_text, message_of, unreachable
from kvant.client import reason as reason_of
from kvant.config import EngineConfig, GenerationConfig
from kvant.errors import ConfigError, KvantError, RequestError

if TYPE_CHECKING:
    import httpx

    from kvant.api import Pipeline, Response

__all__ = ["LocalModel", "Message", "Partner", "Piece", "RemoteModel", "ServerError", "open_server"]

Message = Mapping[str, Any]

_PATIENCE = 10.0  # seconds to connect, and for the list of models; an answer may take any time

# How the server calls what GenerationConfig calls otherwise; do_sample is a temperature, and
# bad_token_ids it has not.
_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "random_seed": "seed",
    "stop_words": "stop",
}
_SAME = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "ignore_eos", "stop_token_ids", "skip_special_tokens",
    "include_stop_str_in_output", "bad_words", "logit_bias", "response_format",
)  # fmt: skip


class ServerError(KvantError):
    """A server did not answer a turn, for reasons that are not the turn's."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer and how many tokens it is. ``thought`` is shown but not remembered."""

    text: str
    tokens: int = 1
    thought: bool = False


class Partner(Protocol):
    """A model to talk to."""

    @property
    def about(self) -> str:
        """One line: who this is."""
        ...

    def answer(self, messages: Sequence[Message]) -> Generator[Piece]:
        """The answer to a conversation, as it comes; leaving it early stops it.

        Raises:
            RequestError: the conversation cannot be answered.
            ServerError: whoever should answer does not.
        """
        ...

    def remark(self) -> str | None:
        """Why the last answer ended, unless the model ended it."""
        ...

    def stats(self) -> str:
        """One line about the cache, or what else is known after an answer."""
        ...


class LocalModel:
    """A model in this process."""

    def __init__(self, pipe: Pipeline, gen: GenerationConfig) -> None:
        self._pipe, self._gen = pipe, gen
        self._last: Response | None = None

    @property
    def about(self) -> str:
        return kv_text(self._pipe)

    def answer(self, messages: Sequence[Message]) -> Generator[Piece, None, None]:
        self._last = None
        pieces = self._pipe.stream_infer(list(messages), self._gen)
        with closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                self._last = piece
                yield Piece(piece.text, len(piece.token_ids))
                if piece.finish_reason == "error":
                    raise RequestError(str(piece.error_message))

    def remark(self) -> str | None:
        last, limit = self._last, self._pipe.model.engine.session_len
        if last is None or last.finish_reason != "length":
            return None
        if last.input_token_len + last.generate_token_len >= limit:
            return f"the context of {limit} tokens is full; /clear starts a new conversation"
        return f"the answer was cut at max_new_tokens={self._gen.max_new_tokens}"

    def stats(self) -> str:
        # Nothing runs between turns, so the engine's thread leaves these numbers alone.
        stats = self._pipe.model.engine.stats()
        return (
            f"pages: {stats.pages_held} held and {stats.pages_cached} cached of "
            f"{stats.pages_total}; {kv_text(self._pipe)}"
        )


class RemoteModel:
    """A model behind an OpenAI-compatible server; made by :func:`open_server`. ``fields`` are
    those of requests that the user gave."""

    def __init__(
        self, client: httpx.Client, url: str, model: str, fields: Mapping[str, Any]
    ) -> None:
        self._client, self._url, self._model, self._fields = client, url, model, fields
        self._usage: dict[str, Any] | None = None
        self._finish: str | None = None
        self._tokens = 0

    @property
    def about(self) -> str:
        return f"{self._model} at {self._url}"

    def answer(self, messages: Sequence[Message]) -> Generator[Piece, None, None]:
        import httpx

        self._usage, self._finish, self._tokens = None, None, 0
        body = {
            "model": self._model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._fields,
        }
        try:
            with self._client.stream(
                "POST", f"{self._url}/v1/chat/completions", json=body
            ) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                yield from self._pieces(response)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ServerError(unreachable(self._url, error)) from None
        except httpx.HTTPError as error:
            raise ServerError(f"the answer broke off: {reason_of(error)}") from None

    def _pieces(self, response: httpx.Response) -> Iterator[Piece]:
        events, done = Events(), False
        for data in response.iter_bytes():
            for event in events.feed(data):
                if event == b"[DONE]":
                    done = True
                else:
                    yield from self._read(event)
        if not done:
            raise ServerError("the answer broke off: the stream ended without [DONE]")
        if self._usage is not None:  # what was counted so far are chunks
            yield Piece("", int(self._usage.get("completion_tokens", self._tokens)) - self._tokens)

    def _read(self, event: bytes) -> Iterator[Piece]:
        """An event of the stream."""
        try:
            chunk = json.loads(event)
            if chunk.get("error"):
                raise ServerError(f"the answer broke off: {message_of(event)}")
            self._usage = chunk.get("usage") or self._usage
            for choice in chunk.get("choices") or ():
                self._finish = choice.get("finish_reason") or self._finish
                yield from self._texts(choice.get("delta") or {})
        except (ValueError, TypeError, AttributeError):
            raise ServerError(f"the server sent {event[:80]!r}, which is no chunk") from None

    def _texts(self, delta: Mapping[str, Any]) -> Iterator[Piece]:
        for name in ("reasoning_content", "reasoning", "content"):
            if text := delta.get(name):
                self._tokens += 1
                yield Piece(str(text), thought=name != "content")

    def remark(self) -> str | None:
        if self._finish != "length":
            return None
        limit = self._fields.get("max_tokens")
        return "the answer was cut at " + (
            "the server's limit; /clear starts a new conversation"
            if limit is None
            else f"max_new_tokens={limit}"
        )

    def stats(self) -> str:
        usage = self._usage or {}
        details = usage.get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens")
        prompt = usage.get("prompt_tokens", "unknown")
        found = "" if cached is None else f", {cached} found cached"
        return f"context: {prompt} tokens{found}; {self.about}"


@contextmanager
def open_server(options: Namespace) -> Iterator[RemoteModel]:
    """The model that ``--server`` and perhaps MODEL name.

    Raises:
        ConfigError: an option that is not for a server, or a wrong address.
        KvantError: the server does not answer or has no model.
    """
    import httpx

    fields, url = _fields(options), base_url(options.server)
    with httpx.Client(
        headers=authorization(options.api_key),
        timeout=httpx.Timeout(None, connect=_PATIENCE),
        # A proxy that the environment names is not for this machine's own servers.
        mounts={f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")},
    ) as client:
        yield RemoteModel(client, url, options.model or _first_model(client, url), fields)


def _first_model(client: httpx.Client, url: str) -> str:
    import httpx

    try:
        answer = client.get(f"{url}/v1/models", timeout=_PATIENCE)
    except httpx.HTTPError as error:
        raise KvantError(unreachable(url, error)) from None
    if answer.status_code != 200:
        raise _refusal(answer)
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise KvantError(
            f"{url}/v1/models lists no model; name one: kvant chat MODEL --server URL"
        ) from None


def _refusal(response: httpx.Response) -> KvantError:
    """What an answer that is an error means for the turn."""
    status, wait = response.status_code, response.headers.get("Retry-After")
    text = error_text(status, response.content, wait)
    if status in (400, 413, 422):
        return RequestError(text)
    if status in (401, 403):
        text += "; give the server's key with --api-key or OPENAI_API_KEY"
    return ServerError(text)


def _fields(options: Namespace) -> dict[str, Any]:
    """The fields of requests: what the user gave and nothing else, so that the server's defaults
    hold.

    Raises:
        ConfigError: what only a model in this process can do.
        RequestError: a value out of range.
    """
    given = vars(options)
    engine = [field.name for field in dataclasses.fields(EngineConfig)]
    for name in (*engine, "bad_token_ids", "chat_template"):
        if given.get(name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} does not go with --server: it is the server's "
                "business, or it has no such option"
            )
    names = [field.name for field in dataclasses.fields(GenerationConfig) if field.name in given]
    GenerationConfig(**{name: given[name] for name in names})
    known = {name: name for name in _SAME} | _NAMES
    fields = {known[name]: given[name] for name in names if name in known}
    return fields | ({"temperature": 0} if given.get("do_sample") is False else {})
