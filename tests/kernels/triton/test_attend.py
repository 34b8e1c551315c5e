"""Attention on the GPU, or in Triton's interpreter: the contract's own tests, fewer of them, since
the interpreter is slow; and what is this backend's alone.

Queries are float32 in the first, and so is all arithmetic: the rule is that of every backend, twice
the error of plain float32. In 16 bits the yardstick is plain arithmetic of 16-bit operands.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvant.cache.pool import BytePool
from kvant.formats import PAGE_TOKENS, KVShape, KVSpec
from kvant.formats.pages import open_pages
from kvant.kernels import Batch, BatchSequence, KVMemory, make_backend, make_memory
from kvant.kernels.triton.backend import TritonBackend
from kvant.kernels.triton.plan import num_splits
from tests.kernels import test_backend as contract
from tests.kernels.attention_oracle import LayerFormats, Options, Table, exact, pieces, softmax
from tests.kernels.driver import Driver, assert_accurate, host

Array = np.ndarray[Any, Any]

# Each family of codes and each way of finer groups, K and V apart.
SPECS = ("int8", "k4v4", "int4h+r64", "k=int8,v=int4+r64:f32")


@pytest.mark.parametrize("kv", SPECS)
def test_a_batch_of_prompts_and_decodes_over_shuffled_pages(kv: str) -> None:
    driver = Driver("triton", kv)
    sequences = [driver.add(length) for length in (1, 65, 129)]
    driver.run(*sequences, chunks=(1, 17, 100))
    assert_accurate(driver, *sequences)


@pytest.mark.parametrize("kv", contract.EACH_FORMAT)
def test_every_format(kv: str) -> None:
    """Pages read word by word."""
    contract.test_head_dims("triton", kv, 64)


@pytest.mark.parametrize(
    ("kv", "head_dim"),
    (
        ("k3v3", 8),
        ("k=int5c,v=int3m+s64r64", 80),
        ("k=bf16,v=int4h", 96),
        ("k=f32,v=int4", 112),
        ("k=int6c,v=int2m+s64r64", 128),
        ("int8h", 192),
        ("k=int4h,v=f16", 256),
    ),
)
def test_head_dims(kv: str, head_dim: int) -> None:
    """Byte by byte, where a head_dim is no power of two."""
    contract.test_head_dims("triton", kv, head_dim)


@pytest.mark.parametrize(("kv", "share"), (("int8", 17), ("int4h+r64", 3), ("k4v4", 1)))
def test_query_heads_that_share_keys(kv: str, share: int) -> None:
    contract.test_query_heads_that_share_keys("triton", kv, share)


@pytest.mark.parametrize(("kv", "window"), (("int8", 1), ("k4v4", 5), ("k4v4", 100)))
def test_a_window_ends_before_its_length(kv: str, window: int) -> None:
    driver = Driver("triton", kv, window=window)
    seq = driver.add(193)
    driver.run(seq, chunks=(66, 1, 125, 1))
    assert_accurate(driver, seq)


@pytest.mark.parametrize(
    ("kv", "softcap", "sinks", "window"),
    (
        ("int8", 30.0, None, 50),
        ("k4v4", None, contract.SINKS, None),
        ("f32", 1.0, contract.SINKS, 70),
    ),
)
def test_softcap_and_sinks(kv: str, softcap: float | None, sinks: Any, window: int | None) -> None:
    contract.test_softcap_and_sinks("triton", kv, softcap, sinks, window)


@pytest.mark.parametrize("kv", ("int8h", "k4v4"))
def test_scores_far_apart_neither_overflow_nor_vanish(kv: str) -> None:
    contract.test_scores_far_apart_neither_overflow_nor_vanish("triton", kv)


@pytest.mark.parametrize("kv", ("f16", "int8", "k4v4"))
def test_what_nobody_wrote_is_never_seen(kv: str) -> None:
    """As the contract's test, with less of it."""
    outputs = []
    for poison in (0xFF, 0x3C):
        driver = Driver("triton", kv, poison=poison)
        seq = driver.add(131)
        driver.run(seq, chunks=(129, 1))
        outputs.append(seq.out)
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("side", ("k", "v"))
@pytest.mark.parametrize(
    ("kv", "token", "window"),
    (("f16", 70, None), ("int8", 70, 50), ("k3v3", 70, None), ("k8v8", 10, 50)),
)
def test_a_broken_token_reaches_only_those_who_see_it(
    kv: str, token: int, window: int | None, side: str
) -> None:
    contract.test_a_broken_token_reaches_only_those_who_see_it(
        "triton", kv, token, np.nan, window, side
    )


