"""/v1/completions: what its parameters mean, measured by the pipeline beneath."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from kvant import EngineConfig, GenerationConfig, Response, pipeline
from kvant.formats import PAGE_TOKENS
from tests.server.conftest import Served, serving

PATH = "/v1/completions"
PROMPT = "The quick brown fox"
EOS = 257  # of the tiny model, whose other tokens are bytes
SAMPLED = {"temperature": 0.9, "seed": 11}


def infer(served: Served, prompt: str = PROMPT, **gen: Any) -> Response:
    found = served.pipe.infer(prompt, GenerationConfig(**gen), do_preprocess=False)
    assert isinstance(found, Response)
    return found


def texts(answer: Any) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def text(answer: Any) -> str:
    (found,) = texts(answer)
    return found


def gathered(events: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """The choices of a stream, put together as a client does it."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        assert event["object"] == "text_completion"
        for choice in event["choices"]:
            whole = found.setdefault(
                choice["index"], {"text": "", "logprobs": None, "finish_reason": None}
            )
            assert whole["finish_reason"] is None, "something follows the end"
            whole["text"] += choice["text"]
            whole["finish_reason"] = choice["finish_reason"]
            if (new := choice["logprobs"]) is not None and whole["logprobs"] is not None:
                old = whole["logprobs"]
                new = {name: None if new[name] is None else old[name] + new[name] for name in old}
            whole["logprobs"] = new or whole["logprobs"]
    return found


# ------------------------------------------------------------------------------------- the pipeline

CONFIGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0}, {}),
    ({}, {"temperature": 1.0}),
    ({"temperature": 0.7}, {"temperature": 0.7}),
    ({"top_k": 5}, {"temperature": 1.0, "top_k": 5}),
    ({"top_p": 0.5}, {"temperature": 1.0, "top_p": 0.5}),
    ({"min_p": 0.3}, {"temperature": 1.0, "min_p": 0.3}),
    ({"presence_penalty": 2}, {"temperature": 1.0, "presence_penalty": 2}),
    ({"frequency_penalty": -1}, {"temperature": 1.0, "frequency_penalty": -1}),
    ({"repetition_penalty": 1.5}, {"temperature": 1.0, "repetition_penalty": 1.5}),
    ({"logit_bias": {"65": 5.5, "66": -7}}, {"temperature": 1.0, "logit_bias": {65: 5.5, 66: -7}}),
    ({"bad_words": ["b", "S"]}, {"temperature": 1.0, "bad_words": ["b", "S"]}),
    ({"stop_token_ids": [100, 200]}, {"temperature": 1.0, "stop_token_ids": [100, 200]}),
]


@pytest.mark.parametrize(("body", "gen"), CONFIGS, ids=lambda each: json.dumps(each)[:40])
def test_parameters_are_the_pipelines(
    tiny_server: Served, body: dict[str, Any], gen: dict[str, Any]
) -> None:
    sampling = {"do_sample": True, "top_k": 0} if gen else {}
    expected = infer(tiny_server, **sampling | {"random_seed": 7, "max_new_tokens": 80} | gen)
    answer = tiny_server.ask(PATH, prompt=PROMPT, max_tokens=80, seed=7, **body)
    assert text(answer) == expected.text
    assert answer["choices"][0]["finish_reason"] == expected.finish_reason
    assert answer["usage"]["completion_tokens"] == expected.generate_token_len
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)


def test_every_parameter_changes_the_text(tiny_server: Served) -> None:
    found = [
        text(tiny_server.ask(PATH, prompt=PROMPT, max_tokens=80, seed=7, **body))
        for body, _ in CONFIGS
    ]
    assert len(set(found)) == len(CONFIGS)


@pytest.mark.parametrize("body", [{"top_k": 1}, {"top_p": 0}, {"min_p": 1}, {"temperature": 1e-6}])
def test_extremes_are_greedy(tiny_server: Served, body: dict[str, Any]) -> None:
    greedy = text(tiny_server.ask(PATH, prompt=PROMPT, temperature=0, max_tokens=40))
    assert text(tiny_server.ask(PATH, prompt=PROMPT, max_tokens=40, **body)) == greedy


@pytest.mark.parametrize("body", [{"top_k": 0}, {"top_k": -1}, {"top_p": 1}, {"min_p": 0}])
def test_neutral_values_change_nothing(tiny_server: Served, body: dict[str, Any]) -> None:
    plain = text(tiny_server.ask(PATH, prompt=PROMPT, seed=3, max_tokens=40))
    assert text(tiny_server.ask(PATH, prompt=PROMPT, seed=3, max_tokens=40, **body)) == plain


