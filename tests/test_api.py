"""The Python API on a tiny model with one token per byte."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvant
from kvant import EngineConfig, GenerationConfig, KVSpec, Pipeline, Response, pipeline
from kvant.config import parse_bytes
from kvant.errors import ConfigError, EngineDeadError, RequestError

SHORT = GenerationConfig(max_new_tokens=12)


@pytest.fixture(scope="module")
def pipe(tiny: str) -> Iterator[Pipeline]:
    with pipeline(tiny, EngineConfig(kv="int8", kv_tokens=4096, check=True)) as pipe:
        yield pipe


def infer(pipe: Pipeline, prompt: Any, gen: GenerationConfig = SHORT, **more: Any) -> Response:
    response = pipe(prompt, gen, **more)
    assert isinstance(response, Response)
    return response


def test_one_prompt_one_response_a_list_a_list(pipe: Pipeline) -> None:
    single = infer(pipe, "hello")
    many = pipe(["hello", "there"], SHORT)
    assert isinstance(many, list)
    assert [r.index for r in many] == [0, 1]
    assert many[0].token_ids == single.token_ids
    assert single.input_token_len == len("[user]hello[assistant]")
    assert single.generate_token_len == len(single.token_ids) == 12
    assert single.finish_reason == "length"
    assert isinstance(pipe(["hello"], SHORT), list)


def test_messages_and_texts_meet_in_the_template(pipe: Pipeline) -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert infer(pipe, messages).token_ids == infer(pipe, "hello").token_ids
    raw = infer(pipe, "[user]hello[assistant]", do_preprocess=False)
    assert raw.token_ids == infer(pipe, "hello").token_ids
    assert isinstance(pipe([messages, messages], SHORT), list)


def test_streamed_pieces_add_up(pipe: Pipeline) -> None:
    whole = pipe(["one", "two"], SHORT)
    assert isinstance(whole, list)
    texts, tokens = ["", ""], [[], []]  # type: list[str], list[list[int]]
    for piece in pipe.stream_infer(["one", "two"], SHORT):
        texts[piece.index] += piece.text
        tokens[piece.index] += piece.token_ids
    assert texts == [r.text for r in whole]
    assert tokens == [r.token_ids for r in whole]


def test_async_is_the_same(pipe: Pipeline) -> None:
    async def both() -> list[Response]:
        return list(
            await asyncio.gather(pipe.infer_async("one", SHORT), pipe.infer_async("two", SHORT))
        )

    whole = pipe(["one", "two"], SHORT)
    assert isinstance(whole, list)
    for ours, theirs in zip(asyncio.run(both()), whole, strict=True):
        assert (ours.text, ours.token_ids) == (theirs.text, theirs.token_ids)
        assert ours.finish_reason == "length"


def test_n_completions_differ_by_seed_and_repeat(pipe: Pipeline) -> None:
    gen = GenerationConfig(n=4, do_sample=True, temperature=1.5, random_seed=7, max_new_tokens=20)
    first, second = pipe("hello", gen), pipe("hello", gen)
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert [r.token_ids for r in first] == [r.token_ids for r in second]
    assert len({tuple(r.token_ids) for r in first}) == 4
    assert (
        infer(
            pipe,
            "hello",
            GenerationConfig(do_sample=True, temperature=1.5, random_seed=8, max_new_tokens=20),
        ).token_ids
        == first[1].token_ids
    )


def test_a_seed_gives_the_same_text_in_any_company(pipe: Pipeline) -> None:
    gen = GenerationConfig(do_sample=True, temperature=1.5, random_seed=3, max_new_tokens=30)
    alone = infer(pipe, "hello", gen)
    crowd = pipe(["x" * n for n in range(1, 9)] + ["hello"], gen)
    assert isinstance(crowd, list)
    assert crowd[-1].token_ids == alone.token_ids


def test_logprobs_and_logits(pipe: Pipeline) -> None:
    gen = GenerationConfig(max_new_tokens=5, logprobs=3, output_logits="all")
    response = infer(pipe, "hello", gen)
    assert response.logprobs is not None
    assert response.logits is not None
    assert len(response.logprobs) == 5
    assert response.logits.shape == (response.input_token_len + 4, 258)
    for index, (token, logprobs) in enumerate(
        zip(response.token_ids, response.logprobs, strict=True)
    ):
        row = response.logits[response.input_token_len - 1 + index].astype(np.float64)
        expected = row - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert logprobs[token] == pytest.approx(expected[token], abs=1e-5)
        assert token == row.argmax()
    only = infer(pipe, "hello", GenerationConfig(max_new_tokens=5, output_logits="generation"))
    assert only.logits is not None
    assert np.array_equal(only.logits, response.logits[-5:])


def test_logits_of_several_completions_are_whole(pipe: Pipeline) -> None:
    """A sibling that shares the prompt's pages would have no logits for them."""
    gen = GenerationConfig(n=2, max_new_tokens=3, output_logits="all")
    responses = pipe("hello", gen)
    assert isinstance(responses, list)
    for response in responses:
        assert response.logits is not None
        assert len(response.logits) == response.input_token_len + 2
    with pytest.raises(RequestError, match="is for infer"):
        pipe.stream_infer("hello", gen)


