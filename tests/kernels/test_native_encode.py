"""The native encoder writes the bytes of the formats, whatever the values and the processor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kvant.formats import FORMATS, PAGE_TOKENS, KVShape, KVSpec
from kvant.kernels.backend import Batch, BatchSequence, KVMemory
from kvant.kernels.cpu import CPUBackend, available_isas
from kvant.kernels.reference import ReferenceBackend

Floats = NDArray[np.float32]

HEADS = 2
HEAD_DIMS = (8, 24, 64, 80, 112, 128, 256)  # blocks of 8 and of 256; halves of a vector left over
SPECS = (
    *(name for name, fmt in FORMATS.items() if not fmt.by_page),
    *(f"{name}+s64r64:f32" for name, fmt in FORMATS.items() if fmt.by_page),
    "k=int3c,v=int4m+r64:k=bf16,v=int8h",
    "k=int5c,v=int3m+r64:f16",
    "k=int2m,v=int3m+r64:k=int8,v=int4m",
)

_EDGES = (
    *(0, 1, np.nan, np.inf, 1e-45, 1e-38, 65504, 65519.99, 65520, 3.4028235e38, 1e30),
    *(2.0**-24, 2.0**-25, np.nextafter(np.float32(2.0**-25), np.float32(1)), 0.5, 1.5, 1 / 3),
)
EDGES = np.array([sign * edge for edge in _EDGES for sign in (1, -1)], np.float32)


KINDS: tuple[Callable[[np.random.Generator, Floats], object], ...] = (
    lambda rng, x: rng.choice(EDGES, x.size),
    lambda rng, x: rng.choice(EDGES),
    lambda rng, x: np.where(np.arange(x.size) == rng.integers(x.size), rng.choice(EDGES), x),
    lambda rng, x: np.where(np.arange(x.size) == rng.integers(x.size), 100 * x, x),
    lambda rng, x: x * np.float32(10.0 ** rng.integers(-44, 38)),
    lambda rng, x: x + np.float32(rng.choice([100, -1000, 6e4, -7e4])),
    lambda rng, x: rng.integers(0, 31, x.size) / 2,  # ties
    lambda rng, x: rng.choice([0, -0.0], x.size),
    lambda rng, x: rng.integers(2**32, size=x.size, dtype=np.uint32).view(np.float32),
    *[lambda rng, x: x] * 3,
)


def _adversarial(rng: np.random.Generator, count: int, size: int) -> Floats:
    """Vectors ``[count, size]``: ordinary ones, and those at which an encoder may stumble."""
    out = rng.standard_normal((count, size)).astype(np.float32)
    for x in out:
        x[:] = KINDS[rng.integers(len(KINDS))](rng, x)
    return out


def _vectors(rng: np.random.Generator, count: int, head_dim: int) -> Floats:
    """``[count, HEADS, head_dim]``: one head of adversarial vectors, one of such channels."""
    by_channel = _adversarial(rng, head_dim, count).T
    return np.stack([_adversarial(rng, count, head_dim), by_channel], axis=1)


def _filled_pools(memory: KVMemory) -> list[NDArray[np.uint8]]:
    """The pools, with bytes that nobody may change in passing."""
    pools = [pool.pages for pool in (memory.base, memory.recent, memory.scratch)]
    for seed, pages in enumerate(pools):
        pages[...] = np.random.default_rng(seed).integers(256, size=pages.shape, dtype=np.uint8)
    return pools


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("isa", available_isas())
def test_every_byte_is_the_reference_backends(
    isa: str, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held down: roundings, NaN and Inf, -0.0, lanes behind the last dimension, padding, bytes of
    other tokens. The rows begin within a group, fill two and leave one open."""
    monkeypatch.setenv("KVANT_ISA", isa)
    spec = KVSpec.parse(kv)
    start, end = 19, 3 * PAGE_TOKENS + 10
    fine_pages = np.array([2, 5, 6, 1])  # 5 and 6 are scratch pages 1 and 2
    pages = np.array([2, 0, 3, 1])
    seq = BatchSequence(0, start, end, pages, fine_pages)
    none = np.zeros(end - start, np.int64)
    batch = Batch(none, np.arange(start, end), (seq,), none[:0])
    for head_dim in HEAD_DIMS:
        rng = np.random.default_rng(head_dim)
        k, v = (_vectors(rng, end - start, head_dim) for _ in range(2))
        shape = KVShape(num_layers=1, num_kv_heads=HEADS, head_dim=head_dim)
        want, got = (KVMemory.allocate(spec, shape, 4, 4, 4 * PAGE_TOKENS) for _ in range(2))
        expected, written = _filled_pools(want), _filled_pools(got)
        with np.errstate(all="ignore"):
            ReferenceBackend(want).write(0, k, v, batch)
        CPUBackend(got, num_threads=1).write(0, k, v, batch)
        for at, wanted in zip(written, expected, strict=True):
            np.testing.assert_array_equal(at, wanted, err_msg=f"{isa} {kv} {head_dim}")