def test_null_is_the_default(tiny_server: Served) -> None:
    names = ("temperature", "top_p", "top_k", "min_p", "stop", "n", "logprobs", "best_of", "echo")
    nulls: dict[str, Any] = dict.fromkeys([*names, "logit_bias", "stream", "user", "suffix"])
    plain = tiny_server.ask(PATH, prompt=PROMPT, seed=3)
    assert texts(tiny_server.ask(PATH, prompt=PROMPT, seed=3, **nulls)) == texts(plain)
    assert plain["usage"]["completion_tokens"] == 16  # OpenAI's default


# ---------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3},
        {"prompt": [PROMPT, "another"], "n": 2, "logprobs": 1},
        {"echo": True},
        {"logprobs": 3},
        {"logprobs": 0},
        {"echo": True, "logprobs": 2, "n": 2},
        {"echo": True, "logprobs": 2, "max_tokens": 0},
        {"echo": True, "max_tokens": 0, "n": 2},
        {"stop": ["a", "e\ufffd"]},
        {"logit_bias": {str(EOS): 100}},
        {"guided_regex": "[a-z ]{5,9}"},
    ],
    ids=lambda body: json.dumps(body)[:40],
)
def test_a_stream_adds_up_to_the_answer(tiny_server: Served, body: dict[str, Any]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 40, **SAMPLED, **body}
    whole = tiny_server.ask(PATH, **body)
    *events, last = tiny_server.events(PATH, **body, stream_options={"include_usage": True})
    assert gathered(events) == {
        choice.pop("index"): choice for choice in json.loads(json.dumps(whole["choices"]))
    }
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events)
    assert len({event["id"] for event in [*events, last]}) == 1
    assert {event["model"] for event in [*events, last]} == {"tiny"}


def test_usage_is_not_streamed_unasked(tiny_server: Served) -> None:
    events = tiny_server.events(PATH, prompt=PROMPT)
    assert not any("usage" in event for event in events)
    assert all(len(event["choices"]) == 1 for event in events)


# ---------------------------------------------------------------------------- several completions


def test_completion_i_has_seed_plus_i(tiny_server: Served) -> None:
    together = texts(tiny_server.ask(PATH, prompt=PROMPT, n=3, seed=5))
    alone = [text(tiny_server.ask(PATH, prompt=PROMPT, seed=5 + i)) for i in range(3)]
    assert together == alone
    assert len(set(alone)) == 3


def test_without_a_seed_answers_differ(tiny_server: Served) -> None:
    assert len(set(texts(tiny_server.ask(PATH, prompt=PROMPT, n=4)))) == 4


def test_best_of_picks_the_likeliest(tiny_server: Served) -> None:
    every = tiny_server.ask(PATH, prompt=PROMPT, n=5, seed=1, logprobs=0)
    found = tiny_server.ask(PATH, prompt=PROMPT, n=2, best_of=5, seed=1)

    def mean(choice: Any) -> float:
        return float(np.mean(choice["logprobs"]["token_logprobs"]))

    ranked = sorted(every["choices"], key=mean, reverse=True)
    assert texts(found) == [choice["text"] for choice in ranked[:2]]
    assert [choice["logprobs"] for choice in found["choices"]] == [None, None]
    assert found["usage"] == every["usage"]  # all of them were generated


def test_usage_counts_a_prompt_once(tiny_server: Served) -> None:
    usage = tiny_server.ask(PATH, prompt=[PROMPT, "and"], n=3, max_tokens=4, ignore_eos=True)[
        "usage"
    ]
    assert usage["prompt_tokens"] == len(PROMPT) + len("and")
    assert usage["completion_tokens"] == 2 * 3 * 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_usage_of_scored_prompts(tiny_server: Served) -> None:
    usage = tiny_server.ask(PATH, prompt=PROMPT, n=2, max_tokens=0, echo=True)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(PROMPT), 0)


def test_a_repeated_prompt_is_found_in_the_cache(tiny_server: Served) -> None:
    body = {"prompt": "only this test says so " * 9, "max_tokens": 1, "temperature": 0}
    first, again = (tiny_server.ask(PATH, **body) for _ in range(2))
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    whole_pages = first["usage"]["prompt_tokens"] // PAGE_TOKENS * PAGE_TOKENS
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == whole_pages > 0
    assert texts(first) == texts(again)


# ------------------------------------------------------------------------------------- prompts


