"""From the text of a model to content, reasoning and tool calls.

Content goes on at once, except what may be the beginning of a marker, and white space, which is no
content around markers. A call is announced when its name and the beginning of its arguments are
there; the arguments go on as they come. Whatever turns out to be no call is content, word for word:
broken JSON, an object with other members, a call that ends before its arguments begin, a name that
is not among the tools, a second call where only one may be made. (vLLM passes on calls of any name.
But a client can do nothing with a function that it does not have, and what merely looks like a call
is mostly an answer in JSON.) Where a call breaks off after it was announced, the pieces stay, and
what follows is content.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvant.server.dialects.deltas import Delta, Gathering, NewId, ToolDelta
from kvant.server.dialects.source import SPACE, Ended, Mismatch, Source, Steps
from kvant.server.dialects.tools import Tools

__all__ = [
    "PYTHON_TAG",
    "THINK",
    "THINK_END",
    "TOOL_CALL",
    "TOOL_CALL_END",
    "BareParser",
    "Parser",
    "TaggedParser",
    "Thinking",
]

THINK, THINK_END = "<think>", "</think>"
TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"

Thinking: TypeAlias = Literal["no", "maybe", "begun"]
"""Whether an output may start with reasoning, or the prompt ends inside of it."""

_NAME = '"name"'
_ARGUMENTS = ('"arguments"', '"parameters"')
_KEYS = (_NAME, *_ARGUMENTS, '"type"', '"id"')
_PUNCTUATION = SPACE + "}],;"  # between two calls and after the last; models are generous with it


@dataclass(slots=True)
class _Call:
    """A call that is being read. ``arguments`` is what was read of them before the name."""

    name: str | None = None
    arguments: str | None = None
    announced: bool = False


class Parser:
    """Content and reasoning; a subclass says where calls may stand.

    ``source.mark`` stands before whatever may still turn out to be something else.
    """

    end = ""
    """What ends a series of calls; without it, the end of the text does."""

    def __init__(self, tools: Tools, thinking: Thinking, new_id: NewId) -> None:
        self._source = Source()
        self._new = Gathering()
        self._names = tuple(f'"{function.name}"' for function in tools.functions)
        self._most = None if tools.several else 1
        self._thinking = thinking
        self._new_id = new_id
        self._announced = 0
        self._in_arguments = False
        self._in_series = False  # a call was announced and its series has not ended
        self._steps = self._run()

    def push(self, text: str) -> Delta:
        """See :class:`~kvant.server.dialects.deltas.OutputParser`."""
        self._source.push(text)
        return self._advance()

    def finish(self) -> Delta:
        """See :class:`~kvant.server.dialects.deltas.OutputParser`."""
        self._source.end()
        return self._advance()

    def _advance(self) -> Delta:
        next(self._steps, None)
        if self._in_arguments:
            self._pass_arguments()
        return self._new.take()

    def _run(self) -> Steps[None]:
        try:
            if self._thinking != "no":
                yield from self._thoughts()
            if self._names:
                yield from self._answer()
            while True:
                self._say(self._source.account_all())
                yield from self._source.more()
        except Ended:
            rest = self._source.account_all()
            if not (self._in_series and self.end.startswith(rest.strip(_PUNCTUATION))):
                self._say(rest)

    def _answer(self) -> Steps[None]:
        """Read content and calls; return where only content can follow."""
        yield from ()

    def _say(self, text: str) -> None:
        self._new.content += text

    def _think(self, text: str) -> None:
        self._new.reasoning += text

    # -------------------------------------------------------------------------------- reasoning

    def _thoughts(self) -> Steps[None]:
        source = self._source
        if self._thinking == "maybe":
            try:
                yield from source.skip(SPACE)
                yield from source.take(THINK)
            except Mismatch:
                source.rewind()
                return
            source.account_read()
        yield from self._drop_space()
        try:
            yield from self._until(THINK_END, self._think)
        except Ended:
            self._think(source.account_all())
            raise
        source.account_through(THINK_END)
        yield from self._drop_space()

    def _until(self, marker: str, pass_on: Callable[[str], None]) -> Steps[None]:
        """Pass text on up to ``marker`` and the white space before it, which stay unread."""
        source = self._source
        while True:
            text = source.held
            found = text.find(marker)
            sure = text[: found if found >= 0 else len(text) - _overlap(text, marker)]
            pass_on(source.account(len(sure.rstrip(SPACE))))
            if found >= 0:
                return
            yield from source.more()

    def _drop_space(self) -> Steps[None]:
        try:
            yield from self._source.skip(SPACE)
        finally:
            self._source.account_read()

    # ------------------------------------------------------------------------------------ calls

    def _series(self) -> Steps[None]:
        """Calls and the end of their series. Raises Mismatch at what is neither."""
        source = self._source
        while True:
            yield from self._call()
            following = yield from source.skip(_PUNCTUATION)
            if self.end.startswith(following):
                yield from source.take(self.end)
                source.account_read()
                return

    def _call(self) -> Steps[None]:
        """One call. Raises Mismatch if there is none; one that breaks off after it was announced
        ends there."""
        source, call = self._source, _Call()
        if self._announced == self._most:
            raise Mismatch
        try:
            yield from source.take("{")
            yield from self._members(call)
        except Mismatch:
            if not call.announced:
                raise
            if self._in_arguments:
                self._end_arguments()
            source.rewind()
        else:
            source.account_read()

    def _members(self, call: _Call) -> Steps[None]:
        source, following = self._source, ","
        while following == ",":
            yield from source.skip(SPACE)
            key = yield from source.take_one_of(_KEYS)
            yield from source.skip(SPACE)
            yield from source.take(":")
            yield from source.skip(SPACE)
            yield from self._member(call, key)
            yield from source.skip(SPACE)
            following = yield from source.take_one_of((",", "}"))
        if not call.announced:
            self._announce(call, "{}")

    def _member(self, call: _Call, key: str) -> Steps[None]:
        if key in _ARGUMENTS:
            yield from self._arguments(call)
        elif key != _NAME:
            yield from self._source.value()
        elif call.name is not None:
            raise Mismatch
        else:
            call.name = (yield from self._source.take_one_of(self._names))[1:-1]
            if call.arguments is not None:
                self._announce(call, call.arguments)

    def _arguments(self, call: _Call) -> Steps[None]:
        source = self._source
        if call.announced or call.arguments is not None or (yield from source.peek()) != "{":
            raise Mismatch
        if call.name is None:
            before = len(source.read)
            yield from source.value()
            call.arguments = source.read[before:]
        else:
            self._announce(call, "")
            self._in_arguments = True
            yield from source.value()
            self._end_arguments()

    def _announce(self, call: _Call, arguments: str) -> None:
        """Everything read so far belongs to this call."""
        if call.name is None:
            raise Mismatch
        self._source.account_read()
        self._new.call(ToolDelta(self._announced, self._new_id(), call.name, arguments))
        self._announced += 1
        self._in_series = call.announced = True

    def _pass_arguments(self) -> None:
        if text := self._source.account_read():
            self._new.call(ToolDelta(self._announced - 1, arguments=text))

    def _end_arguments(self) -> None:
        self._pass_arguments()
        self._in_arguments = False


class TaggedParser(Parser):
    """Calls anywhere in the content, between tags: one after the other, or in a list. An empty
    list, with which a model says that it calls nothing, is no content either."""

    end = TOOL_CALL_END

    def _answer(self) -> Steps[None]:
        source = self._source
        while True:
            yield from self._until(TOOL_CALL, self._say)
            try:
                yield from self._tag()
                self._in_series = False
                yield from self._drop_space()
            except Mismatch:
                if not self._in_series:  # the tag opens nothing; there may be one behind it
                    self._say(source.account_through(TOOL_CALL))
                self._in_series = False
                source.rewind()

    def _tag(self) -> Steps[None]:
        source = self._source
        yield from source.skip(SPACE)
        yield from source.take(TOOL_CALL)
        if (yield from source.skip(SPACE)) == "[":
            yield from source.take("[")
            if (yield from source.skip(SPACE)) == "]":
                yield from source.skip(SPACE + "]")
                yield from source.take(TOOL_CALL_END)
                source.account_read()
                return
        yield from self._series()


class BareParser(Parser):
    """Calls that are the whole answer, perhaps after a tag, with semicolons between them."""

    def _answer(self) -> Steps[None]:
        source = self._source
        try:
            if (yield from source.skip(SPACE)) == PYTHON_TAG[0]:
                yield from source.take(PYTHON_TAG)
                yield from source.skip(SPACE)
            yield from self._series()
        except Mismatch:
            self._in_series = False
            source.rewind()


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``marker``, not all of it."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
