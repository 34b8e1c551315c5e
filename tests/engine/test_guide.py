"""Constrained generation: what comes out matches, whatever runs beside it and whoever asks."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from kvant import EngineConfig, GenerationConfig, ModelError, Pipeline, Response, pipeline
from kvant.engine.guide import Guide, GuideFactory, GuideLimits
from kvant.engine.sampler import sample
from kvant.errors import RequestError
from kvant.loading.sentencepiece import SentencePiece, TokenKind
from kvant.loading.tokenizer import Tokenizer
from kvant.models.logits import HostLogits
from kvant.request import Request
from tests.byte_model import VOCAB

PROMPT = "Say something:"
SCHEMA = {
    "type": "object",
    "properties": {
        "größe": {"type": "integer", "minimum": 0, "maximum": 999},
        "b": {"type": "array", "items": {"enum": ["x", "ü", '"']}, "minItems": 1, "maxItems": 3},
        "a": {"type": "string", "maxLength": 5},
    },
    "required": ["größe", "b", "a"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", "not", "maybe ü\n", 'a "b" \\ 😀', "it's"]


def schema_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["größe", "b", "a"]
        and value["größe"] in range(1000)
        and 1 <= len(value["b"]) <= 3
        and set(value["b"]) <= {"x", "ü", '"'}
        and len(value["a"]) <= 5
    )


FORMS: dict[str, tuple[dict[str, Any], Callable[[str], object]]] = {
    "schema": (schema_of(SCHEMA), is_of_schema),
    "object": ({"type": "json_object"}, lambda text: isinstance(json.loads(text), dict)),
    "regex": (
        {"type": "regex", "regex": r"[a-z]{2,6}(é|😀|\d){2}!"},
        lambda text: re.fullmatch(r"[a-z]{2,6}(é|😀|\d){2}!", text),
    ),
    "regex_schema": (
        {"type": "regex_schema", "regex_schema": "(ab|c){1,9}"},
        lambda text: re.fullmatch("(ab|c){1,9}", text),
    ),
    "choice": ({"type": "choice", "choice": CHOICES}, lambda text: text in CHOICES),
    "grammar": (
        {"type": "grammar", "grammar": 'start: "(" x ")"\nx: /[a-z]/ | "<" x ">"'},
        lambda text: (
            re.fullmatch(r"\((<*)[a-z](>*)\)", text) and text.count("<") == text.count(">")
        ),
    ),
}


def hot(form: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> GenerationConfig:
    """Sampling from nearly all tokens alike."""
    base = {"do_sample": True, "temperature": 2.0, "top_k": 0, "max_new_tokens": 600}
    return GenerationConfig(**base | {"random_seed": seed, "response_format": form} | options)


@pytest.fixture(scope="module")
def pipe(tiny: str) -> Iterator[Pipeline]:
    with pipeline(tiny, EngineConfig(kv_tokens=8192, check=True)) as pipe:
        yield pipe


def one(pipe: Pipeline, gen: GenerationConfig) -> Response:
    response = pipe(PROMPT, gen)
    assert isinstance(response, Response)
    return response


def many(pipe: Pipeline, gens: list[GenerationConfig]) -> list[Response]:
    responses = pipe([PROMPT] * len(gens), gens)
    assert isinstance(responses, list)
    return responses


@pytest.mark.parametrize("name", FORMS)
def test_every_text_is_of_its_form_whatever_runs_beside_it(pipe: Pipeline, name: str) -> None:
    """A json_object may be cut off by the limit of tokens; a random model writes long ones."""
    form, matches = FORMS[name]
    gens = [hot(form, seed) for seed in range(6)]
    free = hot(seed=77, max_new_tokens=40)
    *guided, beside = many(pipe, [*gens, free])
    assert all(r.finish_reason == "stop" or name == "object" for r in guided)
    ended = [r.text for r in guided if r.finish_reason == "stop"]
    assert ended and all(matches(text) for text in ended)
    assert len({r.text for r in guided}) > 1
    assert beside.text == one(pipe, free).text
    assert guided[2].token_ids == one(pipe, gens[2]).token_ids


def test_the_most_likely_tokens_match_too(pipe: Pipeline) -> None:
    assert is_of_schema(one(pipe, GenerationConfig(response_format=schema_of(SCHEMA))).text)


def test_text_is_no_constraint(pipe: Pipeline) -> None:
    free = hot(max_new_tokens=20)
    assert one(pipe, hot({"type": "text"}, max_new_tokens=20)).text == one(pipe, free).text


def test_each_of_n_has_a_guide_of_its_own(pipe: Pipeline) -> None:
    form = schema_of(SCHEMA)
    texts = [r.text for r in many(pipe, [hot(form, seed=5, n=4)])]
    assert all(map(is_of_schema, texts))
    assert texts == [one(pipe, hot(form, seed=5 + number)).text for number in range(4)]


def test_preemption_changes_nothing(tiny: str, pipe: Pipeline) -> None:
    form = {"type": "regex", "regex": "([a-z]{9} ){25}[0-9]"}
    gens = [hot(form, seed, ignore_eos=True) for seed in range(5)]
    with pipeline(tiny, EngineConfig(kv_tokens=640, check=True)) as small:
        found = many(small, gens)
        assert small.model.engine.stats().preemptions > 0
    assert [r.token_ids for r in found] == [one(pipe, gen).token_ids for gen in gens]
    assert all(re.fullmatch(form["regex"], r.text) for r in found)


def test_a_complete_text_ends_without_an_end_token(pipe: Pipeline) -> None:
    """Also with ``ignore_eos``, and before ``min_new_tokens``."""
    form = {"type": "choice", "choice": ["yes"]}
    for options in ({}, {"ignore_eos": True}, {"min_new_tokens": 50}):
        response = one(pipe, hot(form, **options))
        assert (response.text, response.finish_reason) == ("yes", "stop")


def test_ignore_eos_goes_on_while_the_form_allows_more(pipe: Pipeline) -> None:
    form = {"type": "regex", "regex": "a*b?"}
    end = pipe.tokenizer.eos_ids[0]
    wish = {"logit_bias": {end: 100.0}}
    assert one(pipe, hot(form, **wish)).text == ""
    response = one(pipe, hot(form, ignore_eos=True, bad_token_ids=[ord("b") - 33], **wish))
    assert response.finish_reason in ("stop", "length") and response.generate_token_len > 0
    longer = one(pipe, hot({"type": "regex", "regex": "a*"}, min_new_tokens=7, **wish))
    assert longer.text == "a" * 7


def test_stop_words_and_the_limit_of_tokens_cut_a_text(pipe: Pipeline) -> None:
    form = {"type": "choice", "choice": ["abcdef"]}
    stopped = one(pipe, hot(form, stop_words=["cd"]))
    assert (stopped.text, stopped.finish_reason) == ("ab", "stop")
    cut = one(pipe, hot(form, max_new_tokens=3))
    assert (cut.text, cut.finish_reason) == ("abc", "length")
    whole = one(pipe, hot(form, max_new_tokens=6))
    assert (whole.text, whole.finish_reason) == ("abcdef", "stop")


def test_bans_that_leave_nothing_are_an_error_of_the_request(pipe: Pipeline) -> None:
    form = {"type": "choice", "choice": ["abc"]}
    (banned,) = pipe.tokenizer.encode("b", add_special=False)
    response = one(pipe, hot(form, bad_token_ids=[banned]))
    assert response.finish_reason == "error"
    assert "response_format" in (response.error_message or "")


def test_log_probabilities_stay_the_models_own(pipe: Pipeline) -> None:
    response = one(pipe, hot({"type": "choice", "choice": ["ok"]}, logprobs=3))
    assert response.logprobs is not None
    first = response.logprobs[0]
    assert len(first) >= 3 and max(first.values()) < 0
    assert response.token_ids[0] in first and max(first, key=first.__getitem__) in first
    alone = one(pipe, GenerationConfig(max_new_tokens=1, logprobs=3))
    assert alone.logprobs is not None
    common = {t: v for t, v in first.items() if t in alone.logprobs[0]}
    assert len(common) >= 3 and common == {t: alone.logprobs[0][t] for t in common}


def test_white_space_of_json_is_bounded(pipe: Pipeline) -> None:
    """Held down: a model that likes line breaks writes them until its tokens run out."""
    blanks = {token: 100.0 for text in " \n\t" for token in pipe.tokenizer.encode(text)}
    response = one(pipe, hot(schema_of(SCHEMA), logit_bias=blanks))
    assert response.finish_reason == "stop" and is_of_schema(response.text)
    assert not re.search(r"\n[ \t]*\n|[ \t]{22}", response.text)


# ------------------------------------------------------------------------------- hostile sources

_REFS = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(1500)} | {"a1500": {}}
_DEEP: dict[str, Any] = {}
for _ in range(600):
    _DEEP = {"type": "array", "items": _DEEP}
_RULES = "\n".join(f"a{i}: a{i + 1}" for i in range(3500))

REFUSED = {
    "keyword not": (schema_of({"not": {"type": "string"}}), '"not"'),
    "keyword if": (schema_of({"if": {}, "then": {}}), '"if"'),
    "uniqueItems": (schema_of({"type": "array", "uniqueItems": True}), '"uniqueItems"'),
    "format": (schema_of({"type": "string", "format": "foo"}), "foo"),
    "type": (schema_of({"type": "foo"}), "foo"),
    "unsatisfiable": (schema_of({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    "endless": (schema_of({"$ref": "#"}), "no text"),
    "external": (schema_of({"$ref": "http://example.com/x.json"}), "example.com"),
    "file": (schema_of({"$ref": "file:///etc/passwd"}), "passwd"),
    "many references": (schema_of({"$ref": "#/$defs/a0", "$defs": _REFS}), "deep"),
    "deep": (schema_of(_DEEP), "recursion"),
    "product": (
        schema_of(
            {"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": 99 - i}]} for i in range(24)]}
        ),
        "too large",
    ),
    "options": (schema_of({"x-guidance": {"whitespace_flexible": True}}), "x-guidance"),
    "not JSON": (schema_of({"const": float("nan")}), "JSON"),
    "no Unicode": (schema_of({"const": "\ud800"}), "surrogate"),
    "long": ({"type": "regex", "regex": "x" * 70_000}, "65536"),
    "broken regex": ({"type": "regex", "regex": "("}, "unclosed group"),
    "look-ahead": ({"type": "regex", "regex": "(?=a)b"}, "look-ahead"),
    "brackets": ({"type": "regex", "regex": "(" * 9000 + "a" + ")" * 9000}, "nest"),
    "empty": ({"type": "regex", "regex": "()"}, "empty text"),
    "no start": ({"type": "grammar", "grammar": "foo: /a/"}, "start"),
    "unknown rule": ({"type": "grammar", "grammar": "start: foo"}, "foo"),
    "endless rule": ({"type": "grammar", "grammar": "start: start"}, "no text"),
    "deep rules": ({"type": "grammar", "grammar": f'start: a0\n{_RULES}\na3500: "x"'}, "deep"),
    "powers": (
        {
            "type": "grammar",
            "grammar": "start: A0\n"
            + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60))
            + '\nA60: "x"',
        },
        "too big",
    ),
    "surrogate": ({"type": "choice", "choice": ["a", "\ud800"]}, "surrogate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_source_that_cannot_be_followed_is_refused_with_its_reason(
    pipe: Pipeline, name: str
) -> None:
    form, reason = REFUSED[name]
    with pytest.raises(RequestError) as error:
        one(pipe, hot(form))
    message = str(error.value)
    assert reason in message and "\n" not in message and len(message) < 420
    assert one(pipe, hot({"type": "regex", "regex": "a[bc]d"})).text in ("abd", "acd")


_BOTH = " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(10, 70))


@pytest.mark.parametrize(
    ("limits", "form", "reason"),
    (
        (
            GuideLimits(max_seconds=0.5),
            {"type": "grammar", "grammar": f"start: X\nX: {_BOTH}"},
            "limit of 0.5 s",
        ),
        (
            GuideLimits(max_memory=2**24),
            schema_of({"type": "integer", "multipleOf": 200_003}),
            "limit of 16 MiB",
        ),
    ),
)
def test_a_compilation_is_bounded_in_time_and_memory(
    pipe: Pipeline, limits: GuideLimits, form: dict[str, Any], reason: str
) -> None:
    """llguidance counts no steps while it intersects regexes or divides numbers."""
    factory = GuideFactory(pipe.tokenizer, VOCAB, limits)
    with pytest.raises(RequestError, match=reason):
        factory.make(hot(form))
    assert factory.make(hot({"type": "regex", "regex": "abc"}))[0] is not None


@pytest.mark.parametrize(
    "form",
    (
        {"type": "regex", "regex": "((a{1000}){1000}){1000}"},
        schema_of({"type": "object", "properties": {f"k{i}": {} for i in range(2000)}}),
    ),
)
def test_a_limit_while_generating_ends_the_request_alone(
    pipe: Pipeline, form: dict[str, Any]
) -> None:
    broken, beside = many(pipe, [hot(form), hot(FORMS["choice"][0])])
    assert broken.finish_reason == "error" and "response_format" in (broken.error_message or "")
    assert len(broken.text) == broken.generate_token_len
    assert beside.text in CHOICES


def test_no_process_without_need_and_none_left_behind(pipe: Pipeline) -> None:
    factory = GuideFactory(pipe.tokenizer, VOCAB)
    factory.make(hot())
    assert factory._parts is None
    factory.make(hot({"type": "json_object"}))
    assert factory._parts is not None and factory._parts[1]._process is None
    factory.make(hot({"type": "regex", "regex": "a"}))
    process = factory._parts[1]._process
    assert process is not None and process.poll() is None
    del factory
    gc.collect()
    assert process.poll() is not None


# ------------------------------------------------------------------------------------ tokenizers


def follow(tokenizer: Tokenizer, size: int, form: dict[str, Any], seed: int) -> str:
    """The text of random allowed tokens of a model with logits of ``size`` tokens."""
    factory = GuideFactory(tokenizer, size)
    (guide,) = factory.make(hot(form))
    assert isinstance(guide, Guide)
    random, tokens = np.random.default_rng(seed), list[int]()
    while not guide.ended and guide.error is None and len(tokens) < 500:
        logits = np.zeros(size, np.float32)
        guide.apply(logits)
        token = int(random.choice(np.flatnonzero(logits == 0)))
        if token in tokenizer.eos_ids:
            break
        tokens.append(token)
        guide.take(token)
    assert guide.error is None
    return tokenizer.decode([0, *tokens])[len(tokenizer.decode([0])) :]


def byte_tokenizer(*merges: tuple[str, str], eos_ids: tuple[int, ...] = ()) -> Tokenizer:
    """Tokens are bytes and what ``merges`` makes of them, in the letters that stand for bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*letters, *map("".join, merges)])}
    backend = Backend(models.BPE(vocab, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<turn>"])
    return Tokenizer(backend, eos_ids=eos_ids)


def test_tokens_may_cut_characters() -> None:
    """ "ü" is Ã¼ in the letters that stand for bytes: here half of it is in a token with "a"."""
    tokenizer = byte_tokenizer(("a", "Ã"), ("¼", "b"), eos_ids=(258,))
    form = {"type": "regex", "regex": "(aüb|é){1,8}"}
    texts = {follow(tokenizer, tokenizer.vocab_size, form, seed) for seed in range(8)}
    assert all(re.fullmatch(form["regex"], text) for text in texts) and len(texts) > 1


@pytest.mark.parametrize("extra", (300, 1, 0, -2))
def test_logits_may_be_wider_or_narrower_than_the_tokenizer(extra: int) -> None:
    """Without the special tokens, the last three, no end token can be generated."""
    tokenizer = byte_tokenizer(eos_ids=(257, 256, 99999))
    for name in ("schema", "choice", "regex"):
        form, matches = FORMS[name]
        assert matches(follow(tokenizer, tokenizer.vocab_size + extra, form, 1))


def test_all_end_tokens_end_and_no_other_special_token_is_text() -> None:
    tokenizer = byte_tokenizer(eos_ids=(257, 258))
    (guide,) = GuideFactory(tokenizer, 300).make(hot({"type": "regex", "regex": "[^a]*"}))
    logits = np.zeros(300, np.float32)
    assert guide is not None
    guide.apply(logits)
    assert set(np.flatnonzero(logits == 0)) & set(range(256, 300)) == {257, 258}


def test_a_model_without_end_tokens() -> None:
    tokenizer = byte_tokenizer()
    form, matches = FORMS["schema"]
    assert matches(follow(tokenizer, tokenizer.vocab_size, form, 3))


def test_sentencepiece_with_bytes_for_unknown_characters() -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.CONTROL, *[TokenKind.BYTE] * 256]
    words = ["▁", "a", "b", "▁a", "ab", "▁ab", "é"]
    model = SentencePiece(
        [*pieces, *words],
        [0.0] * len(pieces) + [-float(i) for i in range(len(words))],
        [*kinds, *[TokenKind.NORMAL] * len(words)],
        prefix="always",
    )
    tokenizer = Tokenizer(model.build({}), eos_ids=[2])
    form = {"type": "regex", "regex": "(ab?|é|😀)( ab){1,3}"}
    texts = {follow(tokenizer, tokenizer.vocab_size, form, seed) for seed in range(8)}
    assert all(re.fullmatch(form["regex"], text) for text in texts) and len(texts) > 1


# --------------------------------------------------------------------------- biases, and the form


def test_a_bias_moves_the_choice_and_nothing_else() -> None:
    logits = np.array([[1.0, 2.0, 3.0, 0.0]], np.float32)

    def token(**options: Any) -> int | None:
        gen = GenerationConfig(**options)
        request = Request(id=0, tokens=[0], num_prompt=1, gen=gen, max_tokens=9)
        return sample(HostLogits(logits), [0], [request])[0].token

    assert token() == 2
    assert token(logit_bias={2: -1.5}) == 1
    assert token(logit_bias={3: 100.0, 2: -100}) == 3
    assert token(logit_bias={3: 100.0}, bad_token_ids=[3]) == 2
    assert token(logit_bias={3: 100}, do_sample=True, temperature=2.0) == 3
    assert logits.tolist() == [[1.0, 2.0, 3.0, 0.0]]


@pytest.mark.parametrize(
    ("options", "reason"),
    (
        ({"logit_bias": {1: 101}}, "from -100 to 100"),
        ({"logit_bias": {1: float("nan")}}, "from -100 to 100"),
        ({"logit_bias": {1: True}}, "number"),
        ({"logit_bias": {"1": 5}}, "token ids"),
        ({"logit_bias": [1]}, "token ids"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "1024"),
        ({"response_format": "json"}, "an object with a type"),
        ({"response_format": {}}, "an object with a type"),
        ({"response_format": {"type": "json_objekt"}}, '"json_object"'),
        ({"response_format": {"type": "json_object", "schema": {}}}, '"schema"'),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}},
            '"x"',
        ),
        ({"response_format": {"type": "regex", "regex": 5}}, "regex must be a text"),
        ({"response_format": {"type": "regex", "regex": ""}}, "empty"),
        ({"response_format": {"type": "choice", "choice": []}}, "empty"),
        ({"response_format": {"type": "choice", "choice": ["a", ""]}}, "non-empty"),
        ({"response_format": {"type": "choice", "choice": "ab"}}, "list"),
        ({"response_format": {"type": "grammar"}}, "grammar"),
    ),
)
def test_what_is_not_of_the_form_is_refused_when_it_is_made(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(reason)):
        GenerationConfig(**options)