def test_prompts_are_texts_or_ids(tiny_server: Served) -> None:
    tokens = {each: served_ids(tiny_server, each) for each in ("one", "three")}
    alone = {each: text(tiny_server.ask(PATH, prompt=each, temperature=0)) for each in tokens}
    expected = [alone["one"], alone["three"]]
    for prompt in (["one", "three"], [tokens["one"], tokens["three"]]):
        assert texts(tiny_server.ask(PATH, prompt=prompt, temperature=0)) == expected
    assert text(tiny_server.ask(PATH, prompt=tokens["one"], temperature=0)) == alone["one"]
    assert text(tiny_server.ask(PATH, prompt=["one"], temperature=0)) == alone["one"]


def served_ids(served: Served, prompt: str) -> list[int]:
    found: list[int] = served.ask("/tokenize", prompt=prompt)["tokens"]
    return found


def test_echo_puts_the_prompt_first(tiny_server: Served) -> None:
    plain = text(tiny_server.ask(PATH, prompt=PROMPT, temperature=0))
    prompts = (PROMPT, [PROMPT], served_ids(tiny_server, PROMPT))
    for prompt in prompts:
        assert (
            text(tiny_server.ask(PATH, prompt=prompt, temperature=0, echo=True)) == PROMPT + plain
        )
    assert text(tiny_server.ask(PATH, prompt=PROMPT, max_tokens=0, echo=True)) == PROMPT


# -------------------------------------------------------------------------------------- logprobs


def log_softmax(logits: Any) -> Any:
    exact = logits.astype(np.float64)
    top = exact.max(axis=-1, keepdims=True)
    return exact - top - np.log(np.exp(exact - top).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("max_tokens", [0, 6])
def test_echoed_logprobs_are_those_of_the_logits(tiny_server: Served, max_tokens: int) -> None:
    body = {"prompt": PROMPT, "echo": True, "logprobs": 4, "temperature": 0}
    found = tiny_server.ask(PATH, **body, max_tokens=max_tokens)["choices"][0]["logprobs"]
    whole = infer(tiny_server, max_new_tokens=max(max_tokens, 1), output_logits="all")
    ids = [*served_ids(tiny_server, PROMPT), *whole.token_ids[:max_tokens]]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert whole.logits is not None
    rows = log_softmax(whole.logits)
    for position in range(1, len(ids)):
        row = rows[position - 1]
        assert found["token_logprobs"][position] == pytest.approx(row[ids[position]], abs=1e-4)
        top = found["top_logprobs"][position]
        best = np.sort(row)[::-1]
        assert next(iter(top.values())) == pytest.approx(best[0], abs=1e-4)
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert min(top.values()) >= min(best[3], row[ids[position]]) - 1e-4
    assert len(found["tokens"]) == len(found["text_offset"]) == len(ids)


def test_logprobs_are_the_models_own(tiny_server: Served) -> None:
    """Before temperature, penalties and biases, as the pipeline has it."""
    changed = {"temperature": 0.3, "presence_penalty": 1.5, "logit_bias": {"65": 9}}
    answer = tiny_server.ask(PATH, prompt=PROMPT, seed=2, logprobs=2, max_tokens=8, **changed)
    expected = infer(
        tiny_server, max_new_tokens=8, do_sample=True, top_k=0, random_seed=2, logprobs=2,
        temperature=0.3, presence_penalty=1.5, logit_bias={65: 9},
    )  # fmt: skip
    assert expected.logprobs is not None
    pairs = zip(expected.token_ids, expected.logprobs, strict=True)
    found = answer["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [likely[token] for token, likely in pairs]


def test_the_chosen_token_is_among_the_top(tiny_server: Served) -> None:
    answer = tiny_server.ask(
        PATH, prompt=PROMPT, logprobs=1, max_tokens=30, guided_regex="[a-z]{30}", seed=4
    )
    found = answer["choices"][0]["logprobs"]
    assert any(len(top) == 2 for top in found["top_logprobs"])  # the constraint chose others
    each = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    assert all(top[token] == logprob for token, logprob, top in each)
    assert "".join(found["tokens"]) == text(answer)


def test_offsets_are_of_the_text(tiny_server: Served) -> None:
    body = {"prompt": PROMPT, "guided_regex": "[a-z]{9}", "logprobs": 0}
    for echo, before in ((False, ""), (True, PROMPT)):
        (choice,) = tiny_server.ask(PATH, **body, echo=echo)["choices"]
        found = choice["logprobs"]
        assert choice["text"].startswith(before) and len(choice["text"]) == len(before) + 9
        assert found["top_logprobs"] is None
        pairs = zip(found["tokens"], found["text_offset"], strict=True)
        assert all(choice["text"].startswith(token, offset) for token, offset in pairs)


def test_no_logprobs_unasked(tiny_server: Served) -> None:
    assert tiny_server.ask(PATH, prompt=PROMPT)["choices"][0]["logprobs"] is None


# ------------------------------------------------------------------------------------------ the end


def test_a_stop_string_ends_the_text(tiny_server: Served) -> None:
    whole = text(tiny_server.ask(PATH, prompt=PROMPT, temperature=0, max_tokens=60))
    stop = whole[20:24]  # several tokens, as tokens are bytes
    cut = whole[: whole.index(stop)]
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 60}
    for given in (stop, [stop], ["not there", stop]):
        answer = tiny_server.ask(PATH, **body, stop=given)
        assert text(answer) == cut
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] < 60
    answer = tiny_server.ask(PATH, **body, stop=stop, include_stop_str_in_output=True)
    assert text(answer) == cut + stop
    assert gathered(tiny_server.events(PATH, **body, stop=stop))[0]["text"] == cut


