"""Tokens become text as they are generated: no half characters, and stop strings end it.

A token is not a piece of text: it may hold part of a UTF-8 character, and a SentencePiece
tokenizer drops the space of the first token it decodes. So a *window* is decoded instead, and
what it adds to the text already passed on is new:

    [0, clean)            context: tokens whose text was passed on, decoded again as neighbours
    [clean, len(window))  tokens since the text last ended in a complete character

The window restarts whenever the text ends in a complete character, so a token costs two decodes
of a few tokens, however long the output is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kvant.errors import RequestError

__all__ = ["CONTEXT_TOKENS", "Decoder", "TextStream"]

CONTEXT_TOKENS = 6
"""How many tokens of the prompt are worth giving as ``prompt_tail``."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has at most 4 bytes


class Decoder(Protocol):
    """The part of a tokenizer that a stream needs."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...


class _Match(NamedTuple):
    start: int
    end: int


class TextStream:
    """The visible text of one output, token by token.

    What :meth:`push` returned is never taken back: a trailing U+FFFD, which may be half a
    character, and a trailing part of a stop string are held until more is known. A stop string
    matches across token borders; of several, the one that is complete first wins, and of those
    that are complete at the same character the one that starts earliest. The result therefore
    does not depend on how the text was cut into tokens.

    Raises:
        RequestError: a stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        prompt_tail: Sequence[int] = (),
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
    ) -> None:
        if not all(stops):
            raise RequestError("a stop string is empty; leave it out")
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._skip_special = skip_special
        self._held = ""
        self._visible: list[str] = []
        self._decoded, self._passed = "", 0
        self._restart(list(prompt_tail[-CONTEXT_TOKENS:]))
        self._clean = len(self._window)

    @property
    def text(self) -> str:
        """All visible text so far."""
        return "".join(self._visible)

    def push(self, token_id: int) -> str:
        """Append a token; the text that this makes visible. After a stop it is always empty."""
        if self.stopped is not None:
            return ""
        text = self._decode([*self._window, token_id])
        if text == self._decoded and not self._decode([token_id, token_id]):
            return ""  # it stands for nothing, such as a special token that is skipped
        self._window.append(token_id)
        self._decoded = text
        return self._show(self._held + self._fresh(), final=False)

    def finish(self) -> str:
        """The output is complete: what was held, unless a stop string is found in it."""
        if self.stopped is not None:
            return ""
        rest = self._decoded[self._passed :]
        self._passed += len(rest)
        return self._show(self._held + rest, final=True)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)

    def _fresh(self) -> str:
        """New text of the window that no later token can change, counted as passed on."""
        text, waiting = self._decoded, len(self._window) - self._clean
        stuck = waiting >= _MAX_CHARACTER_TOKENS  # then only the last U+FFFD can be unfinished
        pending = len(text) - len(text.rstrip(_REPLACEMENT))
        pending = min(pending, 1) if stuck else pending
        fresh = text[self._passed : len(text) - pending]
        self._passed += len(fresh)
        if not pending:
            if fresh:
                self._restart(self._window[self._clean :])
            self._clean = len(self._window)
        elif stuck:
            self._restart(self._window[-_MAX_CHARACTER_TOKENS:])
            self._clean, self._passed = 0, len(self._decoded.removesuffix(_REPLACEMENT))
        return fresh

    def _restart(self, window: list[int]) -> None:
        self._window = window
        self._decoded = self._decode(window)
        self._passed = len(self._decoded)

    def _show(self, text: str, *, final: bool) -> str:
        """Pass on ``text``, all that is not visible yet, as far as stop strings allow."""
        match = self._first_match(text)
        if match is not None:
            self.stopped = text[match.start : match.end]
            shown, self._held = text[: match.end if self._include_stop else match.start], ""
        else:
            cut = len(text) if final else len(text) - self._overlap(text)
            shown, self._held = text[:cut], text[cut:]
        if shown:
            self._visible.append(shown)
        return shown

    def _first_match(self, text: str) -> _Match | None:
        found = [
            _Match(start, start + len(stop))
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        return min(found, key=lambda match: (match.end, match.start), default=None)

    def _overlap(self, text: str) -> int:
        """Length of the longest end of ``text`` that is the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if text.endswith(tuple(stop[:length] for stop in self._stops if len(stop) > length)):
                return length
        return 0
