"""``/v1/chat/completions``: messages in, what the assistant says out."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kvant.config import GenerationConfig
from kvant.errors import RequestError
from kvant.loading.tokenizer import Tokenizer
from kvant.request import Output, Request
from kvant.server.answer import answer, usage
from kvant.server.dialects import Answer, Delta, OutputParser, ToolDelta, Tools, check_tools
from kvant.server.errors import ApiError
from kvant.server.log import log_prompt
from kvant.server.sampling import Constraint, constraint_of, generation_config, sequences
from kvant.server.schema import ChatRequest, Message
from kvant.server.service import Service

__all__ = ["chat", "render"]

_TEMPLATE_NAMES = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables of templates that a client may not set by ``chat_template_kwargs``."""


async def chat(service: Service, body: ChatRequest, http: HttpRequest) -> Response:
    """Answer a conversation."""
    service.check_model(body.model)
    count = sequences(body.n, 1, service.config)

    constraint = constraint_of(body, body.response_format)
    field = constraint.field if constraint else None
    if body.tool_choice not in (None, "auto", "none"):
        field = "tools"  # a forced call is a constraint too

    def prepare() -> tuple[list[Request], _Form]:
        pipe, dialect = service.pipe, service.dialect
        tools = check_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
        text = render(service, body.messages, _variables(body), tools, _add_prompt(body))
        ids = service.encode(text, add_special=False)
        log_prompt(text, service.config.max_log_len)
        forced = dialect.response_format(text, tools)
        gen = _generation_config(service, body, forced, constraint, len(ids))
        requests = pipe.generate_requests(ids, gen)
        reasoning = service.config.reasoning
        parsers = [dialect.parser(text, tools, reasoning=reasoning) for _ in requests]
        return requests, _Form(service, body, requests, parsers)

    return await answer(service, http, count, prepare, stream=body.stream, constraint=field)


def _add_prompt(body: ChatRequest) -> bool:
    return body.add_generation_prompt is not False


def _variables(body: ChatRequest) -> dict[str, Any]:
    """What the chat template gets beside messages and tools."""
    found = dict(body.chat_template_kwargs or {})
    for name in _TEMPLATE_NAMES:
        if name in found:
            raise ApiError(
                400, f'chat_template_kwargs has "{name}", which is a field of the request',
                param="chat_template_kwargs",
            )  # fmt: skip
    for name in ("reasoning_effort", "enable_thinking"):
        if (value := getattr(body, name)) is not None:
            found[name] = value
    return found


def render(
    service: Service,
    messages: Sequence[Message],
    variables: dict[str, Any],
    tools: Tools,
    add_generation_prompt: bool,
) -> str:
    """The prompt of a conversation.

    Raises:
        RequestError: the model has no chat template, or it refuses these messages.
    """
    template = service.pipe.chat_template
    if template is None:
        raise RequestError(
            "this model has no chat template, so it cannot chat; use /v1/completions, or start "
            "the server with --chat-template"
        )
    given = [message.model_dump(exclude_none=True) for message in messages]
    inputs = service.dialect.inputs(given, tools)
    return template.render(**inputs, add_generation_prompt=add_generation_prompt, **variables)


def _generation_config(
    service: Service,
    body: ChatRequest,
    forced: dict[str, Any] | None,
    constraint: Constraint | None,
    num_prompt: int,
) -> GenerationConfig:
    if forced is not None and constraint is not None:
        raise ApiError(
            400, "tool_choice forces a tool call, so the answer cannot have a response_format too; "
            "leave one of them out", param="tool_choice",
        )  # fmt: skip
    wanted = body.max_completion_tokens or body.max_tokens
    room = max(service.pipe.model.engine.session_len - num_prompt, 1)
    gen = generation_config(
        body,
        service.config,
        n=body.n,
        max_tokens=min(wanted or room, room),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        response_format=forced or (constraint and constraint.format),
    )
    return gen if service.dialect.skip_special_tokens else replace(gen, skip_special_tokens=False)


class _Choice:
    """One of n answers as it grows."""

    def __init__(self, parser: OutputParser) -> None:
        self.parser = parser
        self.answer = Answer()  # of a whole answer; a stream has passed it on
        self.called = False
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None

    def message(self, *, reasoning: bool) -> dict[str, Any]:
        """OpenAI's message."""
        said = self.answer
        found: dict[str, Any] = {"role": "assistant", "content": said.content}
        if reasoning and said.reasoning:
            found["reasoning_content"] = said.reasoning
        if said.calls:
            calls = [_call(call) for call in said.calls]
            found |= {"content": said.content or None, "tool_calls": calls}
        return found


