"""Clients that people use, unmodified: openai, LangChain, llm, curl."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from pydantic import BaseModel

from kvant import EngineConfig, pipeline
from kvant.errors import ModelError
from kvant.loading.resolve import resolve_model
from tests.server.conftest import PATIENCE, Served, Steps, listening, serving, wait_until

openai = pytest.importorskip("openai")

MODEL = "kvant"
MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
LETTERS: dict[str, Any] = {"guided_regex": "[a-z]{12}"}
"""Makes a random model say something that can be read."""


class Weather(BaseModel):
    """What an answer is parsed to; bounded, as a random model does not come to an end."""

    sky: Literal["blue", "grey"]
    wet: bool


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALLING: dict[str, Any] = {
    "tools": [TOOL],
    "tool_choice": "required",
    "parallel_tool_calls": False,
}


def is_smollm2_there() -> bool:
    try:
        resolve_model("smollm2-135m")
    except ModelError:
        return False
    return True


SERVERS = [
    "tiny",
    pytest.param(
        "smollm2-135m",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not is_smollm2_there(), reason="the model is not there"),
        ],
    ),
]


@pytest.fixture(scope="module", params=SERVERS)
def served(request: pytest.FixtureRequest, tiny: str) -> Iterator[Served]:
    if request.param == "tiny":
        pipe = pipeline(tiny, EngineConfig(kv_tokens=16384, check=True))
        with serving(pipe, model_name=MODEL, tool_call_parser="hermes") as found:
            yield found
    else:
        pipe = pipeline(request.param, EngineConfig(kv="k8v4", kv_tokens=16384))
        with serving(pipe, model_name=MODEL) as found:
            yield found


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def openai_client(url: str, cleanup: ExitStack, **options: Any) -> Any:
    options = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE, **options}
    return cleanup.enter_context(openai.OpenAI(base_url=f"{url}/v1", **options))


@pytest.fixture
def client(served: Served, cleanup: ExitStack) -> Any:
    return openai_client(served.url, cleanup)


def ask(client: Any, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, **options)


# ----------------------------------------------------------------------------------------- openai


def test_openai_chat(served: Served, client: Any) -> None:
    answer = ask(client, extra_body=LETTERS, seed=1)
    assert re.fullmatch("[a-z]{12}", answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    assert answer._request_id


def test_openai_stream(served: Served, client: Any) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 30}
    whole = ask(client, **options)
    with ask(client, **options, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == (
        whole.choices[0].message.content
    )
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)


def test_openai_stream_with_usage(served: Served, client: Any) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 9}
    whole = ask(client, **options)
    usage = {"include_usage": True}
    *chunks, last = ask(client, **options, stream=True, stream_options=usage)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks)


def test_openai_stream_helper(served: Served, client: Any) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}
    with client.chat.completions.stream(**options, extra_body=LETTERS, seed=1) as stream:
        seen = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert seen == final.choices[0].message.content
    assert re.fullmatch("[a-z]{12}", seen)


def test_openai_async(served: Served) -> None:
    async def run() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:

            async def one(seed: int) -> str:
                answer = await ask(client, extra_body=LETTERS, seed=seed)
                return str(answer.choices[0].message.content)

            several = await asyncio.gather(*(one(seed) for seed in range(8)))
            stream = await ask(client, extra_body=LETTERS, seed=3, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return list(several), "".join(pieces)

    several, streamed = asyncio.run(run())
    assert streamed == several[3]
    assert len(set(several)) > 1


def test_openai_several(served: Served, client: Any) -> None:
    answer = ask(client, n=3, extra_body=LETTERS, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(re.fullmatch("[a-z]{12}", each.message.content) for each in answer.choices)


def test_openai_logprobs(served: Served, client: Any) -> None:
    answer = ask(client, logprobs=True, top_logprobs=4, extra_body=LETTERS)
    found = answer.choices[0].logprobs.content
    assert "".join(each.token for each in found) == answer.choices[0].message.content
    assert all(len(each.top_logprobs) == 4 and each.logprob <= 0 for each in found)


def test_openai_tools(served: Served, client: Any) -> None:
    answer = ask(client, **CALLING, max_tokens=200, seed=1)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    # The conversation goes on with the client's own objects.
    result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
    after = client.chat.completions.create(
        model=MODEL,
        messages=[*MESSAGES, choice.message, result],
        tools=[TOOL],
        max_tokens=3,
    )
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens


def test_openai_streamed_tools(served: Served, client: Any) -> None:
    whole = ask(client, **CALLING, max_tokens=200, seed=1)
    chunks = list(ask(client, **CALLING, max_tokens=200, seed=1, stream=True))
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert pieces[0].id.startswith("call_")
    assert pieces[0].function.name == "get_weather"
    assert len(pieces) > 2
    arguments = "".join(piece.function.arguments for piece in pieces)
    assert arguments == whole.choices[0].message.tool_calls[0].function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_openai_tools_by_the_stream_helper(served: Served, client: Any) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}
    with client.chat.completions.stream(**options, **CALLING, max_tokens=200) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_openai_json_schema(served: Served, client: Any) -> None:
    schema = {**Weather.model_json_schema(), "additionalProperties": False}
    form = {"name": "weather", "schema": schema, "strict": True}
    answer = ask(
        client, response_format={"type": "json_schema", "json_schema": form}, max_tokens=200, seed=1
    )
    Weather.model_validate_json(answer.choices[0].message.content)


def test_openai_parses(served: Served, client: Any) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Weather, max_tokens=200, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_openai_completions(served: Served, client: Any) -> None:
    options: dict[str, Any] = {
        "model": MODEL, "prompt": "Once upon", "temperature": 0, "max_tokens": 9
    }  # fmt: skip
    whole = client.completions.create(**options, logprobs=2, echo=True)
    assert whole.choices[0].text.startswith("Once upon")
    assert whole.choices[0].logprobs.token_logprobs[0] is None
    chunks = client.completions.create(**options, stream=True)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert whole.choices[0].text == "Once upon" + text


def test_openai_models(served: Served, client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(model.id) == model
    assert model.max_model_len == served.pipe.model.engine.session_len
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_openai_errors(served: Served, client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    assert "3" in str(caught.value)
    assert caught.value.request_id == caught.value.body["request_id"]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra_body={"nonsense": 1})
    assert caught.value.param == "nonsense"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):  # another API
        client.responses.create(model=MODEL, input="hi")


def test_openai_error_within_a_stream(served: Served, client: Any) -> None:
    """All tokens that the constraint allows are banned: noticed when one is sampled."""
    body = {"guided_choice": ["x"], "bad_words": ["x"]}
    with pytest.raises(openai.APIError, match="no token can be chosen"):
        list(ask(client, stream=True, extra_body=body))


# ------------------------------------------------------------------------ openai: keys and retries


@pytest.fixture
def narrow(tiny: str) -> Iterator[Served]:
    """A server with keys and room for one request."""
    pipe = pipeline(tiny, EngineConfig(kv_tokens=1024, max_batch_size=1))
    with serving(pipe, model_name=MODEL, api_keys=["secret", "other"], max_queue=0) as found:
        yield found


def test_openai_keys(narrow: Served, cleanup: ExitStack) -> None:
    for key in ("wrong", "", "secre", "secret "):
        with pytest.raises((openai.AuthenticationError, openai.OpenAIError)):
            ask(openai_client(narrow.url, cleanup, api_key=key), max_tokens=1)
    with pytest.raises(openai.AuthenticationError) as caught:
        openai_client(narrow.url, cleanup, api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    for key in ("secret", "other"):
        assert ask(openai_client(narrow.url, cleanup, api_key=key), max_tokens=1).choices


def test_openai_retries_when_the_queue_is_full(
    narrow: Served, cleanup: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(narrow.pipe, monkeypatch)
    impatient = openai_client(narrow.url, cleanup, api_key="secret")
    patient = openai_client(narrow.url, cleanup, api_key="secret", max_retries=9)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(ask, patient, max_tokens=1)
        wait_until(lambda: narrow.service._admitted == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            ask(impatient, max_tokens=1)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert "the limit is 1" in str(caught.value)
        second = threads.submit(ask, patient, max_tokens=1)
        wait_until(lambda: rejected(narrow) >= 2)
        steps.allow(100)
        assert first.result(PATIENCE).choices and second.result(PATIENCE).choices


def rejected(served: Served) -> float:
    key = {"Authorization": "Bearer secret"}
    lines = served.get("/metrics", headers=key).text.splitlines()
    (found,) = [line for line in lines if 'reason="queue_full"' in line and "_total" in line]
    return float(found.split()[-1])


def test_openai_retries_until_the_model_is_loaded(tiny: str, cleanup: ExitStack) -> None:
    go = threading.Event()

    def load() -> Any:
        assert go.wait(PATIENCE)
        return pipeline(tiny, EngineConfig(kv_tokens=1024))

    with listening(load, model_name=MODEL) as (url, _, _), ThreadPoolExecutor() as threads:
        with pytest.raises(openai.InternalServerError) as caught:
            ask(openai_client(url, cleanup), max_tokens=1)
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["retry-after"]) >= 1
        patient = openai_client(url, cleanup, max_retries=9)
        asked = threads.submit(ask, patient, max_tokens=1)
        time.sleep(0.1)
        go.set()
        assert asked.result(PATIENCE).choices


# -------------------------------------------------------------------------------------- LangChain


@pytest.fixture
def chain(served: Served, cleanup: ExitStack) -> Callable[..., Any]:
    """Makes a ChatOpenAI."""
    langchain_openai = pytest.importorskip("langchain_openai")
    http = cleanup.enter_context(httpx.Client())

    def make(**options: Any) -> Any:
        return langchain_openai.ChatOpenAI(
            model=MODEL,
            base_url=f"{served.url}/v1",
            api_key="none",
            http_client=http,
            timeout=PATIENCE,
            **options,
        )

    return make


def test_langchain_invokes(chain: Callable[..., Any]) -> None:
    model = chain(extra_body=LETTERS, seed=1)
    answer = model.invoke([("system", "Be brief."), ("human", "Hello")])
    assert re.fullmatch("[a-z]{12}", answer.content)
    assert answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["finish_reason"] == "stop"
    assert len(model.batch(["one", "two", "three"])) == 3


def test_langchain_streams(chain: Callable[..., Any]) -> None:
    model = chain(extra_body=LETTERS, seed=1, stream_usage=True)
    pieces = list(model.stream("Hello"))
    assert "".join(piece.content for piece in pieces) == model.invoke("Hello").content
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert whole.usage_metadata["total_tokens"] > 0


def test_langchain_async(chain: Callable[..., Any]) -> None:
    async def run() -> tuple[str, str]:
        async with httpx.AsyncClient() as http:
            model = chain(extra_body=LETTERS, seed=1, http_async_client=http)
            answer = await model.ainvoke("Hello")
            pieces = [piece.content async for piece in model.astream("Hello")]
            return answer.content, "".join(pieces)

    whole, streamed = asyncio.run(run())
    assert whole == streamed
    assert re.fullmatch("[a-z]{12}", whole)


def test_langchain_binds_tools(chain: Callable[..., Any]) -> None:
    from langchain_core.tools import tool

    @tool
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather in a city."""
        return f"It rains in {city}."

    model = chain(max_tokens=200, seed=1).bind_tools(
        [get_weather], tool_choice="any", parallel_tool_calls=False, strict=True
    )
    answer = model.invoke("What is the weather in Paris?")
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather" and call["args"]["city"] in ("Paris", "Rome")
    streamed = list(model.stream("What is the weather in Paris?"))
    whole = streamed[0]
    for piece in streamed[1:]:
        whole += piece
    assert whole.tool_calls[0]["args"]["city"] in ("Paris", "Rome")
    result = get_weather.invoke(call)
    assert chain(max_tokens=2).invoke([("human", "Weather?"), answer, result]).usage_metadata


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(chain: Callable[..., Any], method: str) -> None:
    model = chain(max_tokens=200, seed=1).with_structured_output(
        Weather, method=method, strict=True
    )
    assert isinstance(model.invoke("Describe the weather as JSON."), Weather)


