"""From the fields of a request to a :class:`GenerationConfig`."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from kvant.config import GenerationConfig
from kvant.server.config import ServerConfig
from kvant.server.errors import ApiError
from kvant.server.schema import ResponseFormat, Sampling

__all__ = ["Constraint", "constraint_of", "generation_config", "sequences"]


def sequences(n: int | None, prompts: int, config: ServerConfig, name: str = "n") -> int:
    """How many sequences ``n`` completions of each prompt are; ``name`` is the field that says it.

    Raises:
        ApiError: 400, more than the server allows.
    """
    count = (n or 1) * prompts
    if count > config.max_n:
        raise ApiError(
            400,
            f"{name}={n or 1} completions of {prompts} prompts are {count} sequences, and the "
            f"limit is {config.max_n}; send several requests",
            param="prompt" if (n or 1) == 1 else name,
        )
    return count


def generation_config(
    body: Sampling,
    config: ServerConfig,
    *,
    n: int | None,
    max_tokens: int,
    logprobs: int | None,
    response_format: dict[str, Any] | None,
) -> GenerationConfig:
    """How to generate, with OpenAI's defaults: everything is sampled at temperature 1.

    Raises:
        ApiError: 400, a list is longer than the server allows, or a value is no token id.
        RequestError: a value out of range.
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    temperature = 1.0 if body.temperature is None else body.temperature
    return GenerationConfig(
        n=n or 1,
        max_new_tokens=max_tokens,
        min_new_tokens=None if body.min_tokens is None else min(body.min_tokens, max_tokens),
        do_sample=temperature > 0,
        temperature=temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        random_seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        stop_words=_stop(body.stop, config),
        stop_token_ids=body.stop_token_ids,
        bad_words=body.bad_words,
        skip_special_tokens=body.skip_special_tokens is not False,
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        logit_bias=_logit_bias(body.logit_bias, config),
        logprobs=logprobs,
        response_format=response_format,
    )


def _stop(stop: str | list[str] | None, config: ServerConfig) -> list[str] | None:
    if stop is None or stop == "":
        return None
    found = [stop] if isinstance(stop, str) else stop
    _check_length("stop", len(found), config.max_stop)
    return found


def _logit_bias(bias: dict[str, float] | None, config: ServerConfig) -> dict[int, float] | None:
    if not bias:
        return None
    _check_length("logit_bias", len(bias), config.max_logit_bias)
    for token in bias:
        if not (token.isascii() and token.isdigit()):
            raise ApiError(
                400,
                f"logit_bias: keys must be token ids (got {ascii(token)[:80]})",
                param="logit_bias",
            )
    return {int(token): value for token, value in bias.items()}


def _check_length(name: str, length: int, limit: int) -> None:
    if length > limit:
        raise ApiError(400, f"{name} has {length} entries, and the limit is {limit}", param=name)


class Constraint(NamedTuple):
    """What ``GenerationConfig.response_format`` gets, and the field of the request it is from."""

    field: str
    format: dict[str, Any]


def constraint_of(body: Sampling, response_format: ResponseFormat | None) -> Constraint | None:
    """The constraint of a request, if it has one.

    Raises:
        ApiError: 400, there are several, or a schema is not valid JSON.
    """
    given = body.structured_outputs
    found = {
        "response_format": _plain(response_format),
        "guided_json": _schema(body.guided_json, "guided_json"),
        "guided_regex": _typed("regex", body.guided_regex),
        "guided_choice": _typed("choice", body.guided_choice),
        "guided_grammar": _typed("grammar", body.guided_grammar),
    }
    if given is not None:
        found |= {
            "structured_outputs.json": _schema(given.json_, "structured_outputs.json"),
            "structured_outputs.regex": _typed("regex", given.regex),
            "structured_outputs.choice": _typed("choice", given.choice),
            "structured_outputs.grammar": _typed("grammar", given.grammar),
            "structured_outputs.json_object": {"type": "json_object"}
            if given.json_object
            else None,
        }
    some = {name: value for name, value in found.items() if value is not None}
    if len(some) > 1:
        raise ApiError(400, f"{' and '.join(some)} are given; use one of them", param=min(some))
    return next((Constraint(*item) for item in some.items()), None)


def _plain(found: ResponseFormat | None) -> dict[str, Any] | None:
    if found is None or found.type == "text":
        return None
    return found.model_dump(by_alias=True, exclude_none=True)


def _typed(kind: str, value: Any) -> dict[str, Any] | None:
    return None if value is None else {"type": kind, kind: value}


def _schema(value: dict[str, Any] | str | None, name: str) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        schema = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{name} is not valid JSON: {error}", param=name) from None
    if not isinstance(schema, dict):
        raise ApiError(400, f"{name} must be a JSON schema, an object", param=name)
    return {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}