def _call(call: ToolDelta) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


class _Form:
    """Chat completions and their chunks."""

    def __init__(
        self,
        service: Service,
        body: ChatRequest,
        requests: Sequence[Request],
        parsers: Sequence[OutputParser],
    ) -> None:
        self._requests = requests
        self._tokenizer = service.pipe.tokenizer
        self._choices = [_Choice(parser) for parser in parsers]
        self._generated = 0
        self._streamed = bool(body.stream)
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._with_reasoning = body.include_reasoning is not False
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.model_name,
        }
        # Written once: what follows differs from chunk to chunk.
        head = json.dumps({**self._head, "object": "chat.completion.chunk"})
        self._start = f'{head[:-1]}, "choices": [{{"index": '
        self._close = '}], "usage": null}' if self._with_usage else "}]}"

    def begin(self) -> Iterator[str]:
        for index in range(len(self._choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def add(self, index: int, output: Output) -> list[str]:
        choice = self._choices[index]
        self._generated += len(output.token_ids)
        delta = choice.parser.push(output.text) if output.text else Delta()
        logprobs = self._logprobs(output)
        pieces = [delta]
        if output.finish_reason is not None:
            pieces.append(choice.parser.finish())
        for piece in pieces:
            choice.called |= bool(piece.tool_calls)
            if not self._streamed:
                choice.answer.add(piece)
        if output.finish_reason is not None:
            # A call that was cut is none to make: then it stays "length".
            called = choice.called and output.finish_reason == "stop"
            choice.finish_reason = "tool_calls" if called else output.finish_reason
        if not self._streamed:
            choice.logprobs += logprobs or []
            return []
        return list(self._chunks(index, pieces, logprobs, choice.finish_reason))

    def _chunks(
        self,
        index: int,
        pieces: Sequence[Delta],
        logprobs: list[dict[str, Any]] | None,
        finish_reason: str | None,
    ) -> Iterator[str]:
        for piece in pieces:
            if (delta := self._delta(piece)) or logprobs:
                yield self._chunk(index, delta, logprobs, None)
                logprobs = None
        if finish_reason is not None:
            yield self._chunk(index, {}, None, finish_reason)

    def _delta(self, piece: Delta) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if piece.reasoning and self._with_reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.content:
            delta["content"] = piece.content
        if piece.tool_calls:
            delta["tool_calls"] = [
                {"index": call.index, "function": {"arguments": call.arguments}}
                if call.id is None
                else {"index": call.index, **_call(call)}
                for call in piece.tool_calls
            ]
        return delta

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: list[dict[str, Any]] | None,
        finish_reason: str | None,
    ) -> str:
        found = "null" if logprobs is None else json.dumps({"content": logprobs})
        return (
            f'{self._start}{index}, "delta": {json.dumps(delta)}, "logprobs": {found}, '
            f'"finish_reason": {json.dumps(finish_reason)}{self._close}'
        )

    def end(self) -> Iterable[str]:
        if self._with_usage:
            used = usage(self._requests, self._generated)
            kind = "chat.completion.chunk"
            yield json.dumps({**self._head, "object": kind, "choices": [], "usage": used})

    def whole(self) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": choice.message(reasoning=self._with_reasoning),
                    "logprobs": {"content": choice.logprobs} if self._wants_logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(self._choices)
            ],
            "usage": usage(self._requests, self._generated),
        }

    @property
    def _wants_logprobs(self) -> bool:
        return self._requests[0].gen.logprobs is not None

    def _logprobs(self, output: Output) -> list[dict[str, Any]] | None:
        if not self._wants_logprobs or not output.token_ids:
            return None
        count = self._requests[0].gen.logprobs or 0
        return [
            {
                **_entry(self._tokenizer, token, found[token]),
                "top_logprobs": [
                    _entry(self._tokenizer, other, value)
                    for other, value in list(found.items())[:count]
                ],
            }
            for token, found in zip(output.token_ids, output.logprobs, strict=True)
        ]


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.token_text(token)
    whole = "\N{REPLACEMENT CHARACTER}" not in text  # else it is a part of a character
    return {
        "token": text,
        "logprob": max(logprob, -9999.0),
        "bytes": list(text.encode()) if whole else None,
    }
