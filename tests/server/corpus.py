"""Requests that a server must refuse: bodies and headers, by group, over all that is POSTed.

Made systematically from the fields of the schemas; each case says which field is to blame, if one
is. What needs sockets, because no HTTP client would send it, is in test_protocol.py.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["COSTLY", "GOOD", "GROUPS", "Case", "cases"]

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
GENERATING = (CHAT, COMPLETIONS, GENERATE)

GOOD: Mapping[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    COMPLETIONS: {"prompt": "a", "max_tokens": 2},
    GENERATE: {"prompt": "a", "max_tokens": 2},
    TOKENIZE: {"prompt": "a"},
    DETOKENIZE: {"tokens": [1]},
}
"""A body that each endpoint takes; the cases differ from it in one thing."""


@dataclass(frozen=True)
class Case:
    """A request to refuse. ``blamed`` is the field that the error must name."""

    name: str
    path: str
    body: bytes
    blamed: str | None = None
    headers: Mapping[str, str | bytes] = field(default_factory=dict)
    status: Sequence[int] = (400,)


def cases(group: str) -> list[Case]:
    """The cases of a group, in order."""
    return list(GROUPS[group]())


def _case(name: str, path: str, changes: Mapping[str, Any], blamed: str | None = None) -> Case:
    return Case(name, path, json.dumps({**GOOD[path], **changes}).encode(), blamed)


def _raw(name: str, path: str, key: str, value: str, blamed: str | None = None) -> Case:
    """A case whose value is JSON text that Python would not write."""
    others = json.dumps({k: v for k, v in GOOD[path].items() if k != key})
    text = f'{others[:-1]}{", " if len(others) > 2 else ""}"{key}": {value}}}'
    return Case(name, path, text.encode(), blamed)


# ---------------------------------------------------------------------------------- wrong types

_NO_NUMBER: Sequence[Any] = ("1", True, [1], {"a": 1})
_NO_BOOL: Sequence[Any] = ("true", 1, [True], {})
_NO_TEXT: Sequence[Any] = (1, True, ["a"], {"a": "b"})
_NO_OBJECT: Sequence[Any] = (1, True, [])
_NO_LIST: Sequence[Any] = (1, True, {"a": 1})

_WRONG: Mapping[str, Sequence[Any]] = {
    "model": _NO_TEXT,
    "stream": _NO_BOOL,
    "stream_options": (*_NO_OBJECT, "a", {"include_usage": 1}, {"a": 1}),
    "temperature": _NO_NUMBER,
    "top_p": _NO_NUMBER,
    "top_k": (*_NO_NUMBER, 1.5),
    "min_p": _NO_NUMBER,
    "presence_penalty": _NO_NUMBER,
    "frequency_penalty": _NO_NUMBER,
    "repetition_penalty": _NO_NUMBER,
    "logit_bias": (*_NO_OBJECT, "a", {"1": "1"}, {"1": None}, {"1": True}),
    "seed": (*_NO_NUMBER, 0.5),
    "stop": (1, True, {"a": 1}, [1], [None], [[]], [""]),
    "stop_token_ids": (*_NO_LIST, "a", ["1"], [True], [1.5], [None], [[1]]),
    "bad_words": (*_NO_LIST, "a", [1], [None], [""]),
    "min_tokens": (*_NO_NUMBER, 1.5),
    "ignore_eos": _NO_BOOL,
    "skip_special_tokens": _NO_BOOL,
    "include_stop_str_in_output": _NO_BOOL,
    "guided_json": (1, True, []),
    "guided_regex": _NO_TEXT,
    "guided_choice": (*_NO_LIST, "a", [1], [None]),
    "guided_grammar": _NO_TEXT,
    "structured_outputs": (*_NO_OBJECT, "a", {"regex": 1}, {"choice": "a"}, {"a": 1}),
    "user": _NO_TEXT,
    "max_tokens": (*_NO_NUMBER, 1.5),
}
_WRONG_CHAT: Mapping[str, Sequence[Any]] = {
    "messages": (*_NO_LIST, "a", None, [1], ["a"], [None], [[]], [{}]),
    "max_completion_tokens": (*_NO_NUMBER, 1.5),
    "n": (*_NO_NUMBER, 1.5),
    "logprobs": _NO_BOOL,
    "top_logprobs": (*_NO_NUMBER, 1.5),
    "response_format": (
        *_NO_OBJECT,
        "json_object",
        {},
        {"type": 1},
        {"type": "json_object", "a": 1},
    ),
    "tools": (*_NO_LIST, "a", [1], ["a"], [[]], [None], [{}]),
    "tool_choice": (1, True, []),
    "parallel_tool_calls": _NO_BOOL,
    "add_generation_prompt": _NO_BOOL,
    "chat_template_kwargs": (*_NO_OBJECT, "a"),
    "reasoning_effort": _NO_TEXT,
    "enable_thinking": _NO_BOOL,
    "include_reasoning": _NO_BOOL,
    "store": ("false", 1, True, {}),
    "metadata": (*_NO_OBJECT, "a", {"a": 1}, {"a": None}),
    "service_tier": (1, True, "flex"),
    "modalities": (1, "text", ["audio"], [1]),
}
_WRONG_COMPLETIONS: Mapping[str, Sequence[Any]] = {
    "prompt": (
        1,
        True,
        None,
        {"a": 1},
        [None],
        [True],
        [1.5],
        ["a", 1],
        [1, "a"],
        [[1], "a"],
        [["a"]],
    ),
    "n": (*_NO_NUMBER, 1.5),
    "best_of": (*_NO_NUMBER, 1.5),
    "echo": _NO_BOOL,
    "logprobs": (*_NO_NUMBER, 1.5),
    "response_format": (*_NO_OBJECT, "text", {"type": "xml"}),
    "suffix": (1, True, "a"),
    "add_special_tokens": _NO_BOOL,
}
_WRONG_GENERATE: Mapping[str, Sequence[Any]] = {
    "prompt": _NO_TEXT,
    "return_logprob": _NO_BOOL,
}
_WRONG_TOKENIZE: Mapping[str, Sequence[Any]] = {
    "model": _NO_TEXT,
    "prompt": _NO_TEXT,
    "add_special_tokens": _NO_BOOL,
    "add_generation_prompt": _NO_BOOL,
}
_WRONG_DETOKENIZE: Mapping[str, Sequence[Any]] = {
    "model": _NO_TEXT,
    "tokens": (*_NO_LIST, "a", None, ["1"], [True], [1.5], [None], [[1]]),
    "skip_special_tokens": _NO_BOOL,
}


def _wrong_types() -> Iterator[Case]:
    tables = (
        *((path, _WRONG) for path in GENERATING),
        (CHAT, _WRONG_CHAT),
        (COMPLETIONS, _WRONG_COMPLETIONS),
        (GENERATE, _WRONG_GENERATE),
        (TOKENIZE, _WRONG_TOKENIZE),
        (DETOKENIZE, _WRONG_DETOKENIZE),
    )
    for path, table in tables:
        for name, values in table.items():
            for value in values:
                yield _case(f"{name}={json.dumps(value)}", path, {name: value}, name)
    for value in (*_NO_LIST, "a", ["a"], [True], [1.5]):
        body = {"input_ids": value, "max_tokens": 2}
        yield Case(f"input_ids={value}", GENERATE, json.dumps(body).encode(), "input_ids")
    for value in (*_NO_LIST, "a", [1], [{}]):
        yield Case(
            f"messages={value}", TOKENIZE, json.dumps({"messages": value}).encode(), "messages"
        )


# --------------------------------------------------------------------------------- out of range

_NO_JSON_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400")
_HUGE = "9" * 4000
_TOO_HUGE = "9" * 5000  # Python reads no integer of so many digits

_RANGES: Mapping[str, Sequence[Any]] = {
    "temperature": (-0.1, 2.1, -(10**30), 10**30),
    "top_p": (-0.1, 1.1, 10**30),
    "top_k": (-2, 2**31 + 1, 10**30),
    "min_p": (-0.1, 1.1),
    "presence_penalty": (-2.1, 2.1),
    "frequency_penalty": (-2.1, 2.1),
    "repetition_penalty": (0, -1, 101),
    "logit_bias": ({"1": 101}, {"1": -101}, {"-1": 1}, {"258": 1}, {"a": 1}, {"": 1}, {"1.5": 1}),
    "seed": (2**63, -(2**63) - 1, 10**30),
    "stop_token_ids": ([-1], [258], [2**31], [10**30]),
    "min_tokens": (-1, -(10**30)),
    "max_tokens": (-1, -(10**30)),
}
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_MODELS = ("", "other", "tiny\u0000", "a" * 10_000, "\ud800")
_INTEGERS = ("top_k", "seed", "min_tokens", "max_tokens")


def _ranges() -> Iterator[Case]:
    for path in GENERATING:
        for name, value in ((key, value) for key in _RANGES for value in _RANGES[key]):
            yield _case(f"{name}={str(value)[:40]!r}", path, {name: value}, name)
        for model in _MODELS:
            body = json.dumps({**GOOD[path], "model": model}).encode()
            yield Case(f"model={model[:40]!r}", path, body, "model", status=(404,))
        yield from _no_numbers(path)
    for n in (0, -1, 129, 10**9, 10**30):
        for path, name in ((CHAT, "n"), (COMPLETIONS, "n"), (COMPLETIONS, "best_of")):
            yield _case(f"{name}={n}", path, {name: n}, name)
    for value in (-1, 21, 10**30):
        likely = {"logprobs": True, "top_logprobs": value}
        yield _case(f"top_logprobs={value}", CHAT, likely, "top_logprobs")
        yield _case(f"logprobs={value}", COMPLETIONS, {"logprobs": value}, "logprobs")
    for path, name in (
        *((path, "max_tokens") for path in GENERATING),
        (CHAT, "max_completion_tokens"),
    ):
        yield _case(f"{name}=0", path, {name: 0}, name)
    for ids in ([-1], [258], [2**31], [10**30]):
        yield _case(f"prompt={ids}", COMPLETIONS, {"prompt": ids}, "prompt")
        yield _case(f"prompt=[{ids}]", COMPLETIONS, {"prompt": [ids]}, "prompt")
        yield Case(f"input_ids={ids}", GENERATE, json.dumps({"input_ids": ids}).encode())
        yield _case(f"tokens={ids}", DETOKENIZE, {"tokens": ids}, "tokens")


def _no_numbers(path: str) -> Iterator[Case]:
    for name in (*_FLOATS, *_INTEGERS):
        for value in _NO_JSON_NUMBERS:
            yield _raw(f"{name}={value}", path, name, value, name)
        yield _raw(f"{name}=-9...", path, name, f"-{_HUGE}", name)
        yield _raw(f"{name}=9....", path, name, _TOO_HUGE)
    for value in (*_NO_JSON_NUMBERS, _HUGE):
        yield _raw(f"logit_bias {value[:9]}", path, "logit_bias", f'{{"1": {value}}}', "logit_bias")
        yield _raw(f"stop ids {value[:9]}", path, "stop_token_ids", f"[{value}]", "stop_token_ids")
    yield _case("logit_bias of 9...", path, {"logit_bias": {_HUGE: 1}}, "logit_bias")


# -------------------------------------------------------------------------------- empty and long


def _empty_and_long() -> Iterator[Case]:
    for prompt in ("", [], [[]], [""], [[1], []], ["a", ""]):
        yield _case(f"prompt={prompt}", COMPLETIONS, {"prompt": prompt}, "prompt")
    yield _case("prompt=''", GENERATE, {"prompt": ""}, "prompt")
    yield Case("input_ids=[]", GENERATE, b'{"input_ids": []}')
    yield _case("messages=[]", CHAT, {"messages": []}, "messages")
    yield Case("messages=[]", TOKENIZE, b'{"messages": []}', "messages")
    long = "a" * 20_000
    for path in (COMPLETIONS, GENERATE):
        yield _case("long", path, {"prompt": long}, "prompt")
        yield _case("very long", path, {"prompt": "a b " * 1_000_000}, "prompt")
        yield _case("stream", path, {"prompt": long, "stream": True}, "prompt")
    yield _case("long", CHAT, {"messages": [{"role": "user", "content": long}]}, "prompt")
    yield _case(
        "very long", CHAT, {"messages": [{"role": "user", "content": long * 150}]}, "prompt"
    )
    yield _case("one of two", COMPLETIONS, {"prompt": ["a", long]}, "prompt")
    yield _case("ids", COMPLETIONS, {"prompt": [1] * 20_000}, "prompt")
    yield _case("many ids", COMPLETIONS, {"prompt": [1] * 400_000}, "prompt")
    yield _case(
        "many ids, the last is none", COMPLETIONS, {"prompt": [1] * 400_000 + ["a"]}, "prompt"
    )
    yield _case("many prompts", COMPLETIONS, {"prompt": ["a"] * 100_000}, "prompt")
    yield _case("many lists", COMPLETIONS, {"prompt": [[1]] * 200_000}, "prompt")
    yield _case("129 prompts", COMPLETIONS, {"prompt": ["a"] * 129}, "prompt")
    yield _case("2 prompts, n=65", COMPLETIONS, {"prompt": ["a", "b"], "n": 65}, "n")
    yield _case("many ids", GENERATE, {"prompt": None, "input_ids": [1] * 400_000})
    yield _case("many wrong tokens", DETOKENIZE, {"tokens": ["a"] * 300_000}, "tokens")
    yield _case(
        "many tokens, the last is none", DETOKENIZE, {"tokens": [1] * 200_000 + [258]}, "tokens"
    )
    yield _case("many messages", CHAT, {"messages": GOOD[CHAT]["messages"] * 50_000}, "messages")
    yield _case("many wrong messages", CHAT, {"messages": [1] * 300_000}, "messages")
    yield _case(
        "many parts", CHAT, {"messages": [{"role": "user", "content": [1] * 300_000}]}, "messages"
    )
    yield _case(
        "many calls",
        CHAT,
        {"messages": [{"role": "user", "tool_calls": [1] * 300_000}]},
        "messages",
    )
    yield _case("many tools", CHAT, {"tools": [_tool(f"f{i}") for i in range(129)]}, "tools")
    yield _case("many wrong tools", CHAT, {"tools": [1] * 300_000}, "tools")
    yield _case("metadata", CHAT, {"metadata": {str(i): 1 for i in range(100_000)}}, "metadata")
    yield _case(
        "a long role", CHAT, {"messages": [{"role": "a" * 100_000, "content": "a"}]}, "messages"
    )
    for path in GENERATING:
        yield _case("stops", path, {"stop": ["a"] * 17}, "stop")
        yield _case("many stops", path, {"stop": ["a"] * 300_000}, "stop")
        yield _case("many wrong stops", path, {"stop": [1] * 300_000}, "stop")
        yield _case("a long stop", path, {"stop": "a" * 300_000}, "stop")
        yield _case("a long stop in a list", path, {"stop": ["a" * 300_000]}, "stop")
        yield _case("bias", path, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias")
        yield _case(
            "much bias", path, {"logit_bias": {str(i): 1 for i in range(100_000)}}, "logit_bias"
        )
        yield _case(
            "wrong bias", path, {"logit_bias": {str(i): "a" for i in range(100_000)}}, "logit_bias"
        )
        yield _case("stop ids", path, {"stop_token_ids": [1] * 1025}, "stop_token_ids")
        yield _case("bad words", path, {"bad_words": ["a"] * 65}, "bad_words")
        yield _case("a long bad word", path, {"bad_words": ["a" * 100_000]}, "bad_words")
        yield _case("unknown names", path, {f"x{i}": 1 for i in range(100_000)})
        yield _case("an unknown long name", path, {"x" * 100_000: 1}, "x")


# ----------------------------------------------------------------------------------------- text

_SURROGATES = ('"\\ud800"', '"a\\udfff"', '"\\udc00\\ud800"')


def _texts() -> Iterator[Case]:
    for text in _SURROGATES:
        for path in (COMPLETIONS, GENERATE, TOKENIZE):
            yield _raw(f"prompt={text}", path, "prompt", text)
        yield _raw(f"prompt=[{text}]", COMPLETIONS, "prompt", f"[{text}]")
        yield _raw(f"content={text}", CHAT, "messages", f'[{{"role": "user", "content": {text}}}]')
        yield _raw(
            f"role={text}", CHAT, "messages", f'[{{"role": {text}, "content": "a"}}]', "messages"
        )
        part = f'[{{"role": "user", "content": [{{"type": "text", "text": {text}}}]}}]'
        yield _raw(f"part={text}", CHAT, "messages", part)
        for path in GENERATING:
            yield _raw(f"guided_regex={text}", path, "guided_regex", text, "guided_regex")
            yield _raw(f"guided_choice={text}", path, "guided_choice", f"[{text}]", "guided_choice")
            yield _raw(f"guided_grammar={text}", path, "guided_grammar", text, "guided_grammar")
            yield _raw(f"bad_words={text}", path, "bad_words", f"[{text}]")
            yield _raw(f"{text}=1", path, text[1:-1], "1")
    for path, good in GOOD.items():
        text = json.dumps(good).encode()
        wrong_bytes = (b"\xff", b"\xc3\x28", b"\xed\xa0\x80"[:2], b"\xf8\x88\x80\x80\x80", b"\x80")
        for number, wrong in enumerate(wrong_bytes):
            yield Case(f"no UTF-8 {number}", path, text[:-1] + b', "user": "' + wrong + b'"}')
        yield Case("latin-1", path, text[:-1] + ', "user": "\u00e9"}'.encode("latin-1"))
        yield Case("BOM in the middle", path, b"  \xef\xbb\xbf" + text)
        yield Case("two BOMs", path, b"\xef\xbb\xbf\xef\xbb\xbf" + text)
        yield Case("half UTF-16", path, text.decode().encode("utf-16-le")[:-1])
        yield Case("NUL", path, text + b"\x00")
        yield Case("control characters", path, text[:-1] + b', "user": "\n\x01"}')
        yield Case("random bytes", path, bytes((i * 89 + 7) % 256 for i in range(1000)))


# --------------------------------------------------------------------------------------- syntax


# fmt: off
_NO_OBJECTS = (
    "null", "true", "1", '"a"', "[]", "[{}]", "{", "}", "[", "{}{}", "nul", "'a'", "{a:1}", "<a/>",
    '{"a":}', '{"a"1}', '{"a":1,}', '{1:"a"}', "{'prompt':'a'}", "a=b", "undefined", "NaN", "-",
    "0x10", "01", "[1,2", '"\\x"', '{"a":1}}', '{"a":1,,"b":2}', '{"a":.5}', '{"a":1.}',
    '{"a":+1}', '{"a":1e}', "", " ", "// a\n{}",
)
# fmt: on


def _syntax() -> Iterator[Case]:
    for path, good in GOOD.items():
        text = json.dumps(good)
        for body in _NO_OBJECTS:
            yield Case(f"{body!r}", path, body.encode())
        for part in (0.25, 0.5, 0.75):
            yield Case(f"truncated at {part}", path, text[: int(len(text) * part)].encode())
        yield Case("truncated at the end", path, text[:-1].encode())
        yield Case("twice", path, (text * 2).encode())
        yield Case("followed by a word", path, f"{text} and".encode())
        yield Case("in a list", path, f"[{text}]".encode())
        yield Case("in a string", path, json.dumps(text).encode())
        name = next(iter(good))
        twice = f'{{"{name}": {json.dumps(good[name])}, "{name}": 7}}'  # the last one counts
        yield Case("a duplicate key", path, twice.encode(), name)
        yield Case("no fields", path, b"{}")
        yield Case("gzip", path, gzip.compress(text.encode()), headers={"Content-Encoding": "gzip"})
        yield Case("many braces", path, b"{" * 300_000)
        yield Case("many brackets", path, b"[" * 300_000)
        yield Case("many quotes", path, b'"' * 1_000_001)


# ------------------------------------------------------------------------------------ deep JSON

_DEPTHS = (10, 300, 1000, 100_000)


def _deep(depth: int) -> Iterator[tuple[str, str]]:
    yield f"{depth} lists", "[" * depth + "1" + "]" * depth
    yield f"{depth} objects", '{"a":' * depth + "1" + "}" * depth


def _depths() -> Iterator[Case]:
    for depth in _DEPTHS:
        for name, text in _deep(depth):
            for path in GOOD:
                yield Case(name, path, text.encode())
                yield _raw(f"unknown: {name}", path, "unknown", text)
            for key in (
                "messages",
                "metadata",
                "logit_bias",
                "stop",
                "response_format",
                "modalities",
            ):
                yield _raw(f"{key}: {name}", CHAT, key, text)
            yield _raw(f"tools: {name}", CHAT, "tools", f"[{text}]")
            yield _raw(
                f"a tool: {name}", CHAT, "tools", f'[{{"type": "function", "function": {text}}}]'
            )
            kwargs = f'{{"messages": {text}}}'  # which is reserved
            yield _raw(f"kwargs: {name}", CHAT, "chat_template_kwargs", kwargs)
            yield _raw(f"choice: {name}", CHAT, "tool_choice", f'{{"type": {text}}}')
            yield _raw(
                f"choice in text: {name}", CHAT, "tool_choice", json.dumps(text), "tool_choice"
            )
            yield _raw(f"guided_json: {name}", COMPLETIONS, "guided_json", f'{{"not": {text}}}')
            yield _raw(f"prompt: {name}", COMPLETIONS, "prompt", f"[{text}]")
            yield _raw(f"tokens: {name}", DETOKENIZE, "tokens", f"[{text}]")
            calls = f'[{{"role": "assistant", "tool_calls": [{{"function": {text}}}]}}]'
            yield _raw(f"calls: {name}", CHAT, "messages", calls)
            part = f'[{{"role": "user", "content": [{{"type": "x", "x": {text}}}]}}]'
            yield _raw(f"part: {name}", CHAT, "messages", part)
    for depth in _DEPTHS[1:]:
        for name, text in _deep(depth):
            schema = f'{{"name": "a", "schema": {{"not": {text}}}}}'
            form = f'{{"type": "json_schema", "json_schema": {schema}}}'
            yield _raw(f"schema: {name}", CHAT, "response_format", form)
            yield _raw(f"schema in text: {name}", COMPLETIONS, "guided_json", json.dumps(text))
            tool = f'[{{"type": "function", "function": {{"name": "f", "parameters": {text}}}}}]'
            if depth > 300 or text[0] == "[":
                yield _raw(f"parameters: {name}", CHAT, "tools", tool)
            required = f'{tool}, "tool_choice": "required"'
            yield _raw(f"forced: {name}", CHAT, "tools", required)


# ---------------------------------------------------------------------------------- constraints

# fmt: off
_REGEXES = (
    "", "(", ")", "[", "*", "a{2,1}", "a{", "(?P<a>", "\\", "(?<=a)b", "(?=a)", "a(?!b)", "\\1",
    "(a+)\\1", "[z-a]", "(?i", "\\p{Nope}", "(?>a)", "\\Qa",
    "(" * 3000 + "a" + ")" * 3000, "(" * 30_000,
)
# fmt: on
_GRAMMARS = (
    *("", "start:", "start: x", "start: start", "a: b", "root ::= 'a'", 'start: "a', "start: /(/"),
    *('start: start "a"', "start: %json {", "start: @nope", "%import common.NOPE\nstart: NOPE"),
    *("start", "{}", "start: <[999999]>", "start: " + "(" * 5000),
)
_SCHEMAS: Sequence[Any] = (
    {"type": "nope"},
    {"type": 7},
    {"type": ["string", "nope"]},
    {"$ref": "#/nope"},
    {"$ref": "http://127.0.0.1:1/schema.json"},
    {"$ref": "file:///etc/passwd"},
    {"type": "string", "pattern": "("},
    {"type": "string", "minLength": 5, "maxLength": 2},
    {"type": "string", "minLength": -1},
    {"type": "string", "format": "nope"},
    {"type": "integer", "minimum": 5, "maximum": 2},
    {"type": "array", "items": 7},
    {"type": "array", "minItems": 5, "maxItems": 2},
    {"type": "object", "properties": 7},
    {"type": "object", "properties": {"a": 7}},
    {"type": "object", "required": "a"},
    {"enum": []},
    {"anyOf": []},
    {"not": {}},
    {"if": {}, "then": {}, "else": {}},
    {"patternProperties": {"(": {}}},
    {"x-guidance": {}},
    {"x-guidance": 7},
    False,
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
)


def _constraints() -> Iterator[Case]:
    for path in GENERATING:
        yield from _guided(path)
    for path in (CHAT, COMPLETIONS):
        yield from _forms(path)
    for schema in _SCHEMAS:
        yield _case(f"schema {schema}", COMPLETIONS, {"structured_outputs": {"json": schema}})
    for depth in (10, 100, 1000):
        patterns: list[Any] = [{"pattern": f"^({'a|' * i}b)*c{{{i}}}$"} for i in range(depth)]
        yield _case(
            f"{depth} ways", CHAT, {"guided_json": {"anyOf": [*patterns, 7]}}, "guided_json"
        )


def _guided(path: str) -> Iterator[Case]:
    limit = "a" * 70_000
    for regex in (*_REGEXES, limit):
        yield _case(f"regex {regex[:40]!r}", path, {"guided_regex": regex}, "guided_regex")
    for grammar in (*_GRAMMARS, limit):
        yield _case(
            f"grammar {grammar[:40]!r}", path, {"guided_grammar": grammar}, "guided_grammar"
        )
    for choice in ([], [""], ["a", ""], [limit], ["a"] * 30_000):
        yield _case(f"choice {str(choice)[:40]}", path, {"guided_choice": choice}, "guided_choice")
    for text in ("", "{", "[]", "7", "true", "null", '"a"', "{'a': 1}", '{"type": "nope"}', "{}}"):
        yield _case(f"json {text}", path, {"guided_json": text}, "guided_json")
    two = {"guided_regex": "a", "guided_choice": ["a"]}
    yield _case("two constraints", path, two, "guided_choice")
    for structured in (
        {"regex": "a", "choice": ["a"]},
        {"regex": "("},
        {"json": "{"},
        {"choice": []},
    ):
        change = {"structured_outputs": structured}
        yield _case(f"structured {structured}", path, change, "structured_outputs")


def _forms(path: str) -> Iterator[Case]:
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(10_000)}}
    for schema in (*_SCHEMAS, wide):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        name = f"schema {str(schema)[:60]}"
        yield _case(name, path, {"response_format": form}, "response_format")
    for wrong in (
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {}},
        {"type": "json_schema", "json_schema": {"name": "a"}},
        {"type": "json_schema", "json_schema": {"schema": {}, "other": 1}},
        {"type": "json_schema", "json_schema": 7},
        {"type": "regex_schema"},
        {"type": "regex_schema", "regex_schema": ""},
        {"type": "grammar", "grammar": "start: /a/"},
        {"type": "JSON"},
    ):
        yield _case(f"form {wrong}", path, {"response_format": wrong}, "response_format")
    both = {"response_format": {"type": "json_object"}, "guided_regex": "a"}
    yield _case("a form and a regex", path, both, "response_format")


COSTLY = (
    *({"guided_regex": regex} for regex in ("a{1000000}", "(a{1000}){1000}", "(.*a){3000}")),
    *({"guided_regex": regex} for regex in ("((((a{99}){99}){99}){99})", "(a|b|ab)*c{500000}")),
    {"guided_regex": "&".join(f"(.*a.{{{i}}}b)" for i in range(40))},
    {"guided_grammar": "start: x{1000000}\nx: /a/"},
    {"guided_grammar": 'start: a\na: a a | "x" | ""'},
    {"guided_grammar": "start: " + " & ".join(f"/(.*a.{{{i}}}b.*)/" for i in range(1, 60))},
    {"guided_json": {"type": "array", "minItems": 10**9, "items": {"type": "string"}}},
    {"guided_json": {"type": "string", "pattern": "^(a|aa)+$", "minLength": 100_000}},
    {"guided_json": {"allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(40)]}},
)
"""Constraints that are well-formed and may cost much: they are followed, or refused."""


# ----------------------------------------------------------------------------- parameters, tools


def _tool(name: Any, **parts: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **parts}}


_MESSAGES: Sequence[Any] = (
    {"content": "a"},
    {"role": "user"},
    {"role": "user", "content": None},
    {"role": "", "content": "a"},
    {"role": "wizard", "content": "a"},
    {"role": "USER", "content": "a"},
    {"role": 7, "content": "a"},
    {"role": "user", "content": 7},
    {"role": "user", "content": {"text": "a"}},
    {"role": "user", "content": ["a"]},
    {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}],
    },
    {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": [{"type": "text", "text": 7}]},
    {"role": "user", "content": [{"text": "a"}]},
    {"role": "user", "content": [{}]},
    {"role": "user", "content": "a", "name": 7},
    {"role": "tool", "content": "a"},
    {"role": "tool", "content": "a", "tool_call_id": 7},
    {"role": "user", "content": "a", "tool_calls": [_tool("f", arguments="{}")]},
    {"role": "assistant", "tool_calls": [7]},
    {"role": "assistant", "tool_calls": [{}]},
    {"role": "assistant", "tool_calls": [{"function": 7}]},
    {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
    {"role": "assistant", "tool_calls": [_tool("f", arguments="{")]},
    {"role": "assistant", "tool_calls": [_tool("f", arguments="[]")]},
    {"role": "assistant", "tool_calls": [_tool("f", arguments=7)]},
    {"role": "assistant", "tool_calls": [_tool("f", arguments="[" * 100_000)]},
    {"role": "assistant", "tool_calls": {}},
)
_TOOLS: Sequence[Any] = (
    {"type": "retrieval"},
    {"type": "function"},
    {"type": "function", "function": 7},
    {"type": "function", "function": {}},
    {"function": {"name": "f"}},
    _tool(7),
    _tool(""),
    _tool("a b"),
    _tool("a" * 65),
    _tool("\ud800"),
    _tool("f\n"),
    _tool("f", description=7),
    _tool("f", parameters=7),
    _tool("f", parameters=[]),
    _tool("f", parameters={"type": "string"}),
)
_CHOICES: Sequence[Any] = (
    "",
    "sometimes",
    "f",
    {},
    {"type": "function"},
    {"type": "function", "function": {}},
    {"type": "function", "function": {"name": 7}},
    {"type": "function", "function": {"name": "g"}},
    {"type": "function", "function": {"name": ["f"]}},
    {"type": "function", "function": "f"},
    {"type": "tool", "function": {"name": "f"}},
    {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
)


def _parameters() -> Iterator[Case]:
    for path in GOOD:
        for name in (
            "maxtokens",
            "Temperature",
            "",
            " ",
            "__proto__",
            "functions",
            "prediction",
            "a\nb",
            "$where",
        ):
            yield _case(f"unknown {name!r}", path, {name: 1}, name.strip() or None)
    for message in _MESSAGES:
        yield _case(f"message {str(message)[:60]}", CHAT, {"messages": [message]}, "messages")
        two = [{"role": "user", "content": "a"}, message]
        yield _case(f"second message {str(message)[:60]}", CHAT, {"messages": two}, "messages")
        yield Case(
            f"message {str(message)[:60]}",
            TOKENIZE,
            json.dumps({"messages": [message]}).encode(),
            "messages",
        )
    for tool in _TOOLS:
        yield _case(f"tool {str(tool)[:60]}", CHAT, {"tools": [tool]}, "tools")
        yield _case(f"second tool {str(tool)[:60]}", CHAT, {"tools": [_tool("f"), tool]}, "tools")
    yield _case("the same tool twice", CHAT, {"tools": [_tool("f"), _tool("f")]}, "tools")
    for choice in _CHOICES:
        for tools in ([], [_tool("f")]):
            change = {"tools": tools, "tool_choice": choice}
            yield _case(f"choice {choice} of {len(tools)}", CHAT, change, "tool_choice")
    yield _case("required of none", CHAT, {"tool_choice": "required"}, "tool_choice")
    for schema in (
        {"type": "object", "properties": 7},
        {"type": "object", "properties": {"a": {"type": "nope"}}},
    ):
        tools = {"tools": [_tool("f", parameters=schema)], "tool_choice": "required"}
        yield _case(f"a required call by {schema}", CHAT, tools, "tools")
    forced = {
        "tools": [_tool("f")],
        "tool_choice": "required",
        "response_format": {"type": "json_object"},
    }
    yield _case("a call and a form", CHAT, forced, "tool_choice")
    for name in ("messages", "tools", "documents", "add_generation_prompt"):
        yield _case(
            f"kwargs {name}", CHAT, {"chat_template_kwargs": {name: 1}}, "chat_template_kwargs"
        )


def _conflicts() -> Iterator[Case]:
    yield _case(
        "lengths differ",
        CHAT,
        {"max_tokens": 2, "max_completion_tokens": 3},
        "max_completion_tokens",
    )
    yield _case("top_logprobs alone", CHAT, {"top_logprobs": 2}, "top_logprobs")
    for path in GENERATING:
        yield _case(
            "options of no stream",
            path,
            {"stream_options": {"include_usage": True}},
            "stream_options",
        )
    yield _case("best_of below n", COMPLETIONS, {"n": 3, "best_of": 2}, "best_of")
    yield _case("best_of streams", COMPLETIONS, {"best_of": 2, "stream": True}, "best_of")
    yield _case("too many best_of", COMPLETIONS, {"best_of": 1000}, "best_of")
    yield _case("two inputs", GENERATE, {"input_ids": [1]}, "input_ids")
    yield Case("no input", GENERATE, b'{"max_tokens": 2}', "input_ids")
    yield Case(
        "two inputs",
        TOKENIZE,
        b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}',
        "messages",
    )
    yield Case("no prompt", COMPLETIONS, b'{"max_tokens": 2}', "prompt")
    yield Case("no messages", CHAT, b'{"max_tokens": 2}', "messages")
    yield Case("no tokens", DETOKENIZE, b'{"skip_special_tokens": true}', "tokens")


# -------------------------------------------------------------------------------------- headers

_TYPES = (
    *(
        "",
        "text/plain",
        "text/json",
        "application/xml",
        "application/x-www-form-urlencoded",
        "json",
        "*/*",
    ),
    *(
        "multipart/form-data",
        "multipart/form-data; boundary=x",
        "application/octet-stream",
        "image/png",
        "\u00ff",
    ),
    *("application/json-patch", "application", ";", "application/jsonp; charset=utf-8", "a" * 5000),
)


def _headers() -> Iterator[Case]:
    for path, good in GOOD.items():
        body = json.dumps(good).encode()
        for kind in _TYPES:
            headers = {"Content-Type": kind.encode("latin-1")}
            yield Case(f"type {kind[:40]!r}", path, body, headers=headers)
        for coding in ("gzip", "br", "zstd", "deflate"):
            yield Case(coding, path, b"\x1f\x8b" + body, headers={"Content-Encoding": coding})
        for method in ("X-HTTP-Method-Override", "X-Original-URL", "X-Forwarded-Host"):
            yield Case(
                method, path, b"{", headers={method: "GET /v1/models \u00ff".encode("latin-1")}
            )
        yield Case("a long header", path, body, headers={"X": "a" * 100_000}, status=(431,))
        yield Case("a long cookie", path, body, headers={"Cookie": "a=b;" * 40_000}, status=(431,))
        many = {f"X-{i}": "a" * 50 for i in range(2000)}
        yield Case("many headers", path, body, headers=many, status=(431,))
        yield Case("a bad id", path, b"{", headers={"X-Request-Id": b"\xff\xfe"})


GROUPS = {
    "wrong types": _wrong_types,
    "out of range": _ranges,
    "empty and long": _empty_and_long,
    "texts": _texts,
    "syntax": _syntax,
    "deep": _depths,
    "constraints": _constraints,
    "parameters": _parameters,
    "conflicts": _conflicts,
    "headers": _headers,
}
