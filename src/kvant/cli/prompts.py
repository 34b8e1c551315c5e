"""Where prompts come from: the command line, a file, or what is piped in."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvant.errors import RequestError

if TYPE_CHECKING:
    from kvant.api import Prompt

__all__ = ["read_prompts", "title_of"]


def read_prompts(words: Sequence[str], file: str | None) -> list[Prompt]:
    """The prompts to complete.

    Args:
        words: prompts given as arguments.
        file: ``.jsonl``: one prompt a line, as a JSON string, {"prompt": ...} or {"messages":
            [...]}; any other: one text a line. Blank lines are skipped. ``-`` is stdin.

    Without either, all of stdin is one prompt.

    Raises:
        RequestError: there is none, both are given, or a line cannot be read.
    """
    if words and file is not None:
        raise RequestError("both prompts and --file are given; use one of them")
    if words:
        return list(words)
    if file is None:
        if not (text := _piped().removesuffix("\n").removesuffix("\r")):
            raise RequestError("no prompt: what is piped in is empty")
        return [text]
    text = _piped() if file == "-" else _read(Path(file))
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise RequestError(f"{file} holds no prompt; write one a line")
    if file.endswith(".jsonl"):
        return [_from_json(line, f"{file}, line {number}") for number, line in lines]
    return [line for _, line in lines]


def title_of(prompt: Prompt) -> str:
    """A prompt for the eye: its text, or that of its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content")) if prompt else ""


def _piped() -> str:
    if sys.stdin.isatty():
        raise RequestError("no prompt; give it as an argument, with --file, or through a pipe")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"what is piped in is no UTF-8 text ({error})") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read prompts from {path}: {error}") from None


def _from_json(line: str, where: str) -> Prompt:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where} is no JSON: {error}") from None
    if isinstance(value, Mapping):
        messages = value.get("messages")
        value = messages if _is_messages(messages) else value.get("prompt")
    if isinstance(value, str) or _is_messages(value):
        prompt: Prompt = value
        return prompt
    raise RequestError(
        f'{where} is no prompt; write a string, {{"prompt": "..."}} or {{"messages": [...]}}'
    )


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, Mapping) for part in value)