def test_the_stop_string_that_is_complete_first_wins(tiny_server: Served) -> None:
    body = {"prompt": PROMPT, "guided_choice": ["abcdefgh"]}
    assert text(tiny_server.ask(PATH, **body, stop=["bcdefg", "cd"])) == "ab"
    assert text(tiny_server.ask(PATH, **body, stop=["defgh", "efgz", "h"])) == "abc"
    assert text(tiny_server.ask(PATH, **body, stop=["x"])) == "abcdefgh"
    assert text(tiny_server.ask(PATH, **body, stop="")) == "abcdefgh"
    assert text(tiny_server.ask(PATH, **body, stop=[])) == "abcdefgh"


def test_a_stop_token_ends_the_text(tiny_server: Served) -> None:
    ids = infer(tiny_server, max_new_tokens=30).token_ids
    token = ids[12]
    answer = tiny_server.ask(
        PATH, prompt=PROMPT, temperature=0, max_tokens=30, stop_token_ids=[token]
    )
    before = ids[: ids.index(token)]
    assert text(answer) == tiny_server.pipe.tokenizer.decode(before)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(before)


def test_end_tokens(tiny_server: Served) -> None:
    ending = {"prompt": PROMPT, "max_tokens": 9, "logit_bias": {str(EOS): 100}}
    at_once = tiny_server.ask(PATH, **ending)
    assert text(at_once) == "" and at_once["choices"][0]["finish_reason"] == "stop"
    later = tiny_server.ask(PATH, **ending, min_tokens=5)
    assert later["usage"]["completion_tokens"] == 5
    assert later["choices"][0]["finish_reason"] == "stop"
    never = tiny_server.ask(PATH, **ending, ignore_eos=True)
    assert never["usage"]["completion_tokens"] == 9
    assert (text(never), never["choices"][0]["finish_reason"]) == ("", "length")
    shown = tiny_server.ask(PATH, **ending, ignore_eos=True, skip_special_tokens=False)
    assert text(shown) == 9 * "</s>"


def test_biases_ban_and_force(tiny_server: Served) -> None:
    body = {"prompt": PROMPT, "n": 4}
    (letter,) = served_ids(tiny_server, "A")
    forced = tiny_server.ask(PATH, **body, max_tokens=5, logit_bias={str(letter): 100})
    assert texts(forced) == 4 * ["AAAAA"]
    digits = {str(token): -100 for token in served_ids(tiny_server, "0123456789")}
    banned = tiny_server.ask(
        PATH, **body, guided_regex="[0-9a]{20}", max_tokens=20, logit_bias=digits
    )
    assert texts(banned) == 4 * [20 * "a"]


# -------------------------------------------------------------------------------------- constraints

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"enum": ["x", "y"]},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
GRAMMAR = 'start: "<" /[0-9]{3}/ ">"'


@pytest.mark.parametrize("place", ["guided", "structured_outputs"])
@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("json", SCHEMA, None),
        ("json", json.dumps(SCHEMA), None),
        ("regex", "(ab|cd){3}", r"(ab|cd){3}"),
        ("choice", ["yes", "no", "perhaps"], r"yes|no|perhaps"),
        ("grammar", GRAMMAR, r"<\d{3}>"),
    ],
)
def test_constraints_hold(
    tiny_server: Served, place: str, kind: str, value: Any, pattern: str | None
) -> None:
    body = {f"guided_{kind}": value} if place == "guided" else {place: {kind: value}}
    answer = tiny_server.ask(PATH, prompt=PROMPT, max_tokens=200, n=2, seed=1, **body)
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        follows(choice["text"], pattern)


