"""What an operator may set: where the server listens, who may ask, and how much."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvant.config import option, parse_bytes
from kvant.errors import ConfigError, did_you_mean
from kvant.server.dialects import DIALECTS

__all__ = ["KEYS_VARIABLE", "ServerConfig"]

KEYS_VARIABLE = "KVANT_API_KEYS"
_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Options of ``kvant serve``; names are LMDeploy's where it has the option. Times are seconds.

    Raises:
        ConfigError: a value out of range, or a file that cannot be read.
    """

    server_name: str = option(
        "127.0.0.1", "address to listen on; 0.0.0.0 for all", aliases=("host",)
    )
    server_port: int = option(23333, "port to listen on; 0 takes a free one", aliases=("port",))
    model_name: str | None = option(
        None, "name of the model in requests (default: as given)", aliases=("served-model-name",)
    )
    api_keys: Sequence[str] | None = option(
        None, f"key that clients must send; repeat for several (or {KEYS_VARIABLE}, with commas)"
    )
    api_key_file: str | None = option(None, "file with a key in each line")
    allow_origins: Sequence[str] | None = option(
        None, "web origin whose pages may call the server (CORS); repeat for several, * for all"
    )
    ssl_keyfile: str | None = option(None, "private key for TLS")
    ssl_certfile: str | None = option(None, "certificate for TLS")
    tool_call_parser: str = option("auto", f"auto (by chat template), {', '.join(DIALECTS)}")
    reasoning: bool = option(True, "split reasoning from answers where the template has it")

    max_queue: int = option(1024, "sequences that may wait for a place; more get 429")
    max_body: int | str = option("4MiB", "longest request body")
    max_n: int = option(128, "most completions of a request (n, best_of) and prompts in it")
    max_stop: int = option(16, "most stop strings of a request")
    max_logit_bias: int = option(1024, "most entries of logit_bias")
    max_grammar: int | str = option(
        "64KiB", "longest JSON schema, regex, grammar or list of choices"
    )
    grammar_timeout: float = option(1.0, "seconds that compiling one of these may take")
    header_timeout: float = option(10.0, "seconds a client may take to send its headers")
    body_timeout: float = option(30.0, "seconds a client may take to send a body")
    write_timeout: float = option(60.0, "seconds a client may leave a piece of an answer unread")
    keep_alive: int = option(75, "seconds an idle connection stays open")
    stall_timeout: float = option(120.0, "seconds of one step after which /health says so")
    drain_timeout: float = option(30.0, "seconds that requests may go on after SIGTERM")

    log_level: str = option("info", "debug, info, warning or error")
    log_format: str = option("text", "text or json")
    access_log: bool = option(True, "a line for every request")
    max_log_len: int = option(0, "characters of prompts to log; 0 for none")

    def __post_init__(self) -> None:
        for name, low, high in (
            ("server_port", 0, 65535),
            ("max_queue", 0, 10**6),
            ("max_n", 1, 128),
            ("max_stop", 0, 1024),
            ("max_logit_bias", 0, 1024),
            ("max_log_len", 0, 10**9),
            ("grammar_timeout", 0.1, 60),
            ("header_timeout", 0.1, 3600),
            ("body_timeout", 0.1, 3600),
            ("write_timeout", 0.1, 3600),
            ("keep_alive", 1, 3600),
            ("stall_timeout", 1.0, 86400),
            ("drain_timeout", 0.0, 86400),
        ):
            value = getattr(self, name)
            kinds = float | int if isinstance(low, float) else int
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:
                whole = "a number" if isinstance(low, float) else "a whole number"
                raise ConfigError(f"{name}={value!r} must be {whole} from {low:g} to {high}")
        for name, known in (
            ("log_level", ("debug", "info", "warning", "error")),
            ("log_format", ("text", "json")),
            ("tool_call_parser", ("auto", *DIALECTS)),
        ):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(
                    f'{name} "{value}" is unknown{did_you_mean(value, known)} '
                    f"Use one of {', '.join(known)}"
                )
        parse_bytes(self.max_body)
        parse_bytes(self.max_grammar)
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("TLS needs both ssl_keyfile and ssl_certfile")
        for path in (self.ssl_keyfile, self.ssl_certfile):
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{path} is no file; TLS needs it")

    @property
    def is_public(self) -> bool:
        """Whether other machines can connect."""
        return self.server_name not in _LOCAL

    @property
    def body_limit(self) -> int:
        """``max_body`` in bytes."""
        return parse_bytes(self.max_body)

    @property
    def grammar_limit(self) -> int:
        """``max_grammar`` in bytes."""
        return parse_bytes(self.max_grammar)

    def resolved(self, model: str) -> ServerConfig:
        """With the model's name and the keys of all sources filled in.

        Raises:
            ConfigError: a key is empty or cannot be in a header, or the file of keys cannot
            be read or has none.
        """
        if not all(key.strip() for key in self.api_keys or ()):
            raise ConfigError("an API key is empty; give one, or leave the option out")
        keys = [*(self.api_keys or ()), *os.environ.get(KEYS_VARIABLE, "").split(",")]
        if self.api_key_file is not None:
            keys += _keys_of(Path(self.api_key_file))
        keys = [key.strip() for key in keys if key.strip()]
        if any(not key.isascii() or not key.isprintable() for key in keys):
            raise ConfigError("an API key has characters that no HTTP header can hold; use ASCII")
        name = self.model_name if self.model_name is not None else model
        return replace(self, api_keys=tuple(dict.fromkeys(keys)), model_name=name)


def _keys_of(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API keys in {path}: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path} has no API key; write one in each line")
    return keys
