"""The packaged SmolLM2-135M, exact: transformers reads the same file and says the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from kvant import EngineConfig, GenerationConfig, ModelError, Pipeline
from kvant.engine.load import open_model, start_model
from kvant.eval.text import default_text
from kvant.loading.resolve import resolve_model
from tests.models.tiny_models import TOLERANCE, error, exact, oracle, score

pytestmark = pytest.mark.slow

NEW_TOKENS = 64
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain what a key-value cache is, in two sentences.",
    "def fibonacci(n):",
    "Translate to German: The weather is nice today.",
    "List five fruits, separated by commas.",
    "12 + 30 = ?",
    "Who wrote Romeo and Juliet, and when?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "Hi!",
    "Qu'est-ce que la photosynthèse ?",
    "日本の首都はどこですか。",
    'Return JSON with the keys "name" and "age" for a fictional person.',
    "Summarize: The quick brown fox jumps over the lazy dog. " * 8,
    "Tell me a story that begins with: Once upon a time, in a small village,",
    "What are the three laws of motion?",
    "Sort these numbers: 9, 4, 7, 1, 8.",
    "Is 91 a prime number? Think step by step.",
    "Write an email to my landlord about a broken heater. 🙂",
]


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return resolve_model("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def pipe(path: Path) -> Iterator[Pipeline]:
    with exact(path, kv_tokens=8192, check=False) as pipe:
        yield pipe


def test_logits_of_512_positions(pipe: Pipeline, model: Any) -> None:
    vocabulary = pipe.model.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, 512).tolist()
    assert error(score(pipe, ids), oracle(model, ids)) <= TOLERANCE


def test_greedy_texts(pipe: Pipeline, model: Any) -> None:
    """Each token, the end included, is what transformers finds most likely after those before."""
    responses = pipe(PROMPTS, GenerationConfig(max_new_tokens=NEW_TOKENS))
    assert isinstance(responses, list)
    (end,) = pipe.tokenizer.eos_ids
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids, got = pipe.prompt_ids(prompt), response.token_ids
        assert response.finish_reason == ("length" if len(got) == NEW_TOKENS else "stop")
        assert response.text == pipe.tokenizer.decode(got)
        assert end not in got
        ended = [*got, end] if response.finish_reason == "stop" else got
        logits = oracle(model, ids + ended)[len(ids) - 1 : -1]
        likeliest = logits.argmax(axis=-1).tolist()
        assert likeliest == ended, describe(ids, ended, logits)


def describe(ids: list[int], got: list[int], logits: NDArray[np.float32]) -> str:
    """Where an output is not the most likely, and by how much transformers preferred its token."""
    at = int((logits.argmax(axis=-1) != got).argmax())
    second, first = np.sort(logits[at])[-2:]
    return f"differ at token {at} after {ids}; the best two logits are {first} and {second}"


# ------------------------------------------------------------------------------- quantized weights


@pytest.fixture(scope="module", params=["int8", "int4"])
def weight_dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def quantized(path: Path, weight_dtype: str) -> Callable[..., Pipeline]:
    """Engines over the same quantized weights."""
    config = EngineConfig(weight_dtype=weight_dtype, kv_tokens=8192)
    opened = open_model(str(path), config)
    weights = opened.weights(config)

    def start(**options: Any) -> Pipeline:
        return Pipeline(start_model(opened, weights, replace(config, **options)))

    return start


def test_quantized_weights_give_a_text_alone_as_in_company(
    quantized: Callable[..., Pipeline],
) -> None:
    """Greedy texts: one by one, all at once, and with prompts in pieces."""
    gen = GenerationConfig(max_new_tokens=24)
    prompts = PROMPTS[:5] + PROMPTS[14:16]
    with quantized() as pipe:
        together = pipe(prompts, gen)
        assert isinstance(together, list)
        alone = [pipe([prompt], gen) for prompt in prompts]
    with quantized(max_prefill_token_num=13) as pipe:
        pieces = pipe(prompts, gen)
        assert isinstance(pieces, list)
    texts = [response.text for response in together]
    assert texts == [response.text for (response,) in alone]  # type: ignore[misc]
    assert texts == [response.text for response in pieces]
    assert len({*texts}) == len(prompts) and all(texts)


def text_loss(pipe: Pipeline) -> float:
    """Mean negative log-likelihood of 512 tokens of a text."""
    ids = pipe.tokenizer.encode(default_text().content[:8000])[:512]
    assert len(ids) == 512
    logits = torch.from_numpy(score(pipe, ids)[:-1])
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))


@pytest.fixture(scope="module")
def exact_loss(pipe: Pipeline) -> float:
    return text_loss(pipe)


def test_quantized_weights_keep_the_loss(
    quantized: Callable[..., Pipeline], weight_dtype: str, exact_loss: float
) -> None:
    assert 2 < exact_loss < 4
    with quantized() as pipe:
        assert abs(text_loss(pipe) / exact_loss - 1) < {"int8": 0.02, "int4": 0.1}[weight_dtype]
