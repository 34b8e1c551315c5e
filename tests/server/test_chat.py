"""/v1/chat/completions: what its parameters mean, what the template gets, tools and reasoning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvant import EngineConfig, GenerationConfig, Response, pipeline
from kvant.request import Request
from kvant.server.dialects import DIALECTS, check_tools
from tests.byte_model import write_config, write_tokenizer, write_weights
from tests.server.conftest import Served, serving

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
GREEDY = {"messages": MESSAGES, "temperature": 0, "max_tokens": 40}
LETTERS = {"messages": MESSAGES, "guided_regex": "[a-z]{20}"}


def infer(served: Served, **gen: Any) -> Response:
    found = served.pipe.infer(MESSAGES, GenerationConfig(**gen))
    assert isinstance(found, Response)
    return found


def message(answer: Any) -> Any:
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    return choice["message"]


def content(answer: Any) -> str:
    found = message(answer)["content"]
    assert isinstance(found, str)
    return found


class _Gathered:
    """The choices of a stream, put together as a client does it."""

    def __init__(self, events: Sequence[Any]) -> None:
        self.choices: dict[int, dict[str, Any]] = {}
        for event in events:
            assert event["object"] == "chat.completion.chunk"
            for choice in event["choices"]:
                self._add(choice)

    def _add(self, choice: Any) -> None:
        delta = choice["delta"]
        if choice["index"] not in self.choices:
            assert delta == {"role": "assistant", "content": ""}
            empty: dict[str, Any] = {"message": dict(delta), "logprobs": None}
            self.choices[choice["index"]] = {**empty, "finish_reason": None}
            return
        whole = self.choices[choice["index"]]
        assert whole["finish_reason"] is None, "something follows the end"
        whole["finish_reason"] = choice["finish_reason"]
        for name, value in delta.items():
            assert value, "an empty delta says nothing"
            self._extend(whole["message"], name, value)
        if choice["logprobs"] is not None:
            before = whole["logprobs"] or {"content": []}
            whole["logprobs"] = {"content": before["content"] + choice["logprobs"]["content"]}

    def _extend(self, said: dict[str, Any], name: str, value: Any) -> None:
        if name != "tool_calls":
            said[name] = said.get(name, "") + value
            return
        calls = said.setdefault("tool_calls", [])
        for piece in value:
            if piece["index"] == len(calls):
                calls.append({key: piece[key] for key in ("id", "type", "function")})
            else:
                assert set(piece) == {"index", "function"}
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]


def comparable(choice: Any) -> Any:
    """A choice without what is new each time, and with "" for no content."""
    choice = json.loads(json.dumps(choice))
    choice.pop("index", None)
    choice["message"]["content"] = choice["message"]["content"] or ""
    for call in choice["message"].get("tool_calls", ()):
        assert call.pop("id").startswith("call_")
    return choice


def same_streamed(served: Served, **body: Any) -> Any:
    """The whole answer, after a look at whether the stream adds up to the same."""
    whole = served.ask(PATH, **body)
    *events, last = served.events(PATH, **body, stream_options={"include_usage": True})
    gathered = _Gathered(events).choices
    assert [comparable(gathered[index]) for index in sorted(gathered)] == [
        comparable(choice) for choice in whole["choices"]
    ]
    assert last["choices"] == []
    for usage in (last["usage"], whole["usage"]):  # the second time the prompt is in the cache
        usage.pop("prompt_tokens_details")
    assert last["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events)
    assert len({(event["id"], event["created"]) for event in [*events, last]}) == 1
    return whole


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> Callable[[Served], list[str]]:
    """For a server: the list of the prompts that its engine gets from now on."""

    def watch(served: Served) -> list[str]:
        seen: list[str] = []
        make = served.pipe.generate_requests

        def spy(ids: Sequence[int], gen: GenerationConfig) -> list[Request]:
            seen.append(served.pipe.tokenizer.decode(ids, skip_special=False))
            return make(ids, gen)

        monkeypatch.setattr(served.pipe, "generate_requests", spy)
        return seen

    return watch


# ----------------------------------------------------------------------------------------- answers


def test_greedy_is_the_pipelines(tiny_server: Served) -> None:
    expected = infer(tiny_server, max_new_tokens=40)
    answer = tiny_server.ask(PATH, **GREEDY)
    assert content(answer) == expected.text
    assert answer["choices"][0]["finish_reason"] == expected.finish_reason == "length"
    assert answer["usage"]["prompt_tokens"] == expected.input_token_len
    assert answer["usage"]["completion_tokens"] == 40
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("chatcmpl-")


def test_sampling_is_the_pipelines_at_temperature_1(tiny_server: Served) -> None:
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    expected = infer(tiny_server, **plain, max_new_tokens=40, random_seed=9)
    assert content(tiny_server.ask(PATH, messages=MESSAGES, max_tokens=40, seed=9)) == expected.text


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 3, "n": 2},
        {"stop": ["b", "\ufffd\ufffd"]},
        {"stop": "b", "include_stop_str_in_output": True, "logprobs": True},
        {"logit_bias": {"257": 100}, "min_tokens": 3, "logprobs": True},
        {"response_format": {"type": "regex_schema", "regex_schema": "[a-z]{3} [0-9]{3}"}},
        {"presence_penalty": 1.5, "top_p": 0.8, "top_k": 20, "min_p": 0.01},
    ],
    ids=lambda body: json.dumps(body)[:40],
)
def test_a_stream_adds_up_to_the_answer(tiny_server: Served, body: dict[str, Any]) -> None:
    same_streamed(tiny_server, messages=MESSAGES, max_tokens=40, seed=1, **body)


def test_usage_is_not_streamed_unasked(tiny_server: Served) -> None:
    events = tiny_server.events(PATH, **GREEDY)
    assert not any("usage" in event for event in events)
    assert all(len(event["choices"]) == 1 for event in events)


def test_completion_i_has_seed_plus_i(tiny_server: Served) -> None:
    together = tiny_server.ask(PATH, **LETTERS, n=3, seed=5)["choices"]
    alone = [content(tiny_server.ask(PATH, **LETTERS, seed=5 + i)) for i in range(3)]
    assert [choice["message"]["content"] for choice in together] == alone
    assert [choice["index"] for choice in together] == [0, 1, 2]
    assert len(set(alone)) == 3


def test_lengths(tiny_server: Served) -> None:
    names = ("max_tokens", "max_completion_tokens")
    for given in ([names[0]], [names[1]], names):
        answer = tiny_server.ask(
            PATH, messages=MESSAGES, ignore_eos=True, **dict.fromkeys(given, 7)
        )
        assert answer["usage"]["completion_tokens"] == 7
        assert answer["choices"][0]["finish_reason"] == "length"


def test_the_rest_of_the_context_is_the_longest_answer(tiny: str) -> None:
    with serving(pipeline(tiny, EngineConfig(session_len=64, kv_tokens=1024))) as served:
        for body in ({}, {"max_tokens": 10**6}):
            answer = served.ask(PATH, messages=MESSAGES, ignore_eos=True, **body)
            assert answer["usage"]["total_tokens"] == 64


def test_usage_counts_the_prompt_once(tiny_server: Served) -> None:
    usage = tiny_server.ask(PATH, messages=MESSAGES, n=3, max_tokens=4, ignore_eos=True)["usage"]
    assert usage["prompt_tokens"] == len("[user]hi[assistant]")
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


def test_a_longer_conversation_finds_the_shorter_in_the_cache(tiny_server: Served) -> None:
    said = [{"role": "user", "content": "only this conversation says so " * 6}]
    first = tiny_server.ask(PATH, messages=said, max_tokens=1)["usage"]
    said += [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    second = tiny_server.ask(PATH, messages=said, max_tokens=1)["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == first["prompt_tokens"] // 64 * 64


def test_logprobs(tiny_server: Served) -> None:
    answer = tiny_server.ask(PATH, **GREEDY, logprobs=True, top_logprobs=3)
    expected = infer(tiny_server, max_new_tokens=40, logprobs=3)
    assert expected.logprobs is not None
    found = answer["choices"][0]["logprobs"]["content"]
    pairs = list(zip(expected.token_ids, expected.logprobs, strict=True))
    assert [entry["logprob"] for entry in found] == [likely[token] for token, likely in pairs]
    for entry, (_, likely) in zip(found, pairs, strict=True):
        assert [top["logprob"] for top in entry["top_logprobs"]] == list(likely.values())
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # it was greedy
        for each in (entry, *entry["top_logprobs"]):
            whole = "\ufffd" not in each["token"]
            assert each["bytes"] == (list(each["token"].encode()) if whole else None)


def test_logprobs_spell_the_answer(tiny_server: Served) -> None:
    answer = tiny_server.ask(PATH, **LETTERS, logprobs=True)
    found = answer["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in found) == content(answer)
    assert bytes(byte for entry in found for byte in entry["bytes"]).decode() == content(answer)
    assert all(entry["top_logprobs"] == [] for entry in found)
    assert tiny_server.ask(PATH, **LETTERS)["choices"][0]["logprobs"] is None


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}


def test_json_schema(tiny_server: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    answer = same_streamed(
        tiny_server, messages=MESSAGES, response_format=form, max_tokens=200, n=3, seed=1
    )
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        assert 0 <= json.loads(choice["message"]["content"])["a"] <= 99


def test_json_object(tiny_server: Served) -> None:
    brackets = tiny_server.ask("/tokenize", prompt='{}"')["tokens"]  # so that it comes to an end
    answer = tiny_server.ask(
        PATH, messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=2000, seed=1,
        logit_bias=dict.fromkeys(map(str, brackets), 9),
    )  # fmt: skip
    assert isinstance(json.loads(content(answer)), dict)


def test_text_is_no_constraint(tiny_server: Served) -> None:
    form = {"type": "text"}
    assert content(tiny_server.ask(PATH, **GREEDY, response_format=form)) == content(
        tiny_server.ask(PATH, **GREEDY)
    )


# ---------------------------------------------------------------------------------- the template


def test_messages_as_the_template_has_them(
    tiny_server: Served, prompts: Callable[[Served], list[str]]
) -> None:
    seen = prompts(tiny_server)
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    said = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "somebody"},
        {"role": "assistant", "content": "three", "refusal": None, "tool_calls": None},
        {"role": "user", "content": ""},
    ]
    tiny_server.ask(PATH, messages=said, max_tokens=1)
    tiny_server.ask(PATH, messages=said, max_tokens=1, add_generation_prompt=False)
    expected = "[system]be brief[user]one two[assistant]three[user]"
    assert seen == 2 * [expected + "[assistant]"]  # this template asks for no generation prompt


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{{ enable_thinking }} {{ reasoning_effort }} {{ mode }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_variables_of_the_template(tiny: str, prompts: Callable[[Served], list[str]]) -> None:
    with serving(pipeline(tiny, EngineConfig(kv_tokens=1024), chat_template=TEMPLATE)) as served:
        seen = prompts(served)
        body = {"messages": MESSAGES, "max_tokens": 1}
        served.ask(PATH, **body)
        served.ask(PATH, **body, enable_thinking=False, reasoning_effort="low")
        kwargs = {"mode": "plain", "enable_thinking": True}
        served.ask(PATH, **body, chat_template_kwargs=kwargs, add_generation_prompt=False)
        assert seen == [
            "<user>hi  <assistant>",
            "<user>hiFalse low <assistant>",
            "<user>hiTrue  plain",
        ]
        for name in ("messages", "tools", "add_generation_prompt"):
            error = served.refusal(PATH, **body, chat_template_kwargs={name: 1})
            assert error["param"] == "chat_template_kwargs" and name in error["message"]


def test_what_a_template_refuses(tiny: str) -> None:
    template = "{{ raise_exception('no, ' ~ messages[0].role ~ ' cannot speak') }}"
    with serving(pipeline(tiny, EngineConfig(kv_tokens=1024), chat_template=template)) as served:
        assert "no, user cannot speak" in served.refusal(PATH, messages=MESSAGES)["message"]


def test_a_model_without_a_template_cannot_chat(tmp_path: Path) -> None:
    write_config(tmp_path)
    write_weights(tmp_path)
    write_tokenizer(tmp_path, template=None)
    with serving(pipeline(str(tmp_path), EngineConfig(kv_tokens=1024))) as served:
        assert "--chat-template" in served.refusal(PATH, messages=MESSAGES)["message"]
        assert served.ask("/v1/completions", prompt="a")["choices"]


# --------------------------------------------------------------------------------------- reasoning

THINKING = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]<think>\n"
THOUGHT = {"messages": MESSAGES, "guided_choice": ["so and\nso</think>\n\nthus it is"]}


@pytest.fixture(scope="module")
def thinking_server(tiny: str) -> Iterator[Served]:
    pipe = pipeline(tiny, EngineConfig(kv_tokens=2048, check=True), chat_template=THINKING)
    with serving(pipe) as served:
        yield served


def test_reasoning_is_told_apart(thinking_server: Served) -> None:
    said = message(same_streamed(thinking_server, **THOUGHT))
    assert said["reasoning_content"] == "so and\nso"
    assert said["content"] == "thus it is"


def test_reasoning_can_be_left_out(thinking_server: Served) -> None:
    said = message(same_streamed(thinking_server, **THOUGHT, include_reasoning=False))
    assert said == {"role": "assistant", "content": "thus it is"}


def test_reasoning_that_does_not_end(thinking_server: Served) -> None:
    answer = same_streamed(thinking_server, **THOUGHT, max_tokens=5)
    assert message(answer)["reasoning_content"] == "so an"
    assert not message(answer)["content"]
    assert answer["choices"][0]["finish_reason"] == "length"


def test_reasoning_in_the_output(tiny_server: Served) -> None:
    body = {"messages": MESSAGES, "guided_choice": ["<think>so</think>thus"]}
    said = message(same_streamed(tiny_server, **body))
    assert (said["reasoning_content"], said["content"]) == ("so", "thus")


def test_a_server_that_does_not_split_reasoning(tiny: str) -> None:
    pipe = pipeline(tiny, EngineConfig(kv_tokens=1024), chat_template=THINKING)
    with serving(pipe, reasoning=False) as served:
        said = message(same_streamed(served, **THOUGHT))
        assert said == {"role": "assistant", "content": THOUGHT["guided_choice"][0]}


# ------------------------------------------------------------------------------------------- tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "parameters": SCHEMA}}
TOOLS = [WEATHER, CLOCK]
CALLING = [name for name in DIALECTS if name != "plain"]


@pytest.fixture(scope="module", params=CALLING)
def calling_server(tiny: str, request: pytest.FixtureRequest) -> Iterator[Served]:
    pipe = pipeline(tiny, EngineConfig(kv_tokens=16384, check=True))
    with serving(pipe, tool_call_parser=request.param) as served:
        yield served


def written(served: Served, *arguments: dict[str, Any], name: str = "get_weather") -> str:
    """Calls as a model of the server's dialect writes them."""
    calls = [
        {"id": "x", "type": "function", "function": {"name": name, "arguments": json.dumps(each)}}
        for each in arguments
    ]
    said = [*MESSAGES, {"role": "assistant", "tool_calls": calls}]
    found: str = served.service.dialect.inputs(said, check_tools(TOOLS))["messages"][-1]["content"]
    return found


