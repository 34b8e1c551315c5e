"""What commands share: an open pipeline, progress bars, speed, tables of text."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvant.errors import RequestError

if TYPE_CHECKING:
    from kvant.api import Pipeline
    from kvant.config import EngineConfig

__all__ = [
    "INTERRUPTED",
    "Speed",
    "add_template_option",
    "import_engine",
    "kv_text",
    "open_pipeline",
    "progress",
    "read_template",
    "table",
]

INTERRUPTED = 130  # the exit code that a shell reports for SIGINT


def add_template_option(parser: ArgumentParser) -> None:
    """Add ``--chat-template``, for :func:`open_pipeline`."""
    parser.add_argument(
        "--chat-template", metavar="FILE", help="a Jinja template to use instead of the model's"
    )


@contextmanager
def open_pipeline(
    model: str, config: EngineConfig, chat_template: str | None = None
) -> Iterator[Pipeline]:
    """Load a model, with a progress bar; ``chat_template`` is a file."""
    from kvant.loading.resolve import resolve_model

    template = None if chat_template is None else read_template(Path(chat_template))
    # A wrong name is answered before torch is imported.
    path = resolve_model(model, revision=config.revision, download_dir=config.download_dir)
    import_engine()
    from kvant.api import pipeline

    with progress(f"loading {model}") as on_load:
        pipe = pipeline(str(path), config, chat_template=template, on_load=on_load)
    with pipe:
        yield pipe


def import_engine() -> None:
    """Import what takes seconds. A KeyboardInterrupt raised while torch initializes itself can
    abort the process with a message from C++; there is nothing to save yet, so leave at once."""

    def leave(*_: object) -> None:
        os._exit(INTERRUPTED)

    in_charge = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if in_charge:
        signal.signal(signal.SIGINT, leave)
    try:
        import kvant.engine.load  # noqa: F401
    finally:
        if in_charge:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def read_template(path: Path) -> str:
    """The text of a chat template.

    Raises:
        RequestError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the chat template {path}: {error}") from None


@contextmanager
def progress(title: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that is told (done, all); nothing where stderr is no terminal."""
    if not shown or not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(
        console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@dataclass(slots=True)
class Speed:
    """Counts tokens as they come."""

    start: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    tokens: int = 0

    def add(self, tokens: int) -> None:
        """Count a piece of an answer."""
        self.last = time.perf_counter()
        self.tokens += tokens
        if self.first is None:
            self.first = self.last

    def __str__(self) -> str:
        if self.first is None:
            return "0 tokens"
        seconds = max(self.last - self.start, 1e-9)
        return (
            f"{self.tokens} tokens in {seconds:.2f} s ({self.tokens / seconds:.1f} tokens/s, "
            f"first after {self.first - self.start:.2f} s)"
        )


def kv_text(pipe: Pipeline) -> str:
    """The format of the KV cache and what a token takes in it."""
    spec = pipe.model.kv_spec
    return f"KV {spec.label}, {spec.bytes_per_token(pipe.model.config.kv_shape):g} bytes/token"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Lines of text in columns, numbers to the right, the columns ``left`` to the left."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
