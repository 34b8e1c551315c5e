"""Chat templates: a list of messages becomes the prompt that the model was trained on.

Templates come with models, so they are untrusted: they run in jinja2's immutable sandbox, with
the globals, filters and whitespace rules that Hugging Face defines for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from kvant.errors import ModelError, RequestError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["ChatTemplate", "as_messages"]


def _raise_exception(message: object) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter, escape neither HTML nor, by default, non-ASCII characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what an assistant wrote; for a prompt it is only its body."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class ChatTemplate:
    """The chat template of one model, compiled at first use.

    ``bos`` and ``eos`` are the texts that the template knows as ``bos_token`` and ``eos_token``.
    Many templates write ``bos_token`` themselves: encode what :meth:`render` returns with
    ``add_special=False``.
    """

    def __init__(self, source: str, bos: str, eos: str) -> None:
        self.source = source
        self._tokens = {"bos_token": bos, "eos_token": eos}

    @cached_property
    def _template(self) -> Template:
        from jinja2 import TemplateError

        try:
            return _environment().from_string(self.source)
        except TemplateError as error:
            raise ModelError(
                f"the chat template does not compile ({_one_line(error)}); give the prompt as text"
            ) from error

    def check(self) -> None:
        """Raise ModelError if the template is not valid jinja2."""
        _ = self._template

    def render(
        self,
        /,  # templates may have a variable of that name
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for ``messages``; ``variables`` are further names for the template.

        Raises:
            RequestError: a message lacks a role or content, or the template refuses them.
            ModelError: the template itself is not valid jinja2.
        """
        for index, message in enumerate(messages):
            _check(index, message)
        names = {"documents": None, **self._tokens, **variables}
        names |= {"messages": list(messages), "tools": tools}
        template = self._template
        try:
            return template.render(names, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template can raise anything that Python can
            raise RequestError(
                f"the chat template refuses these messages: {_one_line(error)}"
            ) from error


def as_messages(prompt: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A prompt as checked messages: text is what a user says; a content that is a list of text
    parts, as OpenAI clients send it, becomes their concatenation. The input is not changed.

    Raises:
        RequestError: there is no message, a message is malformed, or a part is not text.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not prompt:
        raise RequestError("messages is empty; give at least one message")
    messages = []
    for index, message in enumerate(prompt):
        _check(index, message)
        messages.append({**message, "content": _text_of(index, message.get("content"))})
    return messages


def _check(index: int, message: object) -> None:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(
            f'{where} is of type {type(message).__name__}; give {{"role": ..., "content": ...}}'
        )
    if not isinstance(message.get("role"), str):
        raise RequestError(f'{where} has no role; give "system", "user", "assistant" or "tool"')
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    if not isinstance(content, str | list | tuple):
        found = "no content" if content is None else f"content of type {type(content).__name__}"
        raise RequestError(f"{where} has {found}; give a string")


def _text_of(index: int, content: object) -> str | None:
    if content is None or isinstance(content, str):
        return content
    assert isinstance(content, list | tuple)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(
                f'messages[{index}] has a content part of type "{kind}"; only "text" is supported'
            )
        texts.append(text)
    return "".join(texts)