def calls_of(answer: Any) -> list[tuple[str, Any]]:
    found = [call["function"] for call in message(answer).get("tool_calls", ())]
    return [(function["name"], json.loads(function["arguments"])) for function in found]


def test_a_required_call(calling_server: Served) -> None:
    body = {"messages": MESSAGES, "tools": TOOLS, "parallel_tool_calls": False, "max_tokens": 300}
    answer = same_streamed(calling_server, **body, tool_choice="required", seed=1)
    ((name, arguments),) = calls_of(answer)
    assert message(answer)["content"] is None
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    if name == "get_weather":
        assert arguments["city"] in ("Paris", "Rome")
    else:
        assert name == "get_time" and 0 <= arguments["a"] <= 99


@pytest.mark.parametrize("tool", TOOLS)
def test_a_named_call(calling_server: Served, tool: dict[str, Any]) -> None:
    name = tool["function"]["name"]
    choice = {"type": "function", "function": {"name": name}}
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "max_tokens": 300}
    answer = same_streamed(calling_server, **body, seed=2)
    assert [called for called, _ in calls_of(answer)] == [name]


@pytest.mark.parametrize("choice", [None, "auto"])
@pytest.mark.parametrize("count", [1, 3])
def test_calls_that_the_model_chose(calling_server: Served, choice: str | None, count: int) -> None:
    arguments = [{"city": "Paris"}, {"city": "Rome"}, {}][:count]
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice}
    answer = same_streamed(
        calling_server, **body, guided_choice=[written(calling_server, *arguments)]
    )
    assert calls_of(answer) == [("get_weather", each) for each in arguments]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert len({call["id"] for call in message(answer)["tool_calls"]}) == count


