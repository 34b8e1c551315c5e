"""The tools of a request, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvant.errors import RequestError, did_you_mean

__all__ = ["Function", "Tools", "check_tools"]

_MOST_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called. ``parameters`` is the JSON schema of an object; ``strict``
    says that every part of it must be enforced."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Tools:
    """What the model may call, and what it is told.

    ``functions`` may be called: none for tool_choice "none", one for a named tool. ``definitions``
    are for the prompt, in OpenAI's form: all tools, so that it stays the same whichever is named;
    none for tool_choice "none". With ``forced`` the answer must be calls, with ``several`` it may
    be more than one.
    """

    functions: tuple[Function, ...] = ()
    definitions: tuple[dict[str, Any], ...] = ()
    forced: bool = False
    several: bool = True

    def __bool__(self) -> bool:
        return bool(self.functions)


def check_tools(
    tools: Sequence[object] | None,
    tool_choice: object = None,
    parallel_tool_calls: bool | None = None,
) -> Tools:
    """What a request says about tools, as OpenAI defines it.

    Raises:
        RequestError: there are more than 128 tools, one is malformed or two have the same name, or
            tool_choice is unknown, or names a tool that is not there.
    """
    if tools is not None and (isinstance(tools, str) or not isinstance(tools, Sequence)):
        raise RequestError(f"tools is of type {type(tools).__name__}; give a list")
    if len(tools or ()) > _MOST_TOOLS:
        raise RequestError(f"tools has {len(tools or ())} entries; give at most {_MOST_TOOLS}")
    checked = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools or ())]
    functions = {function.name: function for function, _ in checked}
    for index, (function, _) in enumerate(checked):
        if functions[function.name] is not function:
            raise RequestError(
                f'tools[{index}].function.name "{function.name}" is there twice; rename one'
            )
    choice, named = _choice(tool_choice, functions)
    if choice == "none" or not functions:
        return Tools()
    return Tools(
        functions=tuple(functions.values()) if named is None else (functions[named],),
        definitions=tuple(definition for _, definition in checked),
        forced=choice == "required",
        several=parallel_tool_calls is not False and named is None,
    )


def _tool(where: str, tool: object) -> tuple[Function, dict[str, Any]]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        found = tool.get("type") if isinstance(tool, Mapping) else tool
        raise RequestError(f'{where} has type {found!r}; only "function" is supported')
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise RequestError(f'{where}.function is missing; give {{"name": ..., "parameters": ...}}')
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{where}.function.name {name!r} is no name; use 1 to 64 of a-z, A-Z, 0-9, _ and -"
        )
    description = function.get("description")
    if not isinstance(description, str | None):
        raise RequestError(f"{where}.function.description {description!r} is no string")
    strict = function.get("strict") is True
    parameters = _parameters(f"{where}.function.parameters", function.get("parameters"))
    shown = {k: v for k, v in function.items() if v is not None and k != "strict"}
    return Function(name, parameters, strict), {"type": "function", "function": shown}


def _parameters(where: str, schema: object) -> Mapping[str, Any]:
    schema = {} if schema is None else schema
    if not isinstance(schema, Mapping):
        raise RequestError(f"{where} is of type {type(schema).__name__}; give a JSON schema")
    kind = schema.get("type", "object")
    if kind != "object":
        raise RequestError(f'{where} has type {kind!r}; arguments are always of type "object"')
    return {**schema, "type": "object"}


def _choice(choice: object, functions: Mapping[str, Function]) -> tuple[str, str | None]:
    """One of auto, none and required, and the name of the tool if one is named."""
    if choice is None:
        return "auto", None
    if choice in ("auto", "none"):
        return str(choice), None
    if choice == "required":
        if not functions:
            raise RequestError('tool_choice is "required" but there are no tools; give some')
        return "required", None
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(choice, Mapping) or choice.get("type") != "function" or name is None:
        raise RequestError(
            f'tool_choice {choice!r} is unknown; use "auto", "none", "required" or '
            '{"type": "function", "function": {"name": ...}}'
        )
    if str(name) not in functions:
        raise RequestError(
            f"tool_choice names {name!r}, which is not among the tools"
            + did_you_mean(str(name), functions)
        )
    return "required", str(name)
