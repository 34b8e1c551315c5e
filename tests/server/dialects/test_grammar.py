"""Grammars of forced calls, matched by llguidance over bytes and special tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from kvant.server.dialects import Dialect, check_tools, dialect_of
from tests.server.dialects.samples import QWEN_THINKING, calls, read, tool

SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "maximum": 99}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Köln", "a\\b"]}},
}
TOOLS = [tool("get_weather", SCHEMA), tool("get"), tool("get_time", {})]
MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


class Bytes:
    """A byte is a token; after them come the end token and special ones."""

    eos_token_id = 256
    bos_token_id = None

    def __init__(self, special: Sequence[str] = ()) -> None:
        self.special = dict(zip(special, range(257, 300), strict=False))
        texts = ["<eos>", *special]
        self.tokens = [bytes([i]) for i in range(256)] + [text.encode() for text in texts]
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        while text:
            marker = next((m for m in self.special if text.startswith(m)), None)
            ids += list(text[0].encode()) if marker is None else [self.special[marker]]
            text = text[len(marker or "_") :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.tokens[i] for i in ids if i != self.eos_token_id).decode()


def grammar(
    dialect: Dialect, choice: Any = "required", parallel: bool = True, prompt: str = ""
) -> str:
    found = dialect.response_format(prompt, check_tools(TOOLS, choice, parallel))
    assert found is not None
    assert found["type"] == "grammar"
    return str(LLMatcher.grammar_from_lark(found["grammar"]))


def matcher(tokenizer: Bytes, text: str) -> LLMatcher:
    wrapped = LLTokenizer(TokenizerWrapper(tokenizer), slices=[])
    assert LLMatcher.validate_grammar(text, wrapped) == ""
    return LLMatcher(wrapped, text)


def accepts(text: str, grammar: str, special: Sequence[str] = ()) -> bool:
    tokenizer = Bytes(special)
    found = matcher(tokenizer, grammar)
    ids = tokenizer.encode(text)
    return found.try_consume_tokens(ids) == len(ids) and bool(found.is_accepting())


def written(name: str, *texts: str) -> str:
    """Calls as a dialect writes them."""
    if name == "llama3":
        return "; ".join(text.replace('"arguments"', '"parameters"') for text in texts)
    if name == "smollm2":
        return f"<tool_call>[{', '.join(texts)}]</tool_call>"
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


GOOD = [
    '{"name": "get_weather", "arguments": {"city": "Köln"}}',
    '{"name": "get_weather", "arguments": {"city": "a\\\\b", "days": -3}}',
    '{"name": "get", "arguments": {}}',
    '{"name": "get", "arguments": {"any": [1.5e3, {"}": "\\" } é 😀"}, null, true]}}',
    '{"name": "get_time", "arguments": {"x": {}}}',
]
BAD = [
    '{"name": "get_weather", "arguments": {}}',
    '{"name": "get_weather", "arguments": {"city": "Rom"}}',
    '{"name": "get_weather", "arguments": {"city": "Köln", "days": 1.5}}',
    '{"name": "get_wind", "arguments": {}}',
    '{"name": "get", "arguments": []}',
    '{"name": "get"}',
    "No.",
    "",
]


@pytest.mark.parametrize("special", [(), MARKERS], ids=["text", "special"])
@pytest.mark.parametrize("name", ["hermes", "llama3", "smollm2"])
def test_calls_that_are_required(name: str, special: Sequence[str]) -> None:
    dialect = dialect_of("", name, lambda text: text in special)
    rules = grammar(dialect)
    for text in GOOD:
        assert accepts(written(name, text), rules, special), text
    assert accepts(written(name, *GOOD), rules, special)
    for text in BAD:
        assert not accepts(written(name, text), rules, special), text
    assert not accepts("Hi " + written(name, GOOD[0]), rules, special)
    assert not accepts(written(name, GOOD[0]) + " Hi", rules, special)


@pytest.mark.parametrize("name", ["hermes", "llama3", "smollm2"])
def test_one_call_or_one_tool(name: str) -> None:
    dialect = dialect_of("", name)
    single = grammar(dialect, parallel=False)
    assert accepts(written(name, GOOD[0]), single)
    assert not accepts(written(name, GOOD[0], GOOD[2]), single)
    named = grammar(dialect, {"type": "function", "function": {"name": "get"}})
    assert [accepts(written(name, text), named) for text in GOOD] == [False] * 2 + [True] * 2 + [
        False
    ]
    assert not accepts(written(name, GOOD[2], GOOD[2]), named)


@pytest.mark.parametrize("special", [(), MARKERS], ids=["text", "special"])
def test_a_model_that_thinks_may_do_so_first(special: Sequence[str]) -> None:
    dialect = dialect_of(QWEN_THINKING, "auto", lambda text: text in special)
    call = written("hermes", GOOD[0])
    thoughts = "\nWhich <tool>?\n{\n</think>\n\n"
    free = grammar(dialect, prompt="<|im_start|>assistant\n")
    assert accepts(call, free, special)
    assert accepts("<think>" + thoughts + call, free, special)
    begun = grammar(dialect, prompt="<|im_start|>assistant\n<think>\n")
    assert accepts(thoughts + call, begun, special)
    assert not accepts(call, begun, special)
    off = grammar(dialect, prompt="<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert accepts(call, off, special)
    assert not accepts("<think>" + thoughts + call, off, special)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["hermes", "llama3", "smollm2"])
def test_whatever_the_grammar_lets_through_is_read_as_calls(name: str, seed: int) -> None:
    dialect, rng = dialect_of("", name), random.Random(seed)
    tools = check_tools(TOOLS[:1], "required")
    found = dialect.response_format("", tools)
    assert found is not None
    tokenizer = Bytes()
    match = matcher(tokenizer, LLMatcher.grammar_from_lark(found["grammar"]))
    ids: list[int] = []
    while len(ids) < 4000 and (not ids or ids[-1] != tokenizer.eos_token_id):
        allowed = [i for i, bias in enumerate(match.compute_logit_bias()) if bias]
        ids.append(rng.choice(allowed))
        assert match.consume_token(ids[-1]), match.get_error()
    answer = read(dialect, tokenizer.decode(ids), tools)
    assert answer.calls
    assert answer.content == ""
    for called, arguments in calls(answer):
        assert called == "get_weather"
        assert json.loads(arguments)["city"] in ("Köln", "a\\b")


def test_nothing_is_forced_without_need() -> None:
    for name in ("hermes", "llama3", "smollm2", "plain"):
        for choice in ("auto", "none", None):
            assert dialect_of("", name).response_format("", check_tools(TOOLS, choice)) is None


def test_what_llguidance_cannot_enforce_is_left_out_unless_strict() -> None:
    schema = {"properties": {"a": {"type": "string", "format": "no-such-format"}}}
    dialect = dialect_of("", "hermes")
    wrapped = LLTokenizer(TokenizerWrapper(Bytes()), slices=[])
    for strict in (False, True):
        tools = check_tools([tool("get", schema, strict=strict)], "required")
        found = dialect.response_format("", tools)
        assert found is not None
        text = LLMatcher.grammar_from_lark(found["grammar"])
        refused, messages = LLMatcher.validate_grammar_with_warnings(text, wrapped)
        assert (refused, "no-such-format" in messages[0]) == (strict, True)
