"""What may be said of tools, and how what may not is refused."""

from __future__ import annotations

from typing import Any

import pytest

from kvant.errors import RequestError
from kvant.server.dialects import Tools, check_tools
from tests.server.dialects.samples import tool

NAMED = {"type": "function", "function": {"name": "b"}}


def names(tools: Tools) -> list[str]:
    return [function.name for function in tools.functions]


def test_choices() -> None:
    offered = [tool("a"), tool("b", description="B.", strict=True)]
    auto = check_tools(offered)
    assert (names(auto), auto.forced, auto.several) == (["a", "b"], False, True)
    assert check_tools(offered, "auto", True) == auto
    required = check_tools(offered, "required", False)
    assert (names(required), required.forced, required.several) == (["a", "b"], True, False)
    named = check_tools(offered, NAMED)
    assert (names(named), named.forced, named.several) == (["b"], True, False)
    assert named.definitions == auto.definitions  # the prompt is the same
    assert check_tools(offered, "none") == Tools()


@pytest.mark.parametrize("choice", [None, "auto", "none"])
@pytest.mark.parametrize("tools", [None, []])
def test_no_tools(tools: list[Any] | None, choice: str | None) -> None:
    assert check_tools(tools, choice) == Tools()
    assert not check_tools(tools, choice)


def test_definitions_hold_what_the_model_should_see() -> None:
    given = tool("a", {"type": "object"}, strict=True, description="A.")
    given["function"]["nothing"] = None
    (definition,) = check_tools([given]).definitions
    shown = {"name": "a", "parameters": {"type": "object"}, "description": "A."}
    assert definition == {"type": "function", "function": shown}


@pytest.mark.parametrize("schema", [None, {}, {"properties": {}}, {"type": "object"}])
def test_parameters_are_always_of_an_object(schema: dict[str, Any] | None) -> None:
    (function,) = check_tools([tool("a", schema)]).functions
    assert function.parameters == {**(schema or {}), "type": "object"}


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ("x", None, "tools is of type str; give a list"),
        ([tool(f"t{i}") for i in range(129)], None, "tools has 129 entries; give at most 128"),
        (["a"], None, "tools[0] has type 'a'; only \"function\""),
        ([{"type": "retrieval"}], None, "tools[0] has type 'retrieval'"),
        ([tool("a"), {"type": "function"}], None, "tools[1].function is missing"),
        ([tool("")], None, "tools[0].function.name ''"),
        ([tool("a b")], None, "tools[0].function.name 'a b' is no name; use 1 to 64 of a-z"),
        ([tool("a\n")], None, "tools[0].function.name 'a\\n'"),
        ([tool("a" * 65)], None, "tools[0].function.name"),
        ([tool("ä")], None, "tools[0].function.name"),
        ([tool("a", description=1)], None, "tools[0].function.description 1 is no string"),
        ([tool("a", [])], None, "tools[0].function.parameters is of type list"),
        ([tool("a", {"type": "string"})], None, "parameters has type 'string'; arguments are"),
        ([tool("a"), tool("b"), tool("a")], None, 'name "a" is there twice; rename one'),
        ([tool("a")], "always", "tool_choice 'always' is unknown; use \"auto\""),
        ([tool("a")], {"type": "function"}, "tool_choice {'type': 'function'} is unknown"),
        ([tool("a")], 3, "tool_choice 3 is unknown"),
        ([tool("bb")], NAMED, "tool_choice names 'b', which is not among the tools"),
        ([], "required", 'tool_choice is "required" but there are no tools'),
        (None, NAMED, "which is not among the tools"),
    ],
)
def test_refusals(tools: Any, choice: object, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_tools(tools, choice)
    assert message in str(caught.value)
