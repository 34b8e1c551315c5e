"""Vectors at which encoders stumble, and pages full of bytes that are not theirs to change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvant.kernels.backend import KVMemory

Floats = NDArray[np.float32]

HEADS = 2

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


def vectors(rng: np.random.Generator, count: int, head_dim: int) -> Floats:
    """``[count, HEADS, head_dim]``: one head of adversarial vectors, one of such channels."""
    by_channel = _adversarial(rng, head_dim, count).T
    return np.stack([_adversarial(rng, count, head_dim), by_channel], axis=1)


def filled_pools(memory: KVMemory) -> list[NDArray[np.uint8]]:
    """The pools, with bytes that nobody may change in passing."""
    pools = [pool.pages for pool in (memory.base, memory.recent, memory.scratch)]
    for seed, pages in enumerate(pools):
        pages[...] = np.random.default_rng(seed).integers(256, size=pages.shape, dtype=np.uint8)
    return pools