def test_a_model_may_also_talk(calling_server: Served) -> None:
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "auto"}
    answer = same_streamed(calling_server, **body, guided_choice=["It rains {in} <Paris>."])
    assert message(answer) == {"role": "assistant", "content": "It rains {in} <Paris>."}
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_with_none_a_call_is_text(
    calling_server: Served, prompts: Callable[[Served], list[str]]
) -> None:
    text = written(calling_server, {"city": "Paris"})
    seen = prompts(calling_server)
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "none", "guided_choice": [text]}
    assert message(same_streamed(calling_server, **body)) == {"role": "assistant", "content": text}
    assert all("get_weather" not in prompt for prompt in seen)


def test_a_function_that_is_not_there_is_text(calling_server: Served) -> None:
    text = written(calling_server, {"city": "Paris"}, name="get_money")
    body = {"messages": MESSAGES, "tools": TOOLS, "guided_choice": [text]}
    assert message(same_streamed(calling_server, **body))["content"] == text


def test_a_call_that_is_cut(calling_server: Served) -> None:
    """Its finish_reason says that the arguments are incomplete."""
    text = written(calling_server, {"city": "Paris"})
    until = text.index("Par") + 3
    body = {"messages": MESSAGES, "tools": TOOLS, "guided_choice": [text]}
    answer = same_streamed(calling_server, **body, max_tokens=until)
    (call,) = message(answer)["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "Par'
    assert answer["choices"][0]["finish_reason"] == "length"


def test_results_go_back(calling_server: Served, prompts: Callable[[Served], list[str]]) -> None:
    """What the server said can be sent to it again, with the results of the calls."""
    seen = prompts(calling_server)
    text = written(calling_server, {"city": "Paris"})
    body = {"tools": TOOLS, "guided_choice": [text]}
    said = message(calling_server.ask(PATH, messages=MESSAGES, **body))
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "it rains"}
    calling_server.ask(PATH, messages=[*MESSAGES, said, result], tools=TOOLS, max_tokens=1)
    before, after = seen
    assert "get_weather" in before and "The weather in a city" in before
    assert after.startswith(before)  # so the prefix cache helps
    assert text in after and "it rains" in after


