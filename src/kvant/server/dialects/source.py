"""Text that is read while it arrives.

Readers are coroutines: written as if all text were there, they yield where it runs out and go on
when there is more. They see characters only, so what they find cannot depend on how the text was
cut.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeAlias, TypeVar

__all__ = ["SPACE", "Ended", "Mismatch", "Source", "Steps"]

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]

SPACE = " \t\r\n"
_CLOSING = {"{": "}", "[": "]"}
_BETWEEN = SPACE + ",:"  # inside of brackets
_SCALAR = frozenset("+-.0123456789eEtrufalsn")  # numbers, true, false, null


class Mismatch(Exception):  # noqa: N818
    """The text is not what the reader expects."""


class Ended(Exception):  # noqa: N818
    """There is no more text."""


class Source:
    """Text and two positions in it: ``pos``, where reading goes on, and ``mark``, up to where the
    text is accounted for; what is before the mark is forgotten."""

    def __init__(self) -> None:
        self._text = ""
        self._ended = False
        self.pos = 0
        self.mark = 0

    def push(self, text: str) -> None:
        """Append text. Positions move with the text that is forgotten, their distance stays."""
        self._text = self._text[self.mark :] + text
        self.pos -= self.mark
        self.mark = 0

    def end(self) -> None:
        """There will be no more text."""
        self._ended = True

    @property
    def held(self) -> str:
        """All text that is not accounted for."""
        return self._text[self.mark :]

    @property
    def read(self) -> str:
        """The part of ``held`` before ``pos``."""
        return self._text[self.mark : self.pos]

    def account(self, length: int) -> str:
        """Read ``length`` characters from the mark, and account for them."""
        text = self._text[self.mark : self.mark + length]
        self.mark += length
        self.pos = self.mark
        return text

    def account_read(self) -> str:
        """Account for what was read."""
        return self.account(self.pos - self.mark)

    def account_all(self) -> str:
        """Account for all text there is."""
        return self.account(len(self._text) - self.mark)

    def account_through(self, marker: str) -> str:
        """Account for everything up to the end of ``marker``, which is in it."""
        return self.account(self._text.index(marker, self.mark) + len(marker) - self.mark)

    def rewind(self) -> None:
        """Read again what is not accounted for."""
        self.pos = self.mark

    def more(self) -> Steps[None]:
        """Wait for text. Raises Ended if there will be none."""
        if self._ended:
            raise Ended
        yield

    def peek(self) -> Steps[str]:
        """The next character, which stays unread."""
        while self.pos == len(self._text):
            yield from self.more()
        return self._text[self.pos]

    def skip(self, characters: str) -> Steps[str]:
        """Read as long as there are any of ``characters``; the first other one, unread."""
        while (character := (yield from self.peek())) in characters:
            self.pos += 1
        return character

    def take(self, text: str) -> Steps[None]:
        """Read exactly ``text``."""
        yield from self.take_one_of([text])

    def take_one_of(self, texts: Sequence[str]) -> Steps[str]:
        """Read one of ``texts``, none of which begins another. Raises Mismatch at the first
        character that fits none."""
        length = 0
        while True:
            character = yield from self.peek()
            texts = [text for text in texts if text[length] == character]
            if not texts:
                raise Mismatch
            self.pos += 1
            length += 1
            if len(texts[0]) == length:
                return texts[0]

    def value(self) -> Steps[None]:
        """Read one JSON value. Only strings, brackets and the characters outside of strings are
        checked: that is enough to find its end, and to notice when it is no JSON."""
        open_brackets: list[str] = []
        while True:
            character = yield from self.peek()
            if character == '"':
                yield from self._string()
            elif character in _CLOSING:
                open_brackets.append(_CLOSING[character])
                self.pos += 1
            elif open_brackets and character == open_brackets[-1]:
                open_brackets.pop()
                self.pos += 1
            else:
                yield from self._outside(nested=bool(open_brackets))
            if not open_brackets:
                return

    def _string(self) -> Steps[None]:
        self.pos += 1
        while (character := (yield from self.peek())) != '"':
            self.pos += 1
            if character == "\\":
                yield from self.peek()
                self.pos += 1
        self.pos += 1

    def _outside(self, nested: bool) -> Steps[None]:
        """A number or word, or inside of brackets what stands between values."""
        character = yield from self.peek()
        if nested and character in _BETWEEN:
            self.pos += 1
            return
        if character not in _SCALAR:
            raise Mismatch
        while (yield from self.peek()) in _SCALAR:
            self.pos += 1
