"""``/v1/completions``: texts or token ids are continued as they are."""

from __future__ import annotations

import json
import math
import secrets
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kvant.loading.tokenizer import Tokenizer
from kvant.request import Output, Request
from kvant.server.answer import answer, usage
from kvant.server.errors import ApiError
from kvant.server.log import log_prompt
from kvant.server.sampling import Constraint, constraint_of, generation_config, sequences
from kvant.server.schema import CompletionRequest
from kvant.server.service import Service

__all__ = ["complete"]

_DEFAULT_TOKENS = 16  # OpenAI's


async def complete(service: Service, body: CompletionRequest, http: HttpRequest) -> Response:
    """Continue prompts."""
    service.check_model(body.model)
    prompts = _prompts(body)
    each = body.best_of or body.n or 1
    name = "n" if body.best_of is None else "best_of"
    count = sequences(each, len(prompts), service.config, name)
    constraint = constraint_of(body, body.response_format)

    def prepare() -> tuple[list[Request], _Form]:
        parts: list[_Prompt] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                log_prompt(prompt, service.config.max_log_len)
                special = body.add_special_tokens is not False
                ids = service.encode(prompt, add_special=special)
            else:
                ids = prompt
            parts.append(_prompt(service, body, constraint, prompt, ids))
        form = _Form(service, body, parts)
        return [request for part in parts for request in part.requests], form

    field = constraint and constraint.field
    return await answer(service, http, count, prepare, stream=body.stream, constraint=field)