@pytest.fixture
def dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written is full of NaN."""
    new = torch.Tensor.new_empty

    def new_dirty(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        fresh = new(self, *args, **options)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", new_dirty)


@pytest.mark.parametrize(
    ("kv", "options"),
    (
        ("int8", {"window": 100}),
        ("k4v4", {}),
        ("k4v4", {"window": 100}),
        ("k=int4h,v=f16", {"softcap": 30.0, "sinks": contract.SINKS}),
    ),
)
def test_contexts_that_are_staged_in_rounds(
    kv: str, options: dict[str, Any], dirty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two pages: each round goes on where the last one stopped, and reads nothing that
    none has written, where a window leaves pages out."""
    driver = Driver("triton", kv, **options)
    monkeypatch.setattr(TritonBackend, "_room", lambda self: 2)
    sequences = [driver.add(length) for length in (260, 70)]
    driver.run(*sequences, chunks=(130, 40))
    assert_accurate(driver, *sequences)


@pytest.mark.parametrize(
    ("kv", "window", "length"), (("int8", None, 200), ("int8", None, 268), ("k4v4", 200, 268))
)
def test_a_decode_is_the_same_in_any_company(
    kv: str, window: int | None, length: int, dirty: None
) -> None:
    """Splits are decided by positions alone, so a row has the same bits alone, beside longer
    sequences, which have more splits, and in arrays with room for more. What is missing there
    writes nothing, also where another batch was loaded before."""
    driver = Driver("triton", kv, window=window, heads=2, kv_heads=1)
    seq, longer = driver.add(length), driver.add(540)
    driver.run(seq, longer, chunks=(length - 1, 539))
    for each in (seq, longer):  # one more token, still to be computed
        each.tokens.append(0)
        each.q, each.k, each.v, each.out = (
            np.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=1)
            for x in (each.q, each.k, each.v, each.out)
        )
    assert num_splits(len(seq.holding.pages)) < num_splits(len(longer.holding.pages))
    options = driver.options._asdict() | {"scale": driver.shape.head_dim**-0.5}
    step = driver.begin([(longer, 1), (seq, 1)])
    q, k, v = driver._projection(step.slices, 0)
    driver.backend.write(0, k, v, step.batch)
    together = driver.backend.attend(0, q, step.batch, **options)
    alone_batch, _ = driver._batch(step.slices[1:])
    alone = driver.backend.attend(0, q[1:], alone_batch, **options)
    np.testing.assert_array_equal(alone[0], together[1])
    backend = driver.backend
    assert isinstance(backend, TritonBackend)
    plan = backend.decode_plan(5, 40)
    plan.load(step.batch)
    fused = np.concatenate((q, k, v), axis=1).reshape(2, -1)
    ones = torch.ones((600, 32), device=backend.device)
    for batch, rows, wanted in ((step.batch, fused, together), (alone_batch, fused[1:], alone)):
        plan.load(batch)
        padded = torch.zeros((5, fused.shape[1]), device=backend.device)
        padded[: len(rows)] = torch.from_numpy(rows).to(backend.device)
        before = [host(pool).copy() for pool in (driver.memory.base, driver.memory.recent)]
        queries = backend.rope_write(0, padded, ones, 0 * ones, plan)  # angles of 0
        for pool, was in zip((driver.memory.base, driver.memory.recent), before, strict=True):
            np.testing.assert_array_equal(host(pool), was)
        found = backend.attend_rows(0, queries, plan, **options)
        np.testing.assert_array_equal(found[: len(rows)].cpu().numpy(), wanted)


@pytest.mark.parametrize("kv", ("int8", "k4v4"))
def test_contexts_of_more_than_256_pages(kv: str) -> None:
    """64 splits of more than four pages: the same few pages again and again."""
    spec, shape = KVSpec.parse(kv), KVShape(num_layers=1, num_kv_heads=1, head_dim=64)
    memory = make_memory("triton", spec, shape, 8, 8 if spec.recent else 0, 512)
    rng = np.random.default_rng(0)
    for pool in (memory.base, memory.recent):
        vectors = rng.standard_normal((pool.num_pages, 64, 1, 64), np.float32)
        pages = np.zeros((pool.num_pages, pool.page_bytes), np.uint8)
        of = spec if pool is memory.base else spec.fine
        (layer,) = open_pages(of, shape, pages)
        layer.fill(np.arange(len(pages)), vectors, vectors[::-1].copy())
        pool.pages[:] = pages if isinstance(pool.pages, np.ndarray) else torch.from_numpy(pages)
    position = 300 * PAGE_TOKENS + 10
    table = rng.integers(0, 8, 301)
    fine = np.array([3] if spec.recent else [], np.int64)
    seq = BatchSequence(0, position, position + 1, table, fine)
    none = np.array([], np.int64)
    batch = Batch(np.array([0]), np.array([position]), (seq,), none)
    q = rng.standard_normal((1, 2, 64), np.float32)
    wanted = make_backend("reference", _on_host(memory)).attend(0, q, batch, scale=0.125)
    found = TritonBackend(memory).attend(0, q, batch, scale=0.125)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def _on_host(memory: KVMemory) -> KVMemory:
    """The same, where numpy reads it."""
    copies = []
    for pool in (memory.base, memory.recent, memory.scratch):
        copy = BytePool(pool.num_pages, pool.page_bytes)
        copy.pages[:] = host(pool)
        copies.append(copy)
    return KVMemory(memory.spec, memory.shape, *copies)


