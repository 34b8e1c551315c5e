"""The text that a model is measured on, and its windows."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

from kvant.errors import RequestError
from kvant.loading.tokenizer import Tokenizer

__all__ = ["Text", "cut_windows", "default_text", "read_text"]

_CHARACTERS = 8  # of a token, at the most that is usual in prose
_MARGIN = 16  # tokens before a cut that could have become others without it


@dataclass(frozen=True, slots=True)
class Text:
    """A text and where it comes from."""

    source: str
    content: str

    def describe(self) -> dict[str, str | int]:
        """Source, length and digest, for JSON."""
        digest = hashlib.sha256(self.content.encode("utf-8", "surrogatepass")).hexdigest()
        return {"source": self.source, "characters": len(self.content), "sha256": digest}


def default_text() -> Text:
    """English prose that is everywhere: what Python's ``help()`` says about the language. It
    differs a little between Python versions."""
    from pydoc_data.topics import topics

    return Text("pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics)))


def read_text(path: Path) -> Text:
    """A UTF-8 file, decompressed if its name ends in ``.gz``.

    Raises:
        RequestError: it cannot be read or is no text.
    """
    try:
        data = path.read_bytes()
        content = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the text {path}: {error}") from None
    if "\0" in content:
        raise RequestError(f"cannot read the text {path}: it is a binary file; give UTF-8 text")
    return Text(str(path), content)


def cut_windows(text: Text, tokenizer: Tokenizer, ctx: int, count: int) -> list[list[int]]:
    """At most ``count`` windows of ``ctx`` token ids: consecutive slices of the text, each after
    the tokens that the model wants before a text (BOS). No more is tokenized than needed.

    Raises:
        RequestError: the text is shorter than one window.
    """
    step = ctx - len(tokenizer.lead)
    ids = _beginning(text.content, tokenizer, step * count)
    if len(ids) < step:
        raise RequestError(
            f"the text {text.source} has {len(ids)} tokens, and a window of ctx={ctx} takes "
            f"{step}; give a longer text or lower ctx"
        )
    starts = range(0, min(step * count, len(ids) - step + 1), step)
    return [[*tokenizer.lead, *ids[start : start + step]] for start in starts]


def _beginning(content: str, tokenizer: Tokenizer, needed: int) -> list[int]:
    """The first ``needed`` ids of a text, or all if there are fewer."""
    size = _CHARACTERS * needed
    while True:
        ids = tokenizer.encode(content[:size], add_special=False)
        if len(ids) >= needed + _MARGIN or size >= len(content):
            return ids[:needed]
        size *= 2
