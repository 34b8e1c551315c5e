"""What the tasks of ``kvant eval`` share: the text, the model, progress and the stored JSON."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvant.cli.options import add_options, read_options, split_specs
from kvant.cli.terminal import import_engine, progress
from kvant.config import EngineConfig
from kvant.errors import ConfigError, RequestError
from kvant.machine import machine

if TYPE_CHECKING:
    from kvant.engine.load import OpenModel
    from kvant.eval.runner import Tick
    from kvant.eval.text import Text
    from kvant.models.decoder import DecoderWeights

__all__ = [
    "add_measuring",
    "check_target",
    "contexts",
    "find_model",
    "load_weights",
    "note_text",
    "open_text",
    "read_config",
    "store",
    "ticking",
]

# The formats, the dtype and all sizes are the tasks' own.
_OWN = (
    "kv", "quant_policy", "dtype", "session_len", "max_batch_size", "cache_max_entry_count",
    "kv_memory", "kv_tokens", "enable_prefix_caching", "check",
)  # fmt: skip


def add_measuring(parser: ArgumentParser, *, ctx: str, windows: int) -> None:
    """Add the options that all tasks have, with these defaults."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file or a hub name")
    parser.add_argument(
        "--baseline", metavar="KV", default="f32", help="format to compare with (default: f32)"
    )
    parser.add_argument(
        "--dtype",
        metavar="X",
        default="float32",
        help="weights and activations: float32, bfloat16, float16 or auto (default: float32, so "
        "that the cache is all that differs)",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8, may be .gz (default: Python's own documentation)"
    )
    parser.add_argument(
        "--ctx", metavar="N,...", default=ctx, help=f"context lengths (default: {ctx})"
    )
    parser.add_argument(
        "--windows",
        metavar="N",
        type=int,
        default=windows,
        help=f"pieces of text for each context length (default: {windows})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", metavar="FILE", help="store the JSON there too")
    add_options(parser, EngineConfig, "engine", without=_OWN)


def read_config(options: Namespace) -> EngineConfig:
    """The engine's options; its KV format is the baseline."""
    (options.kv,) = split_specs(options.baseline)
    return read_options(options, EngineConfig)


def contexts(text: str) -> list[int]:
    """The numbers of ``--ctx``."""
    try:
        return [int(piece) for piece in text.split(",")]
    except ValueError:
        raise ConfigError(
            f'--ctx "{text}" must be whole numbers with commas between, as 2048,8192'
        ) from None


def check_target(name: str, path: str | None) -> None:
    """Raise RequestError if a file cannot be written there: better now than in an hour."""
    if path is None:
        return
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise RequestError(f"--{name} {path} is a folder or in a folder that is not there")


def open_text(options: Namespace) -> Text:
    """The text to measure on."""
    from kvant.eval.text import default_text, read_text

    return default_text() if options.text is None else read_text(Path(options.text))


def note_text(options: Namespace, windows: Mapping[int, Sequence[object]]) -> None:
    """Say what the user did not ask for but gets; ``windows`` by context length."""
    if options.text is None:
        text = "text: Python's own documentation (pydoc_data.topics); choose another with --text"
        print(text, file=sys.stderr)
    for ctx, cut in windows.items():
        if len(cut) < options.windows:
            print(
                f"text: it is long enough for {len(cut)} of {options.windows} windows of {ctx} "
                "tokens",
                file=sys.stderr,
            )


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
        return opened.weights(config.dtype, on_load)


@contextmanager
def ticking(title: str, total: int, *, shown: bool) -> Iterator[Tick]:
    """A progress bar that is told how much more is done."""
    done = 0
    with progress(title, shown=shown) as bar:

        def tick(count: int) -> None:
            nonlocal done
            done += count
            bar(done, total)

        yield tick


def store(options: Namespace, config: EngineConfig, text: Text, found: dict[str, Any]) -> str:
    """The JSON of a measurement, stored where the user wants it."""
    document = {
        "machine": machine(),
        "command": shlex.join(["kvant", *sys.argv[1:]]),
        "model": options.model,
        "text": text.describe(),
        "dtype": config.dtype,
        **found,
    }
    stored = json.dumps(document, indent=2, allow_nan=False)
    if options.output is not None:
        Path(options.output).write_text(stored + "\n", encoding="utf-8")
    return stored