def _half(x: Array, dtype: torch.dtype) -> Array:
    """Rounded to 16 bits and back."""
    rounded: Array = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(dtype).float().numpy()
    return rounded


def _plain_in_16_bits(
    formats: LayerFormats, qkv: tuple[Array, Array, Array], options: Options, dtype: torch.dtype
) -> Array:
    """What a 16-bit attention kernel does: queries, keys, weights and values are rounded, sums are
    float32. ``[N, H, D]``."""
    q, k, v = qkv
    heads, queries = q.shape[1], q.swapaxes(0, 1)
    scores = np.full((heads, len(q), len(q)), -np.inf, np.float32)
    seen = pieces(formats, k, v, options.window)
    for piece in seen:
        keys = Table.of(piece.k_format, piece.k, heads, np.float32, rotated=True)
        turned = _half(piece.k_format.rotate(queries), dtype)
        dots = turned @ _half(keys.vectors, dtype).swapaxes(1, 2) * np.float32(q.shape[-1] ** -0.5)
        scores = np.where(piece.visible, dots, scores)
    weights = softmax(scores, None)
    weights /= weights.max(axis=-1, keepdims=True)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.zeros_like(queries)
    for piece in seen:
        values = Table.of(piece.v_format, piece.v, heads, np.float32, rotated=True)
        weighed = _half(np.where(piece.visible, weights, 0), dtype)
        out += piece.v_format.unrotate(weighed @ _half(values.vectors, dtype))
    return (out / total).swapaxes(0, 1)


@pytest.mark.parametrize(
    ("kv", "dtype"),
    (
        ("bf16", "bfloat16"),
        ("f16", "float16"),
        *(
            (kv, dtype)
            for kv in ("int8", "int4", "int8h", "k4v4", "k3v3")
            for dtype in ("float16", "bfloat16")
        ),
    ),
)
def test_in_16_bits_errors_are_those_of_plain_16_bits(kv: str, dtype: str) -> None:
    """Codes are multiplied as float16, which holds them, whatever the type of queries. Held down:
    offsets that swamp float16 products, and scales that leave its range."""
    driver = Driver("triton", kv)
    kind: torch.dtype = getattr(torch, dtype)
    seq = driver.add(136)
    seq.k = seq.k * np.float32(3) + np.linspace(-20, 20, 64, dtype=np.float32)
    seq.v = seq.v * np.float32(1e-3)
    seq.q = _half(seq.q, kind)
    while seq.computed < 136:
        step = driver.begin([(seq, 130 if seq.computed < 128 else 1)])
        (_, start, end) = step.slices[0]
        q, k, v = driver._projection(step.slices, 0)
        driver.backend.write(0, k, v, step.batch)
        queries = torch.from_numpy(np.ascontiguousarray(q)).to(kind)
        out = driver.backend.attend(0, queries, step.batch, scale=64**-0.5)
        assert out.dtype == kind
        seq.out[0, start:end] = out.float().numpy()
        seq.computed = end
        driver.cache.commit(seq.holding, seq.tokens, end)
    formats = LayerFormats.of(driver.spec, driver.shape)[0]
    qkv = seq.q[0], seq.k[0], seq.v[0]
    truth = exact(formats, qkv, Options()).out
    plain = _half(_plain_in_16_bits(formats, qkv, Options(), kind), kind)
    for rows in (slice(0, 128), slice(130, 136)):  # a prompt, decodes
        found, usual = (np.linalg.norm(x[rows] - truth[rows], axis=-1) for x in (seq.out[0], plain))
        assert found.max() <= 2 * usual.max()


def test_old_architectures() -> None:
    """sm_70 and sm_75 multiply pages of bfloat16 in float32, by small tiles."""
    driver = Driver("triton", "bf16")
    driver.backend = TritonBackend(driver.memory, (7, 5))
    seq = driver.add(70)
    driver.run(seq, chunks=(69, 1))
    assert_accurate(driver, seq)


def test_the_stage_has_room_for_long_contexts() -> None:
    """In 256 MiB, K and V of Llama-3-8B's shape: 65,536 tokens of 16 bits."""
    spec, shape = KVSpec.parse("int8"), KVShape(num_layers=1, num_kv_heads=8, head_dim=128)
    backend = TritonBackend(make_memory("triton", spec, shape, 1, 0, 64))
    assert backend._room() * PAGE_TOKENS == 65536
