"""The dialects, by family of models, and which one a chat template speaks."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from kvant.errors import ConfigError, RequestError, did_you_mean
from kvant.server.dialects.deltas import NewId, OutputParser, call_id
from kvant.server.dialects.grammar import IsSpecial, grammar, literal, mark, objects, series
from kvant.server.dialects.messages import (
    Messages,
    as_text,
    check_messages,
    one_call_each,
    with_system,
)
from kvant.server.dialects.parser import (
    THINK,
    THINK_END,
    TOOL_CALL,
    TOOL_CALL_END,
    BareParser,
    Parser,
    TaggedParser,
    Thinking,
)
from kvant.server.dialects.tools import Tools

__all__ = ["DIALECTS", "Dialect", "Hermes", "Llama", "Plain", "SmolLM2", "dialect_of"]


class Dialect(Protocol):
    """How a family of models writes tool calls and reasoning."""

    name: ClassVar[str]

    @property
    def skip_special_tokens(self) -> bool:
        """False if markers are special tokens, which the parser must see."""

    def inputs(self, messages: Sequence[Mapping[str, Any]], tools: Tools) -> dict[str, Any]:
        """What the chat template needs: ``chat.render(**inputs)``.

        Raises:
            RequestError: a message is malformed, or there are tools and no way to give them to
                this model.
        """

    def response_format(self, prompt: str, tools: Tools) -> dict[str, Any] | None:
        """The constraint for an answer that must be calls, ``{"type": "grammar", "grammar":
        lark}``; None if it need not be. ``prompt`` is the rendered one."""

    def parser(
        self, prompt: str, tools: Tools, *, reasoning: bool = True, new_id: NewId = call_id
    ) -> OutputParser:
        """A parser for one output. Without ``reasoning`` it is not told apart from content."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A model of which no way to call tools is known. Made of its chat template, and of what its
    tokenizer takes for a special token."""

    template: str = ""
    is_special: IsSpecial = lambda _: False

    name: ClassVar[str] = "plain"
    markers: ClassVar[tuple[str, ...]] = (THINK, THINK_END)
    reader: ClassVar[type[Parser]] = Parser

    @property
    def skip_special_tokens(self) -> bool:
        """See :class:`Dialect`."""
        return not any(map(self.is_special, self.markers))

    @property
    def knows_tools(self) -> bool:
        """Whether the template itself puts tools into the prompt."""
        return re.search(r"\btools\b", self.template) is not None

    def inputs(self, messages: Sequence[Mapping[str, Any]], tools: Tools) -> dict[str, Any]:
        """See :class:`Dialect`."""
        if tools:
            others = ", ".join(name for name in DIALECTS if name != self.name)
            raise RequestError(
                "kvant does not know how this model calls tools; leave tools out, or start the "
                f"server with --tool-call-parser and one of {others}"
            )
        return {"messages": check_messages(messages), "tools": None}

    def response_format(self, prompt: str, tools: Tools) -> dict[str, Any] | None:
        """See :class:`Dialect`."""
        del prompt, tools
        return None

    def parser(
        self, prompt: str, tools: Tools, *, reasoning: bool = True, new_id: NewId = call_id
    ) -> OutputParser:
        """See :class:`Dialect`."""
        return self.reader(tools, _thinking(prompt, reasoning), new_id)


class _Calling(Plain, ABC):
    """What the dialects with calls have in common. If the template does not know tools, tools,
    calls and results are written into the messages."""

    __slots__ = ()
    result_role: ClassVar[str] = "user"

    def inputs(self, messages: Sequence[Mapping[str, Any]], tools: Tools) -> dict[str, Any]:
        checked = check_messages(messages)
        if self.knows_tools:
            return {"messages": self.native(checked), "tools": list(tools.definitions) or None}
        written = as_text(checked, self.calls_text, self.result_text, self.result_role)
        if tools.definitions:
            written = with_system(written, self.instructions(tools.definitions))
        return {"messages": written, "tools": None}

    def response_format(self, prompt: str, tools: Tools) -> dict[str, Any] | None:
        if not tools.forced:
            return None
        thinking = _thinking(prompt, THINK_END in self.template)
        text = grammar(self.rules(tools), thinking, self.is_special)
        return {"type": "grammar", "grammar": text}

    def native(self, messages: Messages) -> Messages:
        """Messages for a template that knows tools; most want every content to be text."""
        return [{**message, "content": message["content"] or ""} for message in messages]

    @abstractmethod
    def rules(self, tools: Tools) -> list[str]:
        """Lines of a grammar with the rule ``calls``."""

    @abstractmethod
    def instructions(self, definitions: Sequence[Mapping[str, Any]]) -> str:
        """What the system message says of tools."""

    @abstractmethod
    def calls_text(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls as the model writes them."""

    def result_text(self, content: str) -> str:
        """The result of a call as the model reads it."""
        return f"<tool_response>\n{content}\n</tool_response>"


