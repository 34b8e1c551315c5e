"""``/generate``, ``/tokenize``, ``/detokenize``: for clients that tokenize, or want to see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kvant.errors import RequestError
from kvant.request import Output, Request
from kvant.server.answer import answer
from kvant.server.chat import render
from kvant.server.dialects import check_tools
from kvant.server.errors import ApiError
from kvant.server.log import log_prompt
from kvant.server.sampling import constraint_of, generation_config
from kvant.server.schema import DetokenizeRequest, GenerateRequest, TokenizeRequest
from kvant.server.service import Service

__all__ = ["detokenize", "generate", "tokenize"]

_DEFAULT_TOKENS = 128  # LMDeploy's


async def generate(service: Service, body: GenerateRequest, http: HttpRequest) -> Response:
    """Continue one prompt."""
    service.check_model(body.model)
    constraint = constraint_of(body, None)

    def prepare() -> tuple[list[Request], _Form]:
        pipe = service.pipe
        if body.prompt is not None:
            log_prompt(body.prompt, service.config.max_log_len)
        ids = body.input_ids if body.prompt is None else service.encode(body.prompt)
        assert ids is not None, "the schema wants one of them"
        room = max(pipe.model.engine.session_len - len(ids), 1)
        gen = generation_config(
            body,
            service.config,
            n=1,
            max_tokens=min(body.max_tokens or _DEFAULT_TOKENS, room),
            logprobs=0 if body.return_logprob else None,
            response_format=constraint and constraint.format,
        )
        requests = pipe.generate_requests(ids, gen)
        return requests, _Form(requests[0], stream=bool(body.stream))

    field = constraint and constraint.field
    return await answer(service, http, 1, prepare, stream=body.stream, constraint=field)


class _Form:
    """LMDeploy's shape: each event has what is new; ``meta_info`` is of all so far."""

    def __init__(self, request: Request, *, stream: bool) -> None:
        self._request, self._stream = request, stream
        self._text: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[list[float]] = []
        self._finish_reason: str | None = None

    def begin(self) -> Iterator[str]:
        return iter(())

    def add(self, _: int, output: Output) -> list[str]:
        self._text.append(output.text)
        self._ids += output.token_ids
        logprobs = [
            [found[token], token]
            for token, found in zip(output.token_ids, output.logprobs, strict=False)
        ]
        self._logprobs += logprobs
        self._finish_reason = output.finish_reason
        if not self._stream:
            return []
        return [json.dumps(self._answer(output.text, list(output.token_ids), logprobs))]

    def end(self) -> Iterator[str]:
        return iter(())

    def whole(self) -> dict[str, Any]:
        return self._answer("".join(self._text), self._ids, self._logprobs)

    def _answer(self, text: str, ids: list[int], logprobs: list[list[float]]) -> dict[str, Any]:
        request = self._request
        meta: dict[str, Any] = {
            "finish_reason": self._finish_reason and {"type": self._finish_reason},
            "prompt_tokens": request.num_prompt,
            "cached_tokens": request.cached_tokens,
            "completion_tokens": len(self._ids),
        }
        if request.gen.logprobs is not None:
            meta["output_token_logprobs"] = logprobs
        return {"text": text, "output_ids": ids, "meta_info": meta}


async def tokenize(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    """The token ids of a prompt or a conversation."""
    service.check_open()
    service.check_model(body.model)
    pipe = service.pipe

    def run() -> list[int]:
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            return service.encode(body.prompt, add_special=special)
        add_prompt = body.add_generation_prompt is not False
        text = render(service, body.messages or (), {}, check_tools(None, None), add_prompt)
        return service.encode(text, add_special=False)

    tokens = await service.prepare(run)
    limit = pipe.model.engine.session_len
    return {"count": len(tokens), "max_model_len": limit, "tokens": tokens}


async def detokenize(service: Service, body: DetokenizeRequest) -> dict[str, Any]:
    """The text of token ids."""
    service.check_open()
    service.check_model(body.model)
    pipe = service.pipe
    size = pipe.model.config.vocab_size
    if (largest := max(body.tokens, default=0)) >= size:
        raise ApiError(
            400, f"tokens has {largest}, and the model knows 0 to {size - 1}", param="tokens"
        )

    def run() -> str:
        try:
            return pipe.tokenizer.decode(body.tokens, skip_special=bool(body.skip_special_tokens))
        except OverflowError as error:
            raise RequestError(f"tokens: {error}") from None

    return {"prompt": await service.prepare(run)}
