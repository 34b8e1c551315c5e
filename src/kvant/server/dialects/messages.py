"""OpenAI's messages, checked, in the form that chat templates expect."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvant.errors import RequestError
from kvant.loading.chat import as_messages

__all__ = ["Messages", "as_text", "check_messages", "one_call_each", "with_system"]

Messages = list[dict[str, Any]]

_ROLES = ("system", "developer", "user", "assistant", "tool")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Messages as new dictionaries: contents are strings, or None beside tool calls; arguments of
    calls are objects, parsed from their JSON text; "developer" is "system"; members that are None
    are gone, and so are lists of no tool calls.

    Raises:
        RequestError: a message is malformed.
    """
    return [_message(f"messages[{i}]", m) for i, m in enumerate(as_messages(messages))]


def _message(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    role = message["role"]
    if role not in _ROLES:
        raise RequestError(f"{where} has role {role!r}; use one of {', '.join(_ROLES)}")
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise RequestError(f"{where} has no tool_call_id; give the id of the call that it answers")
    kept = {k: v for k, v in message.items() if v is not None and k != "tool_calls"}
    kept["role"] = "system" if role == "developer" else role
    kept["content"] = message["content"]
    if calls := message.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list | tuple):
            raise RequestError(f"{where}.tool_calls must be a list in a message of the assistant")
        kept["tool_calls"] = [
            _call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)
        ]
    return kept


def _call(where: str, call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise RequestError(f'{where} has no function; give {{"id", "type", "function"}}')
    name = function.get("name")
    if not isinstance(name, str):
        raise RequestError(f"{where}.function.name {name!r} is no string")
    arguments = _arguments(f"{where}.function.arguments", function.get("arguments"))
    return {
        **call,
        "type": "function",
        "function": {**function, "name": name, "arguments": arguments},
    }


def _arguments(where: str, arguments: object) -> dict[str, Any]:
    """Arguments as an object; some clients send nothing where there are none."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise RequestError(
                f"{where} is not valid JSON; repair it or leave the call out"
            ) from None
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{where} must be the JSON text of an object")
    return dict(arguments)


def one_call_each(messages: Messages) -> Messages:
    """For templates that know one call per message: each of several calls becomes a message of its
    own, with its result behind it."""
    ahead, out = deque(messages), Messages()
    while ahead:
        message = ahead.popleft()
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            out.append(message)
            continue
        results = []
        while ahead and ahead[0]["role"] == "tool":
            results.append(ahead.popleft())
        for call in calls:
            out.append({**message, "tool_calls": [call]})
            mine = [r for r in results if r["tool_call_id"] == call.get("id")]
            results = [r for r in results if r not in mine]
            out += mine
        out += results
    return out


def as_text(
    messages: Messages,
    calls_text: Callable[[Sequence[Mapping[str, Any]]], str],
    result_text: Callable[[str], str],
    result_role: str,
) -> Messages:
    """For templates that do not know tools: calls and results become contents. Results that follow
    each other become one message, as many templates want roles to alternate."""
    out, results = Messages(), False
    for message in messages:
        content = message["content"] or ""
        if message["role"] == "tool":
            if results:
                out[-1]["content"] += "\n" + result_text(content)
            else:
                out.append({"role": result_role, "content": result_text(content)})
        else:
            calls = message.get("tool_calls")
            parts = [content, *([calls_text(calls)] if calls else [])]
            kept = {k: v for k, v in message.items() if k != "tool_calls"}
            out.append({**kept, "content": "\n".join(filter(None, parts))})
        results = message["role"] == "tool"
    return out


def with_system(messages: Messages, text: str) -> Messages:
    """``text`` at the end of the system message, or as one."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}".lstrip()}
    return [first, *messages[1:]]
