"""What attention over encoded pages is, written without pages: tables of decoded vectors.

Every token is encoded and decoded by its format; which decoding a query sees is decided by
positions alone. :func:`exact` is the truth, in float64 on decoded vectors. :func:`plain` is the
same in float32 on vectors as they are stored (queries and outputs are rotated instead), as
backends do it without cleverness: its error is their yardstick.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvant.formats import KVFormat, KVSpec

Array = NDArray[Any]

GROUP = 64


class _Table(NamedTuple):
    """Vectors ``[H, N, D]`` decoded from ``fmt``, still rotated if ``stored``."""

    fmt: KVFormat
    vectors: Array
    stored: bool

    @classmethod
    def of(cls, fmt: KVFormat, x: Array, heads: int, dtype: type, stored: bool) -> _Table:
        vectors: Array = fmt.dequantize(fmt.encode(x), x.shape[-1]).astype(dtype)
        vectors = vectors if stored else fmt.unrotate(vectors)
        of_head = [head * x.shape[1] // heads for head in range(heads)]
        return cls(fmt, vectors[:, of_head].swapaxes(0, 1), stored)

    def scores(self, q: Array) -> Array:
        return (self.fmt.rotate(q) if self.stored else q) @ self.vectors.swapaxes(1, 2)

    def mix(self, weights: Array) -> Array:
        out = weights @ self.vectors
        return self.fmt.unrotate(out) if self.stored else out


def _attend(
    spec: KVSpec, q: Array, k: Array, v: Array, window: int | None, dtype: type, stored: bool
) -> Array:
    length, heads, dim = q.shape
    position = np.arange(length)
    seen = position <= position[:, None]
    if window is not None:
        seen &= position > position[:, None] - window
    near = position // GROUP == position[:, None] // GROUP

    def table(fmt: KVFormat, x: Array) -> _Table:
        return _Table.of(fmt, x, heads, dtype, stored)

    queries: Array = q.swapaxes(0, 1).astype(dtype)
    fine = spec.recent
    if fine is None:
        scores = table(spec.k, k).scores(queries)
    else:  # a full group is decoded from the finer format and encoded again
        old_k, old_v = (fine.decode(fine.encode(x), dim) for x in (k, v))
        old_scores = table(spec.k, old_k).scores(queries)
        scores = np.where(near, table(fine, k).scores(queries), old_scores)
    scores = np.where(seen, scores * dtype(dim**-0.5), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    if fine is None:
        out = table(spec.v, v).mix(weights)
    else:
        out = table(fine, v).mix(np.where(near, weights, 0))
        out += table(spec.v, old_v).mix(np.where(near, 0, weights))
    return out.swapaxes(0, 1)


def exact(spec: KVSpec, q: Array, k: Array, v: Array, window: int | None = None) -> Array:
    """Attention of all queries ``q [N, H, D]`` of a sequence to its keys and values
    ``[N, Hkv, D]``, scaled by 1 / sqrt(D)."""
    return _attend(spec, q, k, v, window, np.float64, stored=False)


def plain(spec: KVSpec, q: Array, k: Array, v: Array, window: int | None = None) -> Array:
    """The same, computed in float32."""
    return _attend(spec, q, k, v, window, np.float32, stored=True)
