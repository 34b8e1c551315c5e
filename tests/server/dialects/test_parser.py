"""What parsers find, and that they find it however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvant.server.dialects import Dialect, ToolDelta, call_id, check_tools
from tests.server.dialects.samples import (
    HERMES,
    LLAMA3,
    OFFERED,
    PLAIN,
    SMOL,
    TOOLS,
    calls,
    read,
)

DIALECTS = [HERMES, LLAMA3, SMOL, PLAIN]

# What outputs are made of, whole and broken.
FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "<", "</", "<tool",
    "{", "}", "[", "]", ",", ";", ":", '"', "\\", "\n", " ", "é", "1", "null", "\x00",
    '{"name": "get", "arguments": ', '{"name": "get_weather", "parameters": ', '{"a": "}"}',
    '{"name": "other", "arguments": {}}', '{"arguments": {"b": [1, {}]}, "name": "get"}',
    '<tool_call>\n{"name": "get", "arguments": {"city": "Köln \\" </tool_call>"}}\n</tool_call>',
    '<tool_call>[{"name": "get", "arguments": {}}, ', '{"type": "function", "name": "get"}',
]  # fmt: skip
OUTPUTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join)
ARGUMENTS = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=6) | st.sampled_from(['"}', "\\", "</tool_call>", "{[", "; {"]),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=3,
)  # fmt: skip


@st.composite
def json_texts(draw: st.DrawFn) -> str:
    """Arguments in one of the ways to write JSON."""
    indent, ascii_only = draw(st.sampled_from([None, 2])), draw(st.booleans())
    return json.dumps(draw(ARGUMENTS), indent=indent, ensure_ascii=ascii_only)


def cut(text: str, at: list[int]) -> list[str]:
    """``text`` in pieces; some are empty."""
    places = sorted(place % (len(text) + 1) for place in at)
    return [text[i:j] for i, j in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("prompt", ["", "<think>\n"])
@given(text=OUTPUTS, at=st.lists(st.integers(0, 10**6), max_size=20), several=st.booleans())
def test_cuts_do_not_matter(
    dialect: Dialect, prompt: str, text: str, at: list[int], several: bool
) -> None:
    tools = check_tools(TOOLS, parallel_tool_calls=several)
    whole = read(dialect, text, tools, prompt)
    assert read(dialect, cut(text, at), tools, prompt) == whole
    assert several or len(whole.calls) < 2


@given(parts=st.lists(st.sampled_from(FRAGMENTS[:-1]) | st.just(0), max_size=12))
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_no_word_is_lost(dialect: Dialect, parts: list[str | int]) -> None:
    text = "".join(f" w{i}ord " if part == 0 else str(part) for i, part in enumerate(parts))
    answer = read(dialect, [text])
    found = " ".join([answer.content, answer.reasoning, *(c.arguments for c in answer.calls)])
    words = [f"w{i}ord" for i, part in enumerate(parts) if part == 0]
    assert [word for word in words if word not in found] == []


@given(text=OUTPUTS, at=st.lists(st.integers(0, 10**6), max_size=9))
def test_without_tools_and_reasoning_everything_is_content_at_once(
    text: str, at: list[int]
) -> None:
    for dialect in DIALECTS:
        parser = dialect.parser("", check_tools(TOOLS, "none"), reasoning=False)
        for piece in cut(text, at):
            assert parser.push(piece).content == piece
        assert not parser.finish()


@given(texts=st.lists(json_texts(), min_size=1, max_size=3), at=st.lists(st.integers(0, 10**6)))
@pytest.mark.parametrize(
    ("dialect", "before", "call", "between", "after"),
    [
        (HERMES, "", '<tool_call>\n{"name": "get", "arguments": %s}\n</tool_call>', "\n", ""),
        (HERMES, "", '<tool_call>{"arguments": %s, "name": "get"}</tool_call>', "", "\n"),
        (HERMES, "<tool_call>", '\n{"name":"get","arguments":%s}', "", "\n</tool_call>"),
        (SMOL, "<tool_call>[", '{"name": "get", "arguments": %s}', ", ", "]</tool_call>"),
        (SMOL, "<tool_call>[\n", '{"name": "get", "arguments": %s}', ",\n", "\n]</tool_call>\n"),
        (LLAMA3, "", '{"name": "get", "parameters": %s}', "; ", ""),
        (LLAMA3, "<|python_tag|>", '{"type": "function", "name": "get", "parameters":%s}', ";", ""),
    ],
)  # fmt: skip
def test_arguments_are_the_text_that_the_model_wrote(
    dialect: Dialect,
    before: str,
    call: str,
    between: str,
    after: str,
    texts: list[str],
    at: list[int],
) -> None:
    written = before + between.join(call % text for text in texts) + after
    answer = read(dialect, cut(written, at))
    assert calls(answer) == [("get", text) for text in texts]
    assert [call.id for call in answer.calls] == [f"id{i}" for i in range(len(texts))]
    assert answer.content == ""


@pytest.mark.parametrize("dialect", [HERMES, SMOL], ids=lambda dialect: dialect.name)
def test_content_around_calls(dialect: Dialect) -> None:
    text = 'Let me see.\n\n<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>\n Done. \n'
    answer = read(dialect, text)
    assert (answer.content, calls(answer)) == ("Let me see.Done. \n", [("get", "{}")])


NOT_CALLS = [
    (HERMES, "<tool_call>"),
    (HERMES, "a <tool_cal"),
    (HERMES, 'x\n<tool_call>\n{"name": "get", "arguments": '),  # stopped by length
    (HERMES, '<tool_call>{"name": "get", "arguments": "text"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "get", "arguments": null}</tool_call>'),
    (HERMES, '<tool_call>{"name": "other", "arguments": {}}</tool_call>\nb'),
    (HERMES, '<tool_call>{"name": "getter", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "get", "name": "get", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"arguments": {"a": [}}, "name": "get"}</tool_call>'),
    (HERMES, "<tool_call>[]"),
    (HERMES, "</tool_call> a"),
    (HERMES, '{"name": "get", "arguments": {}}'),
    (HERMES, " \n a \n "),
    (LLAMA3, "<|python_tag|>print(1)"),
    (LLAMA3, ' <|python_tag|>\n{"name": "get"'),
    (LLAMA3, '{"name": "Alice", "parameters": {"age": 3}}'),
    (LLAMA3, '{"answer": 42}'),
    (LLAMA3, 'I call {"name": "get", "parameters": {}}'),
    (LLAMA3, "\n[1, 2]"),
]


@pytest.mark.parametrize(("dialect", "text"), NOT_CALLS)
def test_what_is_no_call_is_content_word_for_word(dialect: Dialect, text: str) -> None:
    answer = read(dialect, text)
    assert (answer.content, answer.calls) == (text, [])


def test_a_call_behind_a_broken_one_is_found() -> None:
    answer = read(HERMES, '<tool_call>{oops <tool_call>{"name": "get"}</tool_call>')
    assert (answer.content, calls(answer)) == ("<tool_call>{oops", [("get", "{}")])


def test_a_call_that_breaks_off_keeps_its_pieces() -> None:
    cases = {
        '<tool_call>{"name": "get", "arguments": {"a": 1': ('{"a": 1', ""),
        '<tool_call>{"name": "get", "arguments": {"a": "\\': ('{"a": "\\', ""),
        '<tool_call>{"name": "get", "arguments": {"a": 1}': ('{"a": 1}', ""),
        '<tool_call>{"name": "get", "arguments": {"a": 1}}\n</tool_': ('{"a": 1}', ""),
        '<tool_call>[{"name": "get", "arguments": {"a": 1}}, {"na': ('{"a": 1}', ', {"na'),
        # A brace too few, one too many.
        '<tool_call>{"name": "get", "arguments": {"a": 1}\n</tool_call>b': ('{"a": 1}', "b"),
        '<tool_call>{"name": "get", "arguments": {"a": 1}}}\n</tool_call>b': ('{"a": 1}', "b"),
        '<tool_call>{"name": "get", "arguments": {"a": 1</tool_call>b': ('{"a": 1', "b"),
        '<tool_call>{"name": "get", "arguments": {"a": \'x\'}}': ('{"a": ', "'x'}}"),
        '<tool_call>{"name": "get", "arguments": {}, "more": 1}</tool_call>': (
            "{}",
            ', "more": 1}</tool_call>',
        ),
    }  # fmt: skip
    for text, (arguments, content) in cases.items():
        answer = read(HERMES, text)
        assert (calls(answer), answer.content) == ([("get", arguments)], content), text


def test_content_after_bare_calls() -> None:
    answer = read(LLAMA3, '{"name": "get", "parameters": {}}; so {"name": "get"}')
    assert (calls(answer), answer.content) == ([("get", "{}")], '; so {"name": "get"}')


def test_an_empty_list_is_no_call_and_no_content() -> None:
    answer = read(SMOL, "No tool fits.\n\n<tool_call>[]</tool_call>\n")
    assert (answer.content, answer.calls) == ("No tool fits.", [])


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        (HERMES, '<tool_call>{"name": "get"}</tool_call><tool_call>{"name": "get"}</tool_call>'),
        (LLAMA3, '{"name": "get"}; {"name": "get"}'),
    ],
)
def test_one_call_where_only_one_may_be(dialect: Dialect, text: str) -> None:
    assert len(read(dialect, text).calls) == 2
    answer = read(dialect, text, check_tools(TOOLS, parallel_tool_calls=False))
    assert len(answer.calls) == 1
    assert '{"name": "get"}' in answer.content


def test_a_named_tool_is_the_only_one() -> None:
    named = {"type": "function", "function": {"name": "get"}}
    text = '<tool_call>{"name": "get_weather"}</tool_call>'
    assert read(HERMES, text, check_tools(TOOLS, named)).content == text


def deltas(dialect: Dialect, pieces: list[str], **options: Any) -> list[Any]:
    parser = dialect.parser("", OFFERED, new_id=lambda: "id", **options)
    return [parser.push(piece) for piece in pieces]


def test_content_is_held_back_only_while_it_may_be_a_marker() -> None:
    pieces = ["Hi", " ", "you", "\n<", "b>", "<tool_call", "s>"]
    got = [delta.content for delta in deltas(HERMES, pieces)]
    assert got == ["Hi", "", " you", "", "\n<b>", "", "<tool_calls>"]
    assert [d.content for d in deltas(LLAMA3, ["Hi", " { ", "<"])] == ["Hi", " { ", "<"]
    # An answer in JSON is known for one at its first member.
    assert [d.content for d in deltas(LLAMA3, ['{"', "an", "s"])] == ["", '{"an', "s"]
    assert [d.content for d in deltas(LLAMA3, ['{"name": "Al', "ice"])] == ['{"name": "Al', "ice"]


def test_arguments_go_on_as_they_come() -> None:
    pieces = ['<tool_call>{"name": "get"', ', "arguments": ', '{"a', '": "', 'x"}', "}</tool_call>"]
    got = [delta.tool_calls for delta in deltas(HERMES, pieces)]
    assert got == [
        (),
        (),
        (ToolDelta(0, "id", "get", '{"a'),),
        (ToolDelta(0, arguments='": "'),),
        (ToolDelta(0, arguments='x"}'),),
        (),
    ]


def test_reasoning() -> None:
    text = '<think>\nI <tool_call> \n</think>\n\nYes <think> <tool_call>{"name": "get"}</tool_call>'
    answer = read(HERMES, text)
    assert (answer.reasoning, answer.content) == ("I <tool_call>", "Yes <think>")
    assert calls(answer) == [("get", "{}")]
    # Without tools, and in every dialect.
    for dialect in DIALECTS:
        answer = read(dialect, "<think>a</think>b", check_tools(None))
        assert (answer.reasoning, answer.content) == ("a", "b")
        assert read(dialect, "<think>a</think>b", reasoning=False).content == "<think>a</think>b"


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("x<think>\n", "a\n</think>\n\nb", "a", "b"),
        ("x<think>", "\na", "a", ""),  # stopped by length
        ("x<think>", "a</thi", "a</thi", ""),
        ("x<think>", "", "", ""),
        ("<think>\n\n</think>\n\n", "b", "", "b"),  # enable_thinking=false
        ("<think>\n\n</think>\n\n", "<think>b</think>", "", "<think>b</think>"),
        ("say <think> twice", " \n<think>\n\n</think>\n\nb", "", "b"),
        ("", "<thin", "", "<thin"),
        ("", "\n <thing>", "", "\n <thing>"),
        ("", "a<think>b</think>", "", "a<think>b</think>"),
        ("", "<think>a", "a", ""),
    ],
)
def test_where_reasoning_begins_and_ends(
    prompt: str, text: str, reasoning: str, content: str
) -> None:
    answer = read(PLAIN, text, check_tools(None), prompt)
    assert (answer.reasoning, answer.content) == (reasoning, content)


def test_reasoning_goes_on_as_it_comes() -> None:
    got = deltas(HERMES, ["<think>", "\nA", " b", " <", "c", "\n", "</think>", "\n\n", "d"])
    assert [d.reasoning for d in got] == ["", "A", " b", "", " <c", "", "", "", ""]
    assert [d.content for d in got][-2:] == ["", "d"]


def test_deep_and_long_outputs() -> None:
    deep = '{"a": ' + "[" * 5000 + "]" * 5000 + "}"
    text = f'<tool_call>{{"name": "get", "arguments": {deep}}}</tool_call>'
    assert calls(read(HERMES, [text])) == [("get", deep)]
    again = "<tool_call>" * 5000
    assert read(HERMES, [again]).content == again


def test_ids_are_random() -> None:
    assert call_id().startswith("call_")
    assert len({call_id() for _ in range(100)}) == 100