def test_a_call_and_a_form_exclude_each_other(calling_server: Served) -> None:
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"}
    error = calling_server.refusal(PATH, **body, response_format={"type": "json_object"})
    assert error["param"] == "tool_choice"


def test_a_model_that_knows_no_tools(tiny_server: Served) -> None:
    error = tiny_server.refusal(PATH, messages=MESSAGES, tools=TOOLS)
    assert "--tool-call-parser" in error["message"]
    tiny_server.ask(PATH, **GREEDY, tools=TOOLS, tool_choice="none")
    tiny_server.ask(PATH, **GREEDY, tools=[])


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"nonsense": 1}, "nonsense", "not supported"),
        ({"functions": []}, "functions", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"store": True}, "store", ""),
        ({"modalities": ["audio"]}, "modalities[0]", ""),
        ({"messages": []}, "messages", ""),
        ({"messages": "hi"}, "messages", ""),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", ""),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0]", "wizard"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", ""),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0]",
            "image_url",
        ),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0]", "tool_call_id"),
        ({"max_tokens": 0}, "max_tokens", "0"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "max_completion_tokens"),
        ({"top_logprobs": 3}, None, "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"n": 0}, "n", "0"),
        ({"n": 129}, "n", "128"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]", "retrieval"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": "sometimes"}, "tool_choice", "sometimes"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", ""),
        ({"stream": "yes"}, "stream", "'yes'"),
        ({"stop": 3}, "stop", "3"),
        ({"tool_choice": 3}, "tool_choice", "3"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema",
            "schema",
        ),
        ({"messages": [{"role": "user", "content": "a" * 9000}]}, None, "8192"),
    ],
    ids=lambda each: json.dumps(each)[:50],
)
def test_what_is_refused(
    tiny_server: Served, body: dict[str, Any], param: str | None, part: str
) -> None:
    error = tiny_server.refusal(PATH, **{"messages": MESSAGES, **body})
    assert error["param"] == param
    assert part in error["message"]
    assert error["type"] == "invalid_request_error"
    if "stream_options" not in body:  # a stream that cannot begin is refused in the same way
        streamed = {"messages": MESSAGES, "stream": True, **body}
        assert tiny_server.refusal(PATH, **streamed)["message"] == error["message"]


def test_another_model_is_not_found(tiny_server: Served) -> None:
    answer = tiny_server.post(PATH, {"model": "gpt-4", "messages": MESSAGES})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert tiny_server.ask(PATH, **GREEDY, model="tiny")["model"] == "tiny"


def test_what_asks_for_nothing_is_taken(tiny_server: Served) -> None:
    nothing = {
        "user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto",
        "modalities": ["text"], "parallel_tool_calls": True, "logprobs": None, "stop": None,
    }  # fmt: skip
    assert content(tiny_server.ask(PATH, **GREEDY, **nothing)) == content(
        tiny_server.ask(PATH, **GREEDY)
    )
