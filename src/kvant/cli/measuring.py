"""What ``kvant eval`` and ``kvant bench`` share: the model, progress and the stored JSON."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvant.cli.terminal import import_engine, progress
from kvant.config import EngineConfig
from kvant.errors import ConfigError, RequestError
from kvant.figure import check_plot
from kvant.machine import machine, package_version

if TYPE_CHECKING:
    from kvant.engine.load import OpenModel
    from kvant.models.decoder import DecoderWeights

__all__ = [
    "MODEL",
    "add_results",
    "check_targets",
    "find_model",
    "load_weights",
    "need_harness",
    "numbers",
    "store",
    "ticking",
]

MODEL = "a folder, a .gguf file or a hub name"
"""The help text of the word that names a model."""


def add_results(parser: ArgumentParser) -> None:
    """Add ``--json`` and ``--output``."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", metavar="FILE", help="store the JSON there too")


def numbers(name: str, text: str, example: str) -> list[int]:
    """The whole numbers of a comma list, which the option ``name`` got.

    Raises:
        ConfigError: it is none.
    """
    try:
        return [int(piece) for piece in text.split(",")]
    except ValueError:
        raise ConfigError(
            f'--{name.replace("_", "-")} "{text}" must be whole numbers with commas between, '
            f"as {example}"
        ) from None


def check_targets(options: Namespace) -> None:
    """Raise an error if a file that the user wants cannot be written: better now than in an
    hour."""
    for name in ("output", "csv", "markdown", "plot"):
        path = getattr(options, name, None)
        if path is None:
            continue
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise RequestError(f"--{name} {path} is a folder or in a folder that is not there")
        if name == "plot":
            check_plot(Path(path))


def need_harness(command: str) -> None:
    """Raise ConfigError if lm-eval is not installed."""
    if package_version("lm_eval") is None:
        raise ConfigError(f'{command} needs lm-eval; run: pip install "kvant[eval]"')


def find_model(options: Namespace, config: EngineConfig) -> OpenModel:
    """Open the model without reading its weights."""
    from kvant.loading.resolve import resolve_model

    path = resolve_model(options.model, revision=config.revision, download_dir=config.download_dir)
    import_engine()
    from kvant.engine.load import open_model

    return open_model(str(path), config)


def load_weights(options: Namespace, config: EngineConfig, opened: OpenModel) -> DecoderWeights:
    """Read the weights, with a progress bar."""
    with progress(f"loading {options.model}", shown=not options.json) as on_load:
        return opened.weights(config, on_load)


@contextmanager
def ticking(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar that is told how much more is done."""
    done = 0
    with progress(title, shown=shown) as bar:

        def tick(count: int) -> None:
            nonlocal done
            done += count
            bar(done, total)

        yield tick


def store(options: Namespace, **found: Any) -> str:
    """The JSON of a measurement, stored where the user wants it."""
    document = {
        "machine": machine(),
        "command": shlex.join(["kvant", *_without_keys(sys.argv[1:])]),
        **found,
    }
    stored = json.dumps(document, indent=2, allow_nan=False)
    if options.output is not None:
        _write(Path(options.output), stored + "\n")
    return stored


def _write(path: Path, text: str) -> None:
    """Beside it first: whatever happens now, the results of an earlier run are not half gone."""
    if path.exists() and not path.is_file():  # as /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    beside = Path(f"{path}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _without_keys(words: Sequence[str]) -> Iterator[str]:
    """Words of a command line; keys of servers, which are secrets, as stars."""
    hidden = False
    for word in words:
        name, equals, _ = word.partition("=")
        key = name.replace("_", "-") == "--api-key"
        yield "***" if hidden else f"{name}=***" if key and equals else word
        hidden = key and not equals