def follows(found: str, pattern: str | None) -> None:
    if pattern is not None:
        assert re.fullmatch(pattern, found)
        return
    value = json.loads(found)
    assert set(value) == {"a", "b"} and 0 <= value["a"] <= 99 and value["b"] in ("x", "y")


def test_response_format_constrains_completions_too(tiny_server: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    body = {"prompt": PROMPT, "max_tokens": 200, "seed": 1}
    follows(text(tiny_server.ask(PATH, **body, response_format=form)), None)
    plain = text(tiny_server.ask(PATH, prompt=PROMPT, temperature=0))
    form = {"type": "text"}
    assert text(tiny_server.ask(PATH, prompt=PROMPT, temperature=0, response_format=form)) == plain


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"suffix": "end"}, "suffix", ""),
        ({"nonsense": 1}, "nonsense", "not supported"),
        ({"max_tokens": 0}, None, "echo"),
        ({"max_tokens": -1}, "max_tokens", "-1"),
        ({"max_tokens": "7"}, "max_tokens", "'7'"),
        ({"n": 2, "best_of": 1}, None, "best_of"),
        ({"best_of": 2, "stream": True}, None, "stream"),
        ({"n": 129}, "n", "128"),
        ({"n": 65, "prompt": ["a", "b"]}, "n", "130"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ""}, None, "empty"),
        ({"prompt": [[]]}, None, "empty"),
        ({"prompt": [1, 2, 258]}, None, "258"),
        ({"prompt": [-1]}, "prompt", ""),
        ({"prompt": ["a", 1]}, "prompt", ""),
        ({"prompt": "a" * 9000}, None, "8192"),
        ({"temperature": 2.1}, "temperature", "2.1"),
        ({"temperature": True}, "temperature", ""),
        ({"top_p": 1.1}, "top_p", "1.1"),
        ({"top_k": -2}, "top_k", "-2"),
        ({"min_p": -0.1}, "min_p", ""),
        ({"presence_penalty": 3}, "presence_penalty", ""),
        ({"repetition_penalty": 0}, "repetition_penalty", ""),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "a"),
        ({"logit_bias": {"258": 1}}, "logit_bias", "258"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "100"),
        ({"stop": [""]}, "stop", ""),
        ({"stop": [str(i) for i in range(17)]}, "stop", "16"),
        ({"stop_token_ids": [258]}, "stop_token_ids", "258"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "one of them"),
        ({"guided_regex": "("}, "guided_regex", "regex"),
        ({"guided_json": "{"}, "guided_json", "JSON"),
        ({"guided_choice": []}, "guided_choice", "choice"),
        ({"guided_grammar": "x" * 70000}, "guided_grammar", "65536"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    ],
    ids=lambda each: json.dumps(each)[:40],
)
def test_what_is_refused(
    tiny_server: Served, body: dict[str, Any], param: str | None, part: str
) -> None:
    error = tiny_server.refusal(PATH, **{"prompt": PROMPT, **body})
    assert error["param"] == param
    assert part in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_a_prompt_is_needed(tiny_server: Served) -> None:
    assert tiny_server.refusal(PATH, max_tokens=3)["param"] == "prompt"


def test_another_model_is_not_found(tiny_server: Served) -> None:
    answer = tiny_server.post(PATH, {"model": "gpt-4", "prompt": PROMPT})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert '"tiny"' in error["message"]
    assert tiny_server.ask(PATH, model="tiny", prompt=PROMPT)["model"] == "tiny"


# -------------------------------------------------------------------------------- a small context


@pytest.fixture(scope="module")
def small_server(tiny: str) -> Iterator[Served]:
    with serving(pipeline(tiny, EngineConfig(session_len=64, kv_tokens=1024))) as served:
        yield served


def test_what_exceeds_the_context_is_cut(small_server: Served) -> None:
    answer = small_server.ask(PATH, prompt=PROMPT, max_tokens=10**6, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 64
    assert answer["choices"][0]["finish_reason"] == "length"
    fewest = {"max_tokens": 10**6, "min_tokens": 10**6}
    assert small_server.ask(PATH, prompt=PROMPT, **fewest)["usage"]["total_tokens"] == 64


def test_a_prompt_that_fills_the_context_can_be_scored(small_server: Served) -> None:
    full = "a" * 64
    assert "64 with one to generate" in small_server.refusal(PATH, prompt=full)["message"]
    answer = small_server.ask(PATH, prompt=full, max_tokens=0, echo=True, logprobs=1)
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 64
    assert not math.isnan(answer["choices"][0]["logprobs"]["token_logprobs"][-1])
