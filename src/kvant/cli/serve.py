"""Serve a model to clients of OpenAI's API.

The server listens at once and answers 503 until the model is loaded (/ready says when). There is a
page at /, documentation of the API at /docs, metrics for Prometheus at /metrics. SIGTERM or Ctrl-C
lets what runs finish, for --drain-timeout seconds at most; a second one ends it at once.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from kvant.cli.options import add_options, read_options
from kvant.cli.terminal import add_template_option, read_template
from kvant.config import EngineConfig
from kvant.errors import ConfigError
from kvant.server.config import ServerConfig

if TYPE_CHECKING:
    from kvant.api import Pipeline

__all__ = ["configure", "run"]

_LMDEPLOYS_WORD = "api_server"


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant serve``."""
    parser.usage = f"kvant serve [{_LMDEPLOYS_WORD}] MODEL [options]"
    parser.add_argument(
        "words", nargs="+", metavar="MODEL", help="a folder, a .gguf file or a hub name"
    )
    add_template_option(parser)
    add_options(parser, ServerConfig, "server")
    add_options(parser, EngineConfig, "engine")


def run(options: Namespace) -> int:
    """Serve until a signal ends it."""
    model = _model_of(options.words)
    config, engine = read_options(options, ServerConfig), read_options(options, EngineConfig)
    config = config.resolved(model)
    template = None if options.chat_template is None else read_template(Path(options.chat_template))
    from kvant.loading.resolve import resolve_model
    from kvant.server.serve import serve

    # A wrong name is answered before anything listens.
    path = resolve_model(model, revision=engine.revision, download_dir=engine.download_dir)

    def load() -> Pipeline:
        from kvant.api import pipeline
        from kvant.engine.guide import GuideLimits

        limits = GuideLimits(max_bytes=config.grammar_limit, max_seconds=config.grammar_timeout)
        return pipeline(str(path), engine, chat_template=template, guide_limits=limits)

    serve(config, load)
    return 0


def _model_of(words: list[str]) -> str:
    rest = words[1:] if words[0] == _LMDEPLOYS_WORD else words
    if len(rest) != 1:
        raise ConfigError(f"{len(rest)} models are given ({' '.join(rest)}); a server has one")
    return rest[0]
