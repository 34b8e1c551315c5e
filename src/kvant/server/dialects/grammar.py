"""Grammars that leave a model no choice but to call: the lark dialect of llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from kvant.server.dialects.parser import THINK, THINK_END, Thinking
from kvant.server.dialects.tools import Function

__all__ = ["IsSpecial", "grammar", "literal", "mark", "objects", "series"]

IsSpecial = Callable[[str], bool]
"""Whether a text is a special token of the tokenizer, which only a grammar that names it allows."""

# Arguments as json.dumps writes them, which is what models saw, and no endless white space.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar(calls: Sequence[str], thinking: Thinking, is_special: IsSpecial) -> str:
    """The grammar with the start rule ``calls``, of which ``calls`` are the lines, after the
    reasoning that the model may or must still write."""
    start = {"no": "calls", "maybe": "thinking? calls", "begun": "thoughts calls"}[thinking]
    lines = [f"start: {start}", *calls]
    if thinking == "maybe":
        lines.append(f"thinking: {mark(THINK, is_special)} thoughts")
    if thinking != "no":
        lines += ["thoughts: thought /\\n{0,3}/", *_thought(is_special), "ANY: /(.|\\n)*/"]
    return "\n".join(lines) + "\n"


def _thought(is_special: IsSpecial) -> list[str]:
    if is_special(THINK_END):
        return [f"thought: ANY {THINK_END}"]
    return [f"thought[lazy]: ANY {literal(THINK_END)}"]


def objects(functions: Sequence[Function], key: str) -> list[str]:
    """The rule ``object``: ``{"name": NAME, KEY: ARGUMENTS}`` for one of ``functions``."""
    names = [f"object_{index}" for index in range(len(functions))]
    lines = [f"object: {' | '.join(names)}"]
    for index, function in enumerate(functions):
        head = f'{{"name": "{function.name}", "{key}": '
        lines.append(f"object_{index}: {literal(head)} arguments_{index} {literal('}')}")
        lines.append(f"arguments_{index}: %json {_schema(function)}")
    return lines


def series(rule: str, separator: str, several: bool) -> str:
    """``rule`` once, or once and more."""
    return f"{rule} ({separator} {rule})*" if several else rule


def literal(text: str) -> str:
    """``text`` as a string of lark."""
    return json.dumps(text)


def mark(text: str, is_special: IsSpecial) -> str:
    """A marker, as a special token if it is one."""
    return text if is_special(text) else literal(text)


def _schema(function: Function) -> str:
    layout = {**_LAYOUT, "lenient": not function.strict}
    return json.dumps({**function.parameters, "x-guidance": layout})