def test_failures_are_not_mistaken_for_a_perfect_score(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pipeline(tiny, EngineConfig(kv_tokens=256)) as pipe:
        with pytest.raises(RequestError, match="token id 99999"):
            pipe.get_ppl([[1, 99999]])
        assert pipe.get_ppl(np.array([1, 2, 3])) == pipe.get_ppl([1, 2, 3])
        model: Any = pipe.model.engine._model
        monkeypatch.setattr(model, "forward", lambda *_: 1 // 0)
        with pytest.raises(kvant.KvantError, match="ZeroDivisionError"):
            pipe.get_ppl([1, 2, 3])


def test_a_forgotten_pipeline_gives_its_memory_back(tiny: str) -> None:
    pipe = pipeline(tiny, EngineConfig(kv_tokens=256))
    worker = weakref.ref(pipe.worker)
    del pipe
    gc.collect()
    assert worker() is None


def test_stop_words_across_tokens(pipe: Pipeline) -> None:
    text = infer(pipe, "hello", GenerationConfig(max_new_tokens=40)).text
    stop = text[10:14]
    cut = infer(pipe, "hello", GenerationConfig(max_new_tokens=40, stop_words=[stop]))
    assert cut.text == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
    kept = infer(
        pipe,
        "hello",
        GenerationConfig(max_new_tokens=40, stop_words=[stop], include_stop_str_in_output=True),
    )
    assert kept.text == text[: text.index(stop)] + stop


def test_bad_words_do_not_appear(pipe: Pipeline) -> None:
    text = infer(pipe, "hello", GenerationConfig(max_new_tokens=40)).text
    bad = text[5:7]
    assert (
        bad not in infer(pipe, "hello", GenerationConfig(max_new_tokens=40, bad_words=[bad])).text
    )


def test_a_conversation_remembers(pipe: Pipeline) -> None:
    session = pipe.chat("hello", gen_config=SHORT)
    assert not isinstance(session, Iterator)
    first = session.response
    assert first is not None
    again = pipe.chat("and?", session, SHORT)
    assert again is session
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2
    expected = infer(pipe, session.messages[:3])
    assert session.response is not None
    assert session.response.token_ids == expected.token_ids
    pieces = pipe.chat("more", session, SHORT, stream_response=True)
    assert "".join(piece.text for piece in pieces) == session.messages[-1]["content"]  # type: ignore[union-attr]


def test_ppl_is_the_mean_loss_of_the_logits(pipe: Pipeline) -> None:
    ids = pipe.tokenizer.encode("the quick brown fox " * 10, add_special=False)
    response = infer(
        pipe,
        "the quick brown fox " * 10,
        GenerationConfig(max_new_tokens=1, output_logits="all"),
        do_preprocess=False,
    )
    assert response.logits is not None
    rows = response.logits[-len(ids) :][:-1].astype(np.float64)
    norm = np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1)) + rows.max(-1)
    expected = float((norm - rows[np.arange(len(rows)), ids[1:]]).mean())
    if response.input_token_len == len(ids):
        assert pipe.get_ppl([ids, ids])[1] == pytest.approx(expected, abs=1e-6)
    assert pipe.get_ppl(ids) == [pipe.get_ppl([ids])[0]]
    with pytest.raises(RequestError, match="needs two"):
        pipe.get_ppl([[5]])


def test_leaving_a_stream_frees_its_pages(pipe: Pipeline) -> None:
    next(iter(pipe.stream_infer("hello", GenerationConfig(max_new_tokens=500))))
    assert infer(pipe, "hello").finish_reason == "length"
    assert pipe.worker.call(lambda engine: engine.stats()).pages_held == 0


def test_threads_share_a_pipeline(pipe: Pipeline) -> None:
    expected, got = infer(pipe, "hello").token_ids, []

    def client() -> None:
        got.append(infer(pipe, "hello").token_ids)

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == [expected] * 6