# -------------------------------------------------------------------------------- llm, by simonw


@pytest.fixture
def llm_folder(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which llm knows the server as kvant and kvant-text."""
    pytest.importorskip("llm")
    monkeypatch.setattr("llm.plugins.LLM_LOAD_PLUGINS", "")  # others may not even import
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")
    model = {"model_name": MODEL, "api_base": f"{served.url}/v1", "supports_schema": True}
    models = [
        {**model, "model_id": "kvant"},
        {**model, "model_id": "kvant-text", "completion": True},
    ]
    # JSON is YAML.
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    return tmp_path


def run_llm(*words: str) -> str:
    command = [sys.executable, "-m", "llm", "prompt", "--no-log", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


def test_llm_on_the_command_line(served: Served, llm_folder: Path) -> None:
    options = ("-m", "kvant", "-o", "temperature", "0", "-o", "max_tokens", "30", "Say hello")
    expected = served.ask(
        "/v1/chat/completions", temperature=0, max_tokens=30,
        messages=[{"role": "user", "content": "Say hello"}],
    )["choices"][0]["message"]["content"].replace("\r", "\n").rstrip("\n")  # fmt: skip
    for more in ((), ("--no-stream",)):
        assert run_llm(*options, *more).replace("\r", "\n") == expected


def test_llm_as_a_library(llm_folder: Path) -> None:
    import llm

    model = llm.get_model("kvant")
    whole = model.prompt("Say hello", temperature=0, max_tokens=30, stream=False).text()
    pieces = list(model.prompt("Say hello", temperature=0, max_tokens=30))
    assert "".join(pieces) == whole
    conversation = model.conversation()
    conversation.prompt("Say hello", max_tokens=3).text()
    second = conversation.prompt("Again", max_tokens=3)
    second.text()
    assert second.usage().input > 0
    schema = {**Weather.model_json_schema(), "additionalProperties": False}
    found = model.prompt("How is the sky?", schema=schema, max_tokens=200, seed=1).text()
    Weather.model_validate_json(found)
    assert llm.get_model("kvant-text").prompt("Once upon", max_tokens=5).text()


# ------------------------------------------------------------------------------------------- curl


def run_curl(*words: str) -> str:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("there is no curl")
    done = subprocess.run(
        [curl, "--silent", "--show-error", "--max-time", str(PATIENCE), *words],
        capture_output=True, text=True, check=False, timeout=2 * PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl(served: Served) -> None:
    body = json.dumps({"messages": MESSAGES, **LETTERS, "seed": 1})
    url = f"{served.url}/v1/chat/completions"
    as_json = ("-H", "Content-Type: application/json")
    answer = json.loads(run_curl(url, *as_json, "-d", body))
    assert re.fullmatch("[a-z]{12}", answer["choices"][0]["message"]["content"])
    streamed = json.dumps({"messages": MESSAGES, **LETTERS, "seed": 1, "stream": True})
    lines = run_curl(url, *as_json, "--no-buffer", "-d", streamed).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-2]]
    assert (
        "".join(delta.get("content", "") for delta in deltas)
        == (answer["choices"][0]["message"]["content"])
    )


def test_curl_sends_a_long_body(served: Served, tmp_path: Path) -> None:
    """curl asks before it sends one (Expect: 100-continue)."""
    path = tmp_path / "body.json"
    path.write_text(json.dumps({"prompt": "a", "user": "x" * 2**21, "max_tokens": 1}))
    head = ("-H", "Content-Type: application/json", "-H", "Expect: 100-continue")
    answer = json.loads(run_curl(f"{served.url}/v1/completions", *head, "-d", f"@{path}"))
    assert answer["usage"]["completion_tokens"] <= 1


def test_curl_without_a_content_type(served: Served) -> None:
    """curl then says that it sends a form: the error says what to do."""
    body = json.dumps({"prompt": "a", "max_tokens": 1})
    answer = json.loads(run_curl(f"{served.url}/v1/completions", "-d", body))
    assert "application/json" in answer["error"]["message"]
