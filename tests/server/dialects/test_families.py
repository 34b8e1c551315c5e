"""Which dialect a template speaks, and what the template is given."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvant.errors import ConfigError, RequestError
from kvant.loading.chat import ChatTemplate
from kvant.server.dialects import DIALECTS, check_tools, dialect_of
from tests.server.dialects.samples import (
    CODER,
    LLAMA,
    OFFERED,
    QWEN,
    QWEN_THINKING,
    R1,
    SMOLLM2,
    TOOLS,
    calls,
    read,
)

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def call(number: int, arguments: str = '{"city": "Köln"}', **more: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": f"id{number}", "type": "function", "function": function, **more}


TALK = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather?"}], "name": None},
    {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call(1), call(2, "{}")]},
    {"role": "tool", "tool_call_id": "id2", "content": "rain"},
    {"role": "tool", "tool_call_id": "id1", "content": "sun"},
    {"role": "assistant", "content": "Both.", "tool_calls": None},
    {"role": "user", "content": "And now?"},
]


def render(template: str, name: str = "auto", **variables: Any) -> str:
    inputs = dialect_of(template, name).inputs(TALK, OFFERED)
    return ChatTemplate(template, "<s>", "</s>").render(**inputs, **variables)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (QWEN, "hermes"),
        (QWEN_THINKING, "hermes"),
        (LLAMA, "llama3"),
        (SMOLLM2, "smollm2"),
        (R1, "plain"),
        (CODER, "plain"),
        (CHATML, "plain"),
        (None, "plain"),
    ],
)
def test_the_template_shows_the_dialect(template: str | None, name: str) -> None:
    assert dialect_of(template).name == name
    assert type(dialect_of(template)) is DIALECTS[name]


def test_a_dialect_by_name() -> None:
    for name in DIALECTS:
        assert dialect_of(QWEN, name).name == name
    with pytest.raises(ConfigError, match=r'"hermse" is unknown; use auto.*mean "hermes"'):
        dialect_of(QWEN, "hermse")


def test_a_template_that_knows_tools_gets_them() -> None:
    prompt = render(QWEN)
    assert json.dumps(TOOLS[0]) in prompt
    assert '{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>' in prompt
    assert "<|im_start|>system\nBe brief." in prompt
    assert "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>tool\nsun" in prompt
    inputs = dialect_of(QWEN).inputs(TALK, check_tools(TOOLS, "none"))
    assert inputs["tools"] is None


def test_llama_has_one_call_in_a_message() -> None:
    inputs = dialect_of(LLAMA).inputs(TALK, OFFERED)
    roles = [message["role"] for message in inputs["messages"]]
    assert roles == ["system", "user", *["assistant", "tool"] * 2, "assistant", "user"]
    assert [m["content"] for m in inputs["messages"] if m["role"] == "tool"] == ["sun", "rain"]
    assert '{"name": "get_weather", "parameters": {"city": "Köln"}}' in render(LLAMA)


def test_tools_are_written_for_a_template_that_does_not_know_them() -> None:
    prompt = render(SMOLLM2, add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou are an expert in composing")
    assert f"<tools>{json.dumps(TOOLS, ensure_ascii=False)[:-2]}" in prompt
    written = (
        '<|im_start|>assistant\n<tool_call>[\n{"name": "get_weather", "arguments": {"city": '
        '"Köln"}},\n{"name": "get_weather", "arguments": {}}\n]</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\nBoth.<|im_end|>\n"
    )
    assert written in prompt
    # Without a system message the tools are one; without tools nothing is said.
    user = [{"role": "user", "content": "Hi"}]
    dialect = dialect_of(SMOLLM2)
    first = dialect.inputs(user, OFFERED)["messages"][0]
    assert (first["role"], first["content"][:7]) == ("system", "You are")
    assert dialect.inputs(user, check_tools(None)) == {"messages": user, "tools": None}


@pytest.mark.parametrize("name", ["hermes", "llama3", "smollm2"])
def test_written_calls_are_read_as_calls(name: str) -> None:
    dialect = dialect_of(CHATML, name)
    messages = dialect.inputs(TALK, OFFERED)["messages"]
    assert "get_weather" in messages[0]["content"]
    answer = read(dialect, messages[2]["content"])
    assert calls(answer) == [("get_weather", '{"city": "Köln"}'), ("get_weather", "{}")]
    assert answer.content == ""
    assert not any("tool_calls" in message for message in messages)


def test_a_model_without_tools_refuses_them() -> None:
    user = [{"role": "user", "content": "Hi"}]
    for template in (R1, CHATML, CODER, None):
        with pytest.raises(RequestError, match="--tool-call-parser and one of hermes, llama3"):
            dialect_of(template).inputs(user, OFFERED)
        none = check_tools(TOOLS, "none")
        assert dialect_of(template).inputs(user, none) == {"messages": user, "tools": None}


def test_markers_that_are_special_tokens_must_be_seen() -> None:
    for name, marker in (("hermes", "<tool_call>"), ("plain", "</think>")):
        assert dialect_of("", name).skip_special_tokens
        assert not dialect_of("", name, lambda text, m=marker: text == m).skip_special_tokens
    # Calls of Llama are the same without their tag.
    assert dialect_of("", "llama3", lambda text: text == "<|python_tag|>").skip_special_tokens


def test_messages_are_not_changed() -> None:
    before = json.dumps(TALK)
    for template in (QWEN, LLAMA, SMOLLM2):
        dialect_of(template).inputs(TALK, OFFERED)
    assert json.dumps(TALK) == before


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "function", "content": "x"}, "messages[1] has role 'function'; use one of"),
        ({"role": "user"}, "messages[1] has no content"),
        ({"role": "tool", "content": "x"}, "messages[1] has no tool_call_id"),
        ({"role": "user", "content": "x", "tool_calls": [call(1)]}, "messages[1].tool_calls must"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "messages[1].tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": ["x"]}, "messages[1].tool_calls[0] has no function"),
        ({"role": "assistant", "tool_calls": [call(1, "{")]}, "arguments is not valid JSON"),
        ({"role": "assistant", "tool_calls": [call(1, "[" * 10**5)]}, "is not valid JSON"),
        ({"role": "assistant", "tool_calls": [call(1), call(2, "[1]")]}, "tool_calls[1].function."),
        ({"role": "assistant", "tool_calls": [call(1, "1")]}, "must be the JSON text of an object"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
            "messages[1].tool_calls[0].function.name None",
        ),
    ],
)
@pytest.mark.parametrize("template", [QWEN, LLAMA, SMOLLM2, R1])
def test_malformed_messages(template: str, message: dict[str, Any], error: str) -> None:
    with pytest.raises(RequestError) as caught:
        dialect_of(template).inputs([{"role": "user", "content": "Hi"}, message], check_tools(None))
    assert error in str(caught.value)


@pytest.mark.parametrize("arguments", ["", " ", "{}", {}])
def test_no_arguments(arguments: Any) -> None:
    talk = [{"role": "assistant", "content": None, "tool_calls": [call(1, arguments)]}]
    message = dialect_of(QWEN).inputs(talk, OFFERED)["messages"][0]
    assert message["tool_calls"][0]["function"]["arguments"] == {}
