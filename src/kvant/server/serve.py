"""The process: a socket, uvicorn, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from contextvars import Context
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from kvant.errors import ConfigError
from kvant.server.app import create_app
from kvant.server.config import KEYS_VARIABLE, ServerConfig
from kvant.server.heap import settle_heap
from kvant.server.log import configure_log, log
from kvant.server.protocol import protocol_of
from kvant.server.service import Service

if TYPE_CHECKING:
    from kvant.api import Pipeline

__all__ = ["serve", "uvicorn_config"]

_BACKLOG = 2048
_CLOSING_SECONDS = 5  # for answers that are written when nothing runs any more
_SWITCH_SECONDS = 0.0005
"""How long the loop may keep the interpreter while the engine's thread waits for it. Python's own
5 ms are as long as a step of a small model."""


class _Server(uvicorn.Server):
    """uvicorn's server that drains first. A second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def stop(self) -> None:
        """End without draining: there is nothing to serve."""
        self.should_exit = True

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        if self._loop is None:
            self.should_exit = True
        elif self._draining is None:
            # In a context of its own: the signal came while some request was at work.
            self._loop.call_soon_threadsafe(self._drain, context=Context())
        else:
            os._exit(128 + signal.Signals(sig))

    def _drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._service.drain())
            self._draining.add_done_callback(lambda _: self.stop())


def serve(config: ServerConfig, load: Callable[[], Pipeline]) -> None:
    """Serve until SIGTERM or SIGINT; then finish what runs, up to ``drain_timeout``, and return.
    Listens while ``load`` makes the pipeline: /ready says when it is there.

    Args:
        config: resolved options.
        load: called on a thread of its own.

    Raises:
        ConfigError: the address cannot be listened on, or TLS files are no good.
        KvantError: what ``load`` raised.
    """

    def load_and_settle() -> Pipeline:
        pipe = load()
        gc.collect()
        gc.freeze()  # what lives as long as the process need not be looked at again and again
        return pipe

    configure_log(config.log_level, config.log_format)
    listener = _listen(config)
    service = Service(config, load_and_settle, lambda: server.stop())
    server = _Server(uvicorn_config(config, service), service)
    host, port = listener.getsockname()[:2]
    scheme = "https" if config.ssl_certfile else "http"
    address = f"[{host}]" if ":" in host else host
    log.info("listening on %s://%s:%d, loading %s", scheme, address, port, config.model_name)
    if config.is_public and not config.api_keys:
        log.warning(
            "%s is open to other machines and there is no API key: everybody who reaches it can "
            "use it; give --api-keys, --api-key-file or %s",
            config.server_name,
            KEYS_VARIABLE,
        )
    settle_heap()
    sys.setswitchinterval(_SWITCH_SECONDS)
    server.run(sockets=[listener])
    if service.load_error is not None:
        raise service.load_error
    log.info("bye")
    if any(thread.name == "kvant-load" for thread in threading.enumerate()):
        os._exit(0)  # stopped while loading, which cannot be interrupted


def _listen(config: ServerConfig) -> socket.socket:
    name, port = config.server_name, config.server_port
    try:
        family = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((name, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {name}:{port} ({error.strerror or error}); take another "
            "--server-name or --server-port"
        ) from None


def uvicorn_config(config: ServerConfig, service: Service) -> uvicorn.Config:
    """How uvicorn runs the application of a service.

    Raises:
        ConfigError: the TLS files are no good.
    """
    found = uvicorn.Config(
        create_app(service),
        http=protocol_of(config),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # anybody could claim an address
        backlog=_BACKLOG,
        timeout_keep_alive=config.keep_alive,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
    )
    try:
        found.load()
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"the TLS key or certificate cannot be used: {error}") from None
    return found
