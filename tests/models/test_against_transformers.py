"""Every variant of a decoder computes what transformers computes: same logits, same tokens.

Each case says what it changes in a model; that the change matters is asserted too, so that none
passes because the models are too small to tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import transformers

from kvant import GenerationConfig, Pipeline
from kvant.loading.tokenizer import Tokenizer
from tests.models.tiny_models import (
    SHAPE,
    TOLERANCE,
    error,
    exact,
    greedy,
    oracle,
    random_ids,
    save,
    score,
    tiny_model,
)

LENGTH = 200
PROMPTS = ["a", "What is a KV cache?", "\n\n  12 + 34 =", "long " * 30]
NEW_TOKENS = 24


@dataclass(frozen=True)
class Case:
    """A configuration and one that differs in the feature, with the same weights: their logits
    must not be the same (None: weights differ too, nothing to compare)."""

    config: type[Any]
    changes: dict[str, Any] = field(default_factory=dict)
    without: dict[str, Any] | None = None


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LLAMA, MISTRAL = transformers.LlamaConfig, transformers.MistralConfig
QWEN2 = transformers.Qwen2Config
DEFAULT = rope("default")
WINDOWED = {"sliding_window": 40, "use_sliding_window": True, "num_hidden_layers": 3}

CASES = {
    "llama": Case(LLAMA, DEFAULT, rope("default", rope_theta=500.0)),
    "llama3": Case(
        LLAMA,
        # Wavelengths from 6 to 20000 tokens over a ramp from 16 to 64.
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        DEFAULT,
    ),
    "linear": Case(LLAMA, rope("linear", factor=4.0), DEFAULT),
    "yarn": Case(LLAMA, rope("yarn", factor=8.0, original_max_position_embeddings=64), DEFAULT),
    "yarn-tuned": Case(
        LLAMA,
        rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=64,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=1.0,
            mscale_all_dim=0.5,
        ),
        rope("yarn", factor=8.0, original_max_position_embeddings=64),
    ),
    "yarn-attention": Case(
        LLAMA,
        rope("yarn", factor=8.0, original_max_position_embeddings=64, attention_factor=1.5),
        rope("yarn", factor=8.0, original_max_position_embeddings=64),
    ),
    "dynamic-within-trained": Case(LLAMA, rope("dynamic", factor=2.0)),
    "tied": Case(LLAMA, {"tie_word_embeddings": True}),
    "attention-bias": Case(LLAMA, {"attention_bias": True}),
    "mlp-bias": Case(LLAMA, {"mlp_bias": True}),
    "wide-heads": Case(LLAMA, {"head_dim": 32}),
    "narrow-heads": Case(LLAMA, {"head_dim": 8}),
    "multi-head": Case(LLAMA, {"num_key_value_heads": 4}),
    "gqa-4": Case(LLAMA, {"num_key_value_heads": 1}),
    "norm-eps": Case(LLAMA, {"rms_norm_eps": 0.1}, {"rms_norm_eps": 1e-6}),
    "mistral": Case(MISTRAL, {"sliding_window": None}),
    "mistral-window": Case(MISTRAL, {"sliding_window": 40}, {"sliding_window": 41}),
    "qwen2": Case(QWEN2),
    "qwen2-tied": Case(QWEN2, {"tie_word_embeddings": True}),
    "qwen2-window-off": Case(QWEN2, {"sliding_window": 40, "use_sliding_window": False}),
    "qwen2-window": Case(
        QWEN2, {**WINDOWED, "max_window_layers": 2}, {**WINDOWED, "max_window_layers": 1}
    ),
}


def make(case: Case, differences: dict[str, Any]) -> Any:
    return tiny_model(case.config(**{**SHAPE, **differences}))


@dataclass(frozen=True)
class Pair:
    case: Case
    oracle: Any
    folder: Path

    @cached_property
    def greedy(self) -> list[list[int]]:
        """What transformers generates after each prompt, one by one."""
        tokenizer = Tokenizer.from_folder(self.folder)
        return [greedy(self.oracle, tokenizer.encode(prompt), NEW_TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model in transformers and its folder."""
    case = CASES[request.param]
    model = make(case, case.changes)
    return Pair(case, model, save(model, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module", params=[512, 17], ids=["one-step", "chunks-of-17"])
def pipe(request: pytest.FixtureRequest, pair: Pair) -> Iterator[Pipeline]:
    """The same model in kvant, prompts computed at once or in pieces."""
    with exact(pair.folder, max_prefill_token_num=request.param) as pipe:
        yield pipe


def test_logits(pipe: Pipeline, pair: Pair) -> None:
    ids = random_ids(LENGTH)
    expected = oracle(pair.oracle, ids)
    assert error(score(pipe, ids), expected) <= TOLERANCE
    if pair.case.without is not None:
        other = oracle(make(pair.case, {**pair.case.changes, **pair.case.without}), ids)
        assert error(other, expected) > 100 * TOLERANCE


def test_greedy_tokens(pipe: Pipeline, pair: Pair) -> None:
    """Prompts of several lengths, generated together here and one by one there."""
    gen = GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    responses = pipe(PROMPTS, gen)
    assert isinstance(responses, list)
    assert [response.token_ids for response in responses] == pair.greedy


@pytest.mark.parametrize("trained_name", ["max_position_embeddings", "original"])
def test_dynamic_ntk_beyond_the_trained_length(tmp_path: Path, trained_name: str) -> None:
    """The base is that of session_len, from the first token on: a default RoPE of that base."""
    factor, trained, longest, head_dim = 2.0, 64, 256, 16
    theta = 10000.0 * (factor * longest / trained - (factor - 1)) ** (head_dim / (head_dim - 2))
    scaled = rope("dynamic", factor=factor)
    shape = {**SHAPE, "max_position_embeddings": trained}
    if trained_name == "original":
        scaled["rope_parameters"]["original_max_position_embeddings"] = trained
        shape = {**SHAPE, "max_position_embeddings": longest}
    folder = save(tiny_model(LLAMA(**{**shape, **scaled})), tmp_path)
    ids = random_ids(LENGTH)
    grown = oracle(tiny_model(LLAMA(**{**SHAPE, **rope("default", rope_theta=theta)})), ids)
    plain = oracle(tiny_model(LLAMA(**{**SHAPE, **DEFAULT})), ids)
    with exact(folder, session_len=longest) as pipe:
        assert error(score(pipe, ids), grown) <= TOLERANCE
    assert error(plain, grown) > 100 * TOLERANCE
