"""What a model wrote, told apart: content, reasoning and tool calls, piece by piece."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

__all__ = ["Answer", "Delta", "Gathering", "NewId", "OutputParser", "ToolDelta", "call_id"]

NewId = Callable[[], str]
"""Where the ids of tool calls come from."""


def call_id() -> str:
    """A new id of a tool call, such as no other call has."""
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """A piece of the call ``index``. ``id`` and ``name`` are in its first piece; ``arguments`` of
    all pieces together are JSON text, as the model wrote it."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new. False if nothing is."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)


class OutputParser(Protocol):
    """Reads one output as it is generated. All deltas together are the same however the text was
    cut, and no text makes it raise."""

    def push(self, text: str) -> Delta:
        """What is known for certain with ``text``, the next piece."""

    def finish(self) -> Delta:
        """The output has ended: what was held back. Call it once, last."""


@dataclass(slots=True)
class Answer:
    """All deltas of one output, put together. ``calls`` are whole, so each has an id and a name."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolDelta] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """Append the next delta."""
        self.content += delta.content
        self.reasoning += delta.reasoning
        for piece in delta.tool_calls:
            if piece.index == len(self.calls):
                self.calls.append(piece)
            else:
                self.calls[piece.index] = _joined(self.calls[piece.index], piece)


class Gathering:
    """The delta that a step of a parser is making."""

    def __init__(self) -> None:
        self.content = ""
        self.reasoning = ""
        self._calls: dict[int, ToolDelta] = {}

    def call(self, piece: ToolDelta) -> None:
        """Add a piece of a call."""
        known = self._calls.get(piece.index)
        self._calls[piece.index] = piece if known is None else _joined(known, piece)

    def take(self) -> Delta:
        """All that was gathered since the last time."""
        delta = Delta(self.content, self.reasoning, tuple(self._calls.values()))
        self.content, self.reasoning, self._calls = "", "", {}
        return delta


def _joined(first: ToolDelta, second: ToolDelta) -> ToolDelta:
    return replace(first, arguments=first.arguments + second.arguments)
