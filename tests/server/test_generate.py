"""/generate, /tokenize and /detokenize: token ids in and out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvant import GenerationConfig, Response
from tests.server.conftest import Served

PROMPT = "The quick brown fox"


def infer(served: Served, **gen: Any) -> Response:
    found = served.pipe.infer(PROMPT, GenerationConfig(**gen), do_preprocess=False)
    assert isinstance(found, Response)
    return found


def ids_of(served: Served, **body: Any) -> list[int]:
    found = served.ask("/tokenize", **body)
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == served.pipe.model.engine.session_len
    tokens: list[int] = found["tokens"]
    return tokens


def text_of(served: Served, tokens: list[int], **body: Any) -> str:
    found = served.ask("/detokenize", tokens=tokens, **body)
    assert set(found) == {"prompt"}
    text: str = found["prompt"]
    return text


# ---------------------------------------------------------------------------------------- generate


def test_text_and_ids_come_back(tiny_server: Served) -> None:
    expected = infer(tiny_server, max_new_tokens=30)
    answer = tiny_server.ask("/generate", prompt=PROMPT, temperature=0, max_tokens=30)
    assert answer == {
        "text": expected.text,
        "output_ids": expected.token_ids,
        "meta_info": {
            "finish_reason": {"type": expected.finish_reason},
            "prompt_tokens": len(PROMPT),
            "cached_tokens": 0,
            "completion_tokens": expected.generate_token_len,
        },
    }
    ids = ids_of(tiny_server, prompt=PROMPT)
    assert tiny_server.ask("/generate", input_ids=ids, temperature=0, max_tokens=30) == answer


def test_logprobs_of_the_output(tiny_server: Served) -> None:
    expected = infer(tiny_server, max_new_tokens=30, logprobs=0)
    assert expected.logprobs is not None
    answer = tiny_server.ask(
        "/generate", prompt=PROMPT, temperature=0, max_tokens=30, return_logprob=True
    )
    pairs = zip(expected.token_ids, expected.logprobs, strict=True)
    assert answer["meta_info"]["output_token_logprobs"] == [
        [likely[token], token] for token, likely in pairs
    ]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"return_logprob": True},
        {"stop": "b"},
        {"logit_bias": {"257": 100}, "min_tokens": 3},
        {"guided_regex": "[a-z]{6}"},
    ],
    ids=json.dumps,
)
def test_a_stream_adds_up_to_the_answer(tiny_server: Served, body: dict[str, Any]) -> None:
    body = {"prompt": PROMPT, "seed": 3, "max_tokens": 30, **body}
    whole = tiny_server.ask("/generate", **body)
    events = tiny_server.events("/generate", **body)
    assert "".join(event["text"] for event in events) == whole["text"]
    assert [token for event in events for token in event["output_ids"]] == whole["output_ids"]
    metas = [event["meta_info"] for event in events]
    counts = [meta["completion_tokens"] for meta in metas]
    assert counts == sorted(counts)
    assert all(meta["finish_reason"] is None for meta in metas[:-1])
    found = [meta.pop("output_token_logprobs", []) for meta in metas]
    expected = whole["meta_info"].pop("output_token_logprobs", [])
    assert [each for part in found for each in part] == expected
    assert metas[-1] == whole["meta_info"]


def test_the_default_length_is_lmdeploys(tiny_server: Served) -> None:
    answer = tiny_server.ask("/generate", prompt=PROMPT, ignore_eos=True)
    assert answer["meta_info"]["completion_tokens"] == 128
    assert answer["meta_info"]["finish_reason"] == {"type": "length"}


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({}, None, "prompt and input_ids"),
        ({"prompt": "a", "input_ids": [1]}, None, "prompt and input_ids"),
        ({"prompt": ""}, None, "empty"),
        ({"input_ids": []}, None, "empty"),
        ({"input_ids": [258]}, None, "258"),
        ({"input_ids": ["a"]}, "input_ids[0]", "'a'"),
        ({"prompt": "a", "n": 2}, "n", "not supported"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "0"),
    ],
    ids=json.dumps,
)
def test_what_generate_refuses(
    tiny_server: Served, body: dict[str, Any], param: str | None, part: str
) -> None:
    error = tiny_server.refusal("/generate", **body)
    assert error["param"] == param
    assert part in error["message"]


# ---------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("text", ["", "hi", "grüße 🦊\n\t", "</s> in between"])
def test_text_to_tokens_and_back(tiny_server: Served, text: str) -> None:
    tokens = ids_of(tiny_server, prompt=text)
    assert tokens == tiny_server.pipe.tokenizer.encode(text)
    assert text_of(tiny_server, tokens) == text


def test_special_tokens_are_left_out_if_asked(tiny_server: Served) -> None:
    tokens = ids_of(tiny_server, prompt="<s>a</s>")
    assert len(tokens) == 3
    assert text_of(tiny_server, tokens, skip_special_tokens=True) == "a"


def test_tokens_of_messages(tiny_server: Served) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokens = ids_of(tiny_server, messages=messages)
    assert text_of(tiny_server, tokens) == "[user]hi[assistant]"
    answer = tiny_server.ask("/v1/chat/completions", messages=messages, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize(
    ("path", "body", "part"),
    [
        ("/tokenize", {}, "prompt and messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0]"),
        ("/tokenize", {"prompt": "a", "nonsense": 1}, "nonsense"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [258]}, "258"),
        ("/detokenize", {"tokens": [-1]}, "-1"),
        ("/detokenize", {"tokens": [2**40]}, "tokens"),
    ],
)
def test_what_the_tokenizer_refuses(
    tiny_server: Served, path: str, body: dict[str, Any], part: str
) -> None:
    assert part in tiny_server.refusal(path, **body)["message"]


def test_half_a_character_is_no_text(tiny_server: Served) -> None:
    with tiny_server.client(headers={"Content-Type": "application/json"}) as client:
        for path in ("/tokenize", "/generate", "/v1/completions"):
            answer = client.post(path, content=json.dumps({"prompt": "\ud800"}))
            assert answer.status_code == 400, answer.text
            assert "surrogate" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_another_model_is_not_found(tiny_server: Served, path: str, body: dict[str, Any]) -> None:
    assert tiny_server.post(path, {"model": "gpt-4", **body}).status_code == 404
    assert tiny_server.post(path, {"model": "tiny", **body}).status_code == 200
