"""What the tasks of ``kvant eval`` share: their options and the text."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvant.cli import measuring
from kvant.cli.options import add_options, read_options, split_specs
from kvant.config import EngineConfig

if TYPE_CHECKING:
    from kvant.eval.text import Text

__all__ = ["add_measuring", "contexts", "note_text", "open_text", "read_config", "store"]

# The formats, the dtype and all sizes are the tasks' own.
_OWN = (
    "kv", "quant_policy", "dtype", "session_len", "max_batch_size", "cache_max_entry_count",
    "kv_memory", "kv_tokens", "enable_prefix_caching", "check",
)  # fmt: skip


def add_measuring(parser: ArgumentParser, *, ctx: str, windows: int) -> None:
    """Add the options that all tasks have, with these defaults."""
    parser.add_argument("model", metavar="MODEL", help=measuring.MODEL)
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
    measuring.add_results(parser)
    add_options(parser, EngineConfig, "engine", without=_OWN)


def read_config(options: Namespace) -> EngineConfig:
    """The engine's options; its KV format is the baseline."""
    (options.kv,) = split_specs(options.baseline)
    return read_options(options, EngineConfig)


def contexts(text: str) -> list[int]:
    """The numbers of ``--ctx``."""
    return measuring.numbers("ctx", text, "2048,8192")


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


def store(options: Namespace, config: EngineConfig, text: Text, found: dict[str, Any]) -> str:
    """The JSON of a measurement, stored where the user wants it."""
    about = {
        "model": options.model,
        "text": text.describe(),
        "dtype": config.dtype,
        "weight_dtype": config.weight_dtype,
    }
    return measuring.store(options, **about, **found)