def _prompts(body: CompletionRequest) -> list[str] | list[list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt: the list is empty; give a prompt", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


class _PromptLogprobs:
    """Log-probabilities of the tokens of a prompt; takes logits as they are computed. Positions
    computed again, after a preemption, replace the first ones."""

    def __init__(self, ids: Sequence[int], count: int) -> None:
        self._ids, self._count = ids, count
        self._found: dict[int, dict[int, float]] = {}

    def __call__(self, start: int, logits: NDArray[np.float32]) -> None:
        for position, row in enumerate(logits, start + 1):
            if position < len(self._ids):
                self._found[position] = self._of(row, self._ids[position])

    def _of(self, row: NDArray[np.float32], token: int) -> dict[int, float]:
        best = row.max()
        norm = float(best) + math.log(np.exp(row - best).sum(dtype=np.float64))
        count = min(self._count, len(row))
        top = np.argpartition(row, -count)[-count:].tolist() if count else []
        top.sort(key=lambda other: (-row[other], other))
        return {other: float(row[other]) - norm for other in dict.fromkeys([*top, token])}

    def tokens(self) -> list[tuple[int, dict[int, float] | None]]:
        """Each token and what was likely there; nothing is known of the first."""
        return [(token, self._found.get(place)) for place, token in enumerate(self._ids)]


@dataclass(slots=True, eq=False)
class _Prompt:
    """A prompt and its sequences; ``text`` is what echo puts before each."""

    text: str
    requests: list[Request]
    scores: _PromptLogprobs | None


def _prompt(
    service: Service,
    body: CompletionRequest,
    constraint: Constraint | None,
    prompt: str | list[int],
    ids: list[int],
) -> _Prompt:
    pipe, each = service.pipe, body.best_of or body.n or 1
    scores = None
    if body.echo and body.logprobs is not None:
        scores = _PromptLogprobs(ids, body.logprobs)
    ranked = body.best_of is not None and body.best_of > (body.n or 1)
    room = max(pipe.model.engine.session_len - len(ids), 1)
    wanted = _DEFAULT_TOKENS if body.max_tokens is None else max(body.max_tokens, 1)
    gen = generation_config(
        body,
        service.config,
        n=each,
        max_tokens=min(wanted, room),
        logprobs=0 if body.logprobs is None and ranked else body.logprobs,
        response_format=constraint and constraint.format,
    )
    if body.max_tokens == 0:
        if constraint is not None:
            raise ApiError(
                400, "max_tokens=0 generates nothing to constrain; leave the constraint out",
                param="max_tokens",
            )  # fmt: skip
        requests = [pipe.score_request(ids, scores or (lambda *_: None)) for _ in range(each)]
        for request in requests[1:]:
            request.leader = requests[0]
    else:
        if scores is not None:
            gen = replace(gen, output_logits="all")
        requests = pipe.generate_requests(ids, gen)
        for request, sink in zip_longest(requests, [scores]):  # one sequence has the prompt's
            request.logits_sink = sink
    if not body.echo:
        text = ""
    else:
        text = prompt if isinstance(prompt, str) else pipe.tokenizer.decode(ids, skip_special=False)
    return _Prompt(text, requests, scores)


class _Choice:
    """One completion as it grows."""

    def __init__(self, prompt: _Prompt) -> None:
        self.prompt = prompt
        self.text: list[str] = [prompt.text]
        self.tokens: list[tuple[int, dict[int, float] | None]] = []
        self.finish_reason: str | None = None
        self.offset = 0

    @property
    def mean_logprob(self) -> float:
        """How likely the completion is, by token."""
        found = [likely[token] for token, likely in self.tokens if likely is not None]
        return statistics.fmean(found) if found else 0.0


class _Form:
    """Completions and their chunks."""

    def __init__(self, service: Service, body: CompletionRequest, prompts: list[_Prompt]) -> None:
        self._body = body
        self._tokenizer = service.pipe.tokenizer
        self._prompts = prompts
        self._requests = [request for prompt in prompts for request in prompt.requests]
        self._choices = [_Choice(prompt) for prompt in prompts for _ in prompt.requests]
        self._generated = 0
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }
        self._start = f'{json.dumps(self._head)[:-1]}, "choices": [{{"index": '
        self._close = '}], "usage": null}' if self._with_usage else "}]}"

    def begin(self) -> Iterator[str]:
        return iter(())

    def add(self, index: int, output: Output) -> list[str]:
        choice = self._choices[index]
        first = choice.finish_reason is None and not choice.tokens and len(choice.text) == 1
        self._generated += len(output.token_ids)
        choice.text.append(output.text)
        new = list(zip(output.token_ids, output.logprobs, strict=False))
        tokens: list[tuple[int, dict[int, float] | None]] = [*new]
        if first and choice.prompt.scores is not None:
            tokens = [*choice.prompt.scores.tokens(), *new]
        choice.tokens += tokens
        if output.finish_reason is not None:
            choice.finish_reason = output.finish_reason
        if not self._body.stream:
            return []
        text = choice.prompt.text + output.text if first else output.text
        if not text and not tokens and output.finish_reason is None:
            return []
        return [self._chunk(index, text, self._logprobs(choice, tokens), output.finish_reason)]

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> str:
        return (
            f'{self._start}{index}, "text": {json.dumps(text)}, "logprobs": '
            f'{json.dumps(logprobs)}, "finish_reason": {json.dumps(finish_reason)}{self._close}'
        )

    def end(self) -> Iterator[str]:
        if self._with_usage:
            used = usage(self._requests, self._generated)
            yield json.dumps({**self._head, "choices": [], "usage": used})

    def whole(self) -> dict[str, Any]:
        chosen = [choice for prompt in self._prompts for choice in self._best(prompt)]
        return {
            **self._head,
            "choices": [
                {
                    "index": index,
                    "text": "".join(choice.text),
                    "logprobs": self._logprobs(choice, choice.tokens),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(chosen)
            ],
            "usage": usage(self._requests, self._generated),
        }

    def _best(self, prompt: _Prompt) -> list[_Choice]:
        found = [choice for choice in self._choices if choice.prompt is prompt]
        if len(found) > (self._body.n or 1):
            found.sort(key=lambda choice: -choice.mean_logprob)
        return found[: self._body.n or 1]

    def _logprobs(
        self, choice: _Choice, tokens: Sequence[tuple[int, dict[int, float] | None]]
    ) -> dict[str, Any] | None:
        count = self._body.logprobs
        if count is None:
            return None
        return _logprobs(self._tokenizer, choice, tokens, count)


def _logprobs(
    tokenizer: Tokenizer,
    choice: _Choice,
    tokens: Sequence[tuple[int, dict[int, float] | None]],
    count: int,
) -> dict[str, Any]:
    offsets = []
    for token, _ in tokens:
        offsets.append(choice.offset)
        choice.offset += len(tokenizer.token_text(token))
    return {
        "tokens": [tokenizer.token_text(token) for token, _ in tokens],
        "token_logprobs": [None if likely is None else likely[token] for token, likely in tokens],
        "top_logprobs": [_top(tokenizer, likely) for _, likely in tokens] if count else None,
        "text_offset": offsets,
    }


def _top(tokenizer: Tokenizer, likely: dict[int, float] | None) -> dict[str, float] | None:
    """By text, the likeliest first; the token that came is there even if others are likelier."""
    if likely is None:
        return None
    found: dict[str, float] = {}
    for token, value in likely.items():
        found.setdefault(tokenizer.token_text(token), value)  # parts of characters look the same
    return found