def test_a_bias_must_be_of_the_vocabulary(pipe: Pipeline) -> None:
    with pytest.raises(RequestError, match=f"logit_bias has {VOCAB}"):
        one(pipe, GenerationConfig(logit_bias={VOCAB: 1.0}))


@pytest.mark.slow
def test_smollm2_writes_json() -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "hobbies": {
                "type": "array",
                "items": {"type": "string", "maxLength": 30},
                "maxItems": 3,
            },
        },
        "required": ["name", "age", "hobbies"],
        "additionalProperties": False,
    }
    question = "Describe a fictional person as JSON with name, age and hobbies."
    gens = [
        GenerationConfig(response_format=schema_of(schema), max_new_tokens=200),
        *(hot(schema_of(schema), seed, temperature=1.0) for seed in range(3)),
    ]
    try:
        with pipeline("smollm2-135m", EngineConfig(kv="k8v4", kv_tokens=4096)) as pipe:
            responses = pipe([question] * len(gens), gens)
    except ModelError as error:
        pytest.skip(str(error))
    assert isinstance(responses, list)
    for response in responses:
        assert response.finish_reason == "stop"
        person = json.loads(response.text)
        assert list(person) == ["name", "age", "hobbies"]
        assert 0 <= person["age"] <= 150 and len(person["hobbies"]) <= 3