def test_a_closed_pipeline_says_so(tiny: str) -> None:
    pipe = pipeline(tiny, EngineConfig(kv_tokens=256))
    pipe.close()
    with pytest.raises(EngineDeadError, match="closed"):
        pipe("hello")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3"),
        ({"temperature": math.nan}, "temperature=nan must be from 0 to 2"),
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 2.5}, "top_k=2.5 must be a number"),
        ({"n": 0}, "n=0"),
        ({"n": True}, "n=True"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"stop_words": "end"}, "must be a list"),
        ({"stop_words": [""]}, "non-empty"),
        ({"bad_token_ids": ["a"]}, "bad_token_ids"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "exceeds"),
        ({"output_logits": "some"}, "output_logits"),
        ({"random_seed": "x"}, "random_seed='x' must be a whole number"),
        ({"stop_words": 5}, "must be a list"),
        ({"max_tokens": 5}, 'did you mean "max_new_tokens"'),
    ],
)
def test_generation_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        GenerationConfig(**options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quant_polcy": 8}, 'did you mean "quant_policy"'),
        ({"quant_policy": 8, "kv": "int8"}, "use one of them"),
        ({"quant_policy": 5}, "quant_policy=5 is unknown"),
        ({"kv": 8}, "go to quant_policy"),
        ({"max_batch_size": True}, "max_batch_size=True"),
        ({"kv": "int5"}, 'unknown KV format "int5"'),
        ({"dtype": "int8"}, "dtype"),
        ({"session_len": 0}, "session_len=0"),
        ({"cache_max_entry_count": 1.5}, "between 0 and 1"),
        ({"kv_memory": "many"}, "'many' is not a size"),
        ({"kv_memory": "1GiB", "kv_tokens": 5}, "use one of them"),
        ({"max_prefill_token_num": -1}, "max_prefill_token_num=-1"),
    ],
)
def test_engine_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "refrence"}, 'did you mean "reference"'),
        ({"kv_memory": "100"}, "holds no page"),
        ({"kv_tokens": 10**12}, "free"),
        ({"session_len": 4096, "kv_tokens": 128}, "does not fit"),
        ({"session_len": 10**6, "kv_tokens": 10**6 + 64}, "context"),
    ],
)
def test_options_that_do_not_fit_the_model(tiny: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pipeline(tiny, EngineConfig(**options))


def test_prompts_are_checked_before_anything_starts(pipe: Pipeline) -> None:
    with pytest.raises(RequestError, match="empty"):
        pipe(["hello", ""])
    with pytest.raises(RequestError, match="4096"):
        pipe(["hello", "x" * 5000])
    with pytest.raises(RequestError, match="2 generation configs for 1"):
        pipe(["hello"], [SHORT, SHORT])
    with pytest.raises(RequestError, match="must be a text"):
        pipe(5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="must be a text"):
        pipe([5])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="must be a GenerationConfig"):
        pipe(["hello"], [{"max_new_tokens": 3}])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="must be a GenerationConfig"):
        pipe("hello", 5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="bad_token_ids has 300"):
        pipe("hello", GenerationConfig(bad_token_ids=[300]))
    assert pipe([], SHORT) == []


@pytest.mark.parametrize("quant_policy", [0, 8, 4])
def test_quant_policies_are_lmdeploys(tiny: str, quant_policy: int) -> None:
    config = EngineConfig(quant_policy=quant_policy, kv_tokens=256)
    with pipeline(tiny, config) as pipe:
        name = {0: "bf16", 8: "int8", 4: "k4v4"}[quant_policy]
        assert pipe.model.kv_spec == KVSpec.parse(name)


@pytest.mark.parametrize("kv", ["bf16", "int8", "int4h", "k4v4", "int4h+r64", "int4h+r64:bf16"])
def test_a_pool_takes_the_memory_it_was_given(tiny: str, kv: str) -> None:
    """Within one page."""
    with pipeline(tiny, EngineConfig(kv=kv, kv_memory="3MiB")) as pipe:
        memory, model = pipe.model.engine.memory, pipe.model
        used = memory.base.nbytes + memory.recent.nbytes
        page = model.kv_spec.page_bytes(model.config.kv_shape)
        assert 3 * 2**20 - page < used <= 3 * 2**20
        assert used == model.cache.nbytes
        assert model.cache.num_tokens == memory.base.num_pages * 64


def test_sizes() -> None:
    assert parse_bytes("4GiB") == 4 * 2**30
    assert parse_bytes("4g") == 4 * 10**9
    assert parse_bytes("512MB") == 512 * 10**6
    assert parse_bytes("1.5k") == 1500
    assert parse_bytes(1024) == parse_bytes("1024") == 1024


def test_import_is_light() -> None:
    """Importing kvant, and its names that need no model, loads no torch."""
    code = (
        "import sys, kvant; kvant.EngineConfig(quant_policy=8); kvant.KVSpec.parse('int4h'); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_public_names_exist_and_are_listed() -> None:
    for name in kvant.__all__:
        assert getattr(kvant, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        kvant.nothing  # noqa: B018
    lazy = set(kvant._HOME)
    assert lazy | {"__version__"} == set(kvant.__all__)


def test_the_version_is_that_of_the_project() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'version = "{kvant.__version__}"' in text
    changelog = (Path(__file__).parent.parent / "CHANGELOG.md").read_text()
    assert f"## {kvant.__version__}" in changelog


def test_streams_interleave(pipe: Pipeline) -> None:
    """Two prompts run at the same time, not one after the other."""
    order = [piece.index for piece in pipe.stream_infer(["one", "two"], SHORT)]
    assert len(list(itertools.groupby(order))) > 4