class Hermes(_Calling):
    """Hermes, Qwen2.5, Qwen3 and many others: each call between tags."""

    __slots__ = ()
    name = "hermes"
    markers = (THINK, THINK_END, TOOL_CALL, TOOL_CALL_END)
    reader = TaggedParser

    def rules(self, tools: Tools) -> list[str]:
        """See :class:`_Calling`."""
        begin, end = (mark(text, self.is_special) for text in (TOOL_CALL, TOOL_CALL_END))
        newline = literal("\n")
        return [
            f"calls: {series('call', newline, tools.several)}",
            f"call: {begin} {newline} object {newline} {end}",
            *objects(tools.functions, "arguments"),
        ]

    def instructions(self, definitions: Sequence[Mapping[str, Any]]) -> str:
        """What Qwen's template says."""
        return (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
            + "\n".join(map(_json, definitions))
            + "\n</tools>\n\nFor each function call, return a json object with function name and "
            "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )

    def calls_text(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See :class:`_Calling`."""
        texts = (_object(call, "arguments") for call in calls)
        return "\n".join(f"{TOOL_CALL}\n{text}\n{TOOL_CALL_END}" for text in texts)


class SmolLM2(Hermes):
    """SmolLM2: calls in a list between tags. Its template knows nothing of tools; its model card
    says what the system message must be."""

    __slots__ = ()
    name = "smollm2"

    def rules(self, tools: Tools) -> list[str]:
        """See :class:`_Calling`."""
        begin, end = (mark(text, self.is_special) for text in (TOOL_CALL, TOOL_CALL_END))
        return [
            f"calls: {begin} OPEN {series('object', 'SEPARATOR', tools.several)} CLOSE {end}",
            "OPEN: /\\[\\n?/",
            "SEPARATOR: /,[ \\n]/",
            "CLOSE: /\\n?\\]/",
            *objects(tools.functions, "arguments"),
        ]

    def instructions(self, definitions: Sequence[Mapping[str, Any]]) -> str:
        """The text of the model card, with its spaces at the ends of lines."""
        return (
            "You are an expert in composing functions. You are given a question and a set of "
            "possible functions. \nBased on the question, you will need to make one or more "
            "function/tool calls to achieve the purpose. \nIf none of the functions can be used, "
            "point it out and refuse to answer. \nIf the given question lacks the parameters "
            "required by the function, also point it out.\n\nYou have access to the following "
            f"tools:\n<tools>{_json(definitions)}</tools>\n\nThe output MUST strictly adhere to "
            "the following format, and NO other text MUST be included.\nThe example format is as "
            "follows. Please make sure the parameter type is correct. If no function call is "
            "needed, please make the tool calls an empty list '[]'.\n<tool_call>[\n"
            '{"name": "func_name1", "arguments": {"argument1": "value1", "argument2": "value2"}},\n'
            "... (more tool calls as required)\n]</tool_call>"
        )

    def calls_text(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See :class:`_Calling`."""
        texts = ",\n".join(_object(call, "arguments") for call in calls)
        return f"{TOOL_CALL}[\n{texts}\n]{TOOL_CALL_END}"


class Llama(_Calling):
    """Llama 3.1 and 3.2: a call is the whole answer. Their templates refuse several calls in one
    message, so such a message becomes several."""

    __slots__ = ()
    name = "llama3"
    reader = BareParser
    result_role = "ipython"

    def native(self, messages: Messages) -> Messages:
        """See :class:`_Calling`."""
        return one_call_each(super().native(messages))

    def rules(self, tools: Tools) -> list[str]:
        """See :class:`_Calling`."""
        return [
            f"calls: {series('object', literal('; '), tools.several)}",
            *objects(tools.functions, "parameters"),
        ]

    def instructions(self, definitions: Sequence[Mapping[str, Any]]) -> str:
        """What Llama's template says, without its missing spaces."""
        return (
            "You have access to the following functions. To call a function, please respond with "
            'JSON for a function call. Respond in the format {"name": function name, "parameters": '
            "dictionary of argument name and its value}. Do not use variables.\n\n"
            + "\n\n".join(json.dumps(d, ensure_ascii=False, indent=4) for d in definitions)
        )

    def calls_text(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See :class:`_Calling`."""
        return "; ".join(_object(call, "parameters") for call in calls)

    def result_text(self, content: str) -> str:
        """See :class:`_Calling`."""
        return content


DIALECTS: Mapping[str, type[Plain]] = {
    dialect.name: dialect for dialect in (Hermes, Llama, SmolLM2, Plain)
}
"""By the names that ``--tool-call-parser`` knows."""


def dialect_of(
    template: str | None, name: str = "auto", is_special: IsSpecial = lambda _: False
) -> Dialect:
    """The dialect of the model with this chat template: the one with that name, or by default the
    one that the template shows. ``is_special`` tells which texts are special tokens.

    Raises:
        ConfigError: there is no dialect of that name.
    """
    template = template or ""
    if name == "auto":
        return _shown_by(template)(template, is_special)
    if name not in DIALECTS:
        raise ConfigError(
            f'tool_call_parser "{name}" is unknown; use auto or one of {", ".join(DIALECTS)}'
            + did_you_mean(name, DIALECTS)
        )
    return DIALECTS[name](template, is_special)


def _shown_by(template: str) -> type[Plain]:
    xml = "<function=" in template or "<arg_key>" in template  # Qwen3-Coder, GLM: other calls
    if TOOL_CALL in template and '"arguments' in template and not xml:
        return Hermes
    if "ipython" in template and '"parameters' in template:
        return Llama
    if "named SmolLM" in template and not Plain(template).knows_tools:
        return SmolLM2
    return Plain


def _thinking(prompt: str, possible: bool) -> Thinking:
    """Where a prompt leaves the model: templates open or close reasoning at its end."""
    prompt = prompt.rstrip()
    if not possible or prompt.endswith(THINK_END):
        return "no"
    return "begun" if prompt.endswith(THINK) else "maybe"


def _object(call: Mapping[str, Any], key: str) -> str:
    function = call["function"]
    return _json({"name": function["name"], key: function["arguments"]})


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
