"""The promise: a prefix hit, a cold run, any chunking and any batch see each token in exactly the
same precision. Shown bit for bit, on pages and logits, through the real decoder and backend.

Two models. In the first every sum is order-free by construction, so only the *precision rule* can
make a difference: each row of each weight matrix has two entries, powers of two (a sum of two exact
products is rounded once, in any order), RMSNorm is the identity (eps 2^40, weight 2^20), RoPE
turns by nothing, and queries are so large that attention picks one token. The second is SmolLM2:
there bit-equality also needs linear layers that give a row the same bits in any batch: those of
kvant.models.cpu do by construction, torch's (kvant.models.ops) as measured, not promised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvant.cache.sizing import size_for_tokens
from kvant.config import EngineConfig, GenerationConfig
from kvant.engine.engine import Engine
from kvant.engine.load import OpenModel, open_model, start_model
from kvant.errors import ModelError
from kvant.formats import PAGE_TOKENS, KVSpec
from kvant.kernels import KVMemory, make_backend
from kvant.models.config import DecoderConfig, RopeConfig
from kvant.models.cpu import CPUOps
from kvant.models.decoder import Decoder, DecoderWeights, LayerWeights
from kvant.models.ops import Norm, Ops, TorchOps
from kvant.request import Request
from tests.engine.mock import SPECS

CHUNKS = [1, 17, 64]
LENGTH = 150
CONFIG = DecoderConfig(
    architecture="order-free",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=1024,
    norm_eps=2.0**40,
    rope=RopeConfig(kind="linear", factor=1e60),
    windows=(None, None),
)


def _two_per_row(rows: int, columns: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    weight = np.zeros((rows, columns), np.float32)
    for row in weight:
        row[rng.choice(columns, 2, replace=False)] = rng.choice([-1, 1, 2], 2) * scale
    return torch.from_numpy(weight).bfloat16()


def _order_free_weights(ops: Ops) -> DecoderWeights:
    norm = Norm(torch.full((64,), 2.0**20), CONFIG.norm_eps)

    def layer(seed: int) -> LayerWeights:
        q = _two_per_row(64, 64, seed, scale=2.0**30)
        k, v = _two_per_row(32, 64, seed + 1), _two_per_row(32, 64, seed + 2)
        return LayerWeights(
            attention_norm=norm,
            qkv=ops.linear(torch.cat((q, k, v))),
            output=ops.linear(_two_per_row(64, 64, seed + 3)),
            mlp_norm=norm,
            gate_up=ops.linear(_two_per_row(128, 64, seed + 4), gated=True),
            down=ops.linear(_two_per_row(64, 64, seed + 5, scale=0.25)),
        )

    embedding = np.random.default_rng(7).integers(-8, 9, (64, 64)).astype(np.float32)
    return DecoderWeights(
        embedding=torch.from_numpy(embedding).bfloat16(),
        layers=(layer(10), layer(20)),
        norm=norm,
        head=ops.linear(_two_per_row(64, 64, 30)),
    )


def _order_free_engine(
    spec: str, chunk: int, *, prefix_caching: bool = True, backend: str = "reference"
) -> Engine:
    parsed = KVSpec.parse(spec)
    size = size_for_tokens(parsed, CONFIG.kv_shape, 8192, 20)
    memory = KVMemory.allocate(parsed, CONFIG.kv_shape, size.num_pages, size.num_recent, chunk)
    ops = TorchOps(torch.bfloat16) if backend == "reference" else CPUOps()
    return Engine(
        Decoder(CONFIG, _order_free_weights(ops), ops, longest=1024),
        make_backend(backend, memory),
        memory,
        vocab_size=64,
        session_len=1024,
        max_batch_size=20,
        max_step_tokens=chunk,
        prefix_caching=prefix_caching,
        check=True,
    )


@dataclass
class Seen:
    """What one request left: logits by position, its text, the bytes of its full pages."""

    logits: dict[int, NDArray[np.float32]]
    tokens: list[int]
    pages: list[bytes]

    def assert_same_bits(self, other: Seen) -> None:
        assert self.tokens == other.tokens
        assert self.pages == other.pages
        common = self.logits.keys() & other.logits.keys()
        assert common
        for position in common:
            assert np.array_equal(self.logits[position], other.logits[position]), position


def _observe(
    engine: Engine, prompt: list[int], *, others: int = 0, new: int = 45, all_logits: bool = True
) -> Seen:
    """Run a prompt, in a batch with ``others`` if any, and record everything about it."""
    logits: dict[int, NDArray[np.float32]] = {}
    tokens: list[int] = []

    def sink(start: int, rows: NDArray[np.float32]) -> None:
        logits.update({start + i: row.copy() for i, row in enumerate(rows)})

    def request(request_id: int, ids: list[int], **more: Any) -> Request:
        return Request(
            id=request_id, tokens=list(ids), num_prompt=len(ids), max_tokens=len(ids) + new, **more
        )

    rng = np.random.default_rng(len(prompt))
    first = 1000 * (engine.stats().steps + 1)
    for index in range(others // 2):
        engine.submit(
            request(
                first + index, rng.integers(0, 64, 20 + 7 * index).tolist(), gen=GenerationConfig()
            )
        )
    main = request(
        first + 100,
        prompt,
        gen=GenerationConfig(output_logits="all" if all_logits else "generation"),
        logits_sink=sink,
        deliver=lambda output: tokens.extend(output.token_ids),
    )
    engine.submit(main)
    for index in range(others - others // 2):
        engine.submit(
            request(
                first + 200 + index,
                rng.integers(0, 64, 70 - 3 * index).tolist(),
                gen=GenerationConfig(),
            )
        )
    pages: list[bytes] = []
    pools = engine.memory
    while engine.has_work:
        engine.step()
        if main.holding.pages:
            full = main.holding.pages[: main.computed // PAGE_TOKENS]
            sink, rest = full[: pools.spec.sink], full[pools.spec.sink :]
            pages = [page.tobytes() for page in pools.recent.pages[sink]]
            pages += [page.tobytes() for page in pools.base.pages[rest]]
    return Seen(logits, tokens, pages)


def _prompt(length: int = LENGTH) -> list[int]:
    return np.random.default_rng(3).integers(0, 64, length).tolist()


@pytest.fixture(scope="module", params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=SPECS)
def cold(request: pytest.FixtureRequest, backend: str) -> tuple[str, Seen]:
    """A spec, and a cold run alone with the whole prompt in one chunk."""
    engine = _order_free_engine(request.param, 512, backend=backend)
    return request.param, _observe(engine, _prompt())


@pytest.mark.parametrize("chunk", CHUNKS)
def test_any_chunking_is_the_same_bits(cold: tuple[str, Seen], backend: str, chunk: int) -> None:
    spec, expected = cold
    engine = _order_free_engine(spec, chunk, backend=backend)
    _observe(engine, _prompt()).assert_same_bits(expected)


@pytest.mark.parametrize("shared", [64, 100, LENGTH])
def test_a_prefix_hit_is_the_same_bits(cold: tuple[str, Seen], backend: str, shared: int) -> None:
    spec, expected = cold
    engine = _order_free_engine(spec, 100, backend=backend)
    _observe(engine, _prompt()[:shared], new=1)
    hit = _observe(engine, _prompt(), all_logits=False)
    assert engine.stats().cached_tokens >= shared // PAGE_TOKENS * PAGE_TOKENS - PAGE_TOKENS
    hit.assert_same_bits(expected)


def test_a_batch_of_sixteen_is_the_same_bits(cold: tuple[str, Seen], backend: str) -> None:
    """Steps hold several short prompts and decodes; the long prompt takes more than one."""
    spec, expected = cold
    engine = _order_free_engine(spec, 200, backend=backend)
    _observe(engine, _prompt(), others=15).assert_same_bits(expected)


def test_the_model_tells_precisions_apart() -> None:
    """Otherwise the tests above could not fail: formats, and a recent part, change the logits."""
    runs = [
        _observe(_order_free_engine(spec, 512), _prompt(), new=1)
        for spec in ("f32", "int8", "int4", "int4h", "int4h+r64", "int4h+s64r64")
    ]
    last = [seen.logits[LENGTH - 1].tobytes() for seen in runs]
    every = [b"".join(seen.logits[p].tobytes() for p in range(LENGTH)) for seen in runs]
    assert len(set(every)) == len(runs)
    assert len(set(last)) > 1


@pytest.fixture(scope="module")
def smollm2(request: pytest.FixtureRequest) -> tuple[OpenModel, DecoderWeights]:
    """The packaged model with weights of a type, which all its engines share."""
    config = EngineConfig(weight_dtype=request.param)
    try:
        opened = open_model("smollm2-135m", config)
    except ModelError as error:
        pytest.skip(str(error))
    return opened, opened.weights(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "smollm2"),
    [
        *((spec, "auto") for spec in ("bf16", "int8", "int4h", "int4h+r64", "int4h+s64r64")),
        ("k4v4", "int8"),
        ("int4h+r64", "int4"),
    ],
    indirect=["smollm2"],
    scope="module",
)
def test_smollm2_is_the_same_bits(spec: str, smollm2: tuple[OpenModel, DecoderWeights]) -> None:
    """Greedy text and logits of a real model, in bfloat16: chunks, a prefix hit, a batch."""
    prompt = np.random.default_rng(5).integers(100, 40000, 150).tolist()

    def engine(chunk: int) -> Engine:
        config = EngineConfig(
            kv=spec, kv_tokens=8192, max_prefill_token_num=chunk, max_batch_size=20
        )
        return start_model(*smollm2, config).engine

    whole = engine(512)
    expected = _observe(whole, prompt, new=8)
    _observe(whole, prompt, new=8, all_logits=False).assert_same_bits(expected)
    _observe(whole, prompt, new=8, others=15).assert_same_bits(expected)
    _observe(engine(17), prompt, new=8).assert_same_bits(expected)
