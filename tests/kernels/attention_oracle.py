"""What attention over encoded pages is, written without pages: tables of decoded vectors.

Every token is encoded and decoded by its format, 64 of a group at once; which decoding a query
sees is decided by positions alone. :func:`exact` is the truth, in float64 on decoded vectors.
:func:`plain` is the same in float32 on vectors as they are stored (queries and outputs are
rotated instead), as backends do it without cleverness: its error is their yardstick.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvant.formats import KVFormat, KVShape, KVSpec

Array = NDArray[Any]

GROUP = 64


class LayerFormats(NamedTuple):
    """Formats of K and V of one layer; the finer ones of a query's own group, None without a
    recent part; whether group 0 is finer for all queries."""

    k: KVFormat
    v: KVFormat
    fine: tuple[KVFormat, KVFormat] | None
    sink: bool

    @classmethod
    def of(cls, spec: KVSpec, shape: KVShape) -> list[LayerFormats]:
        """Those of all layers."""
        out = []
        for base, fine in zip(spec.layout(shape), spec.fine.layout(shape), strict=True):
            finer = None if spec.recent is None else (fine.k, fine.v)
            out.append(cls(base.k, base.v, finer, spec.sink))
        return out


def encode_groups(fmt: KVFormat, x: Array) -> tuple[Array, ...]:
    """Encode ``x [N, H, D]`` in groups of 64, the last one filled up with zeros: planes of
    ``[groups, H, 64, D]``."""
    whole = np.zeros((-(-len(x) // GROUP) * GROUP, *x.shape[1:]), np.float32)
    whole[: len(x)] = x
    return fmt.encode(whole.reshape(-1, GROUP, *x.shape[1:]).swapaxes(1, 2))


def stored(fmt: KVFormat, x: Array) -> Array:
    """What a format keeps of ``x [N, H, D]``, still rotated. If it is a format by page, tokens
    of a last group that is not full are not what any page holds: nobody may see them."""
    decoded = fmt.dequantize(encode_groups(fmt, x), x.shape[-1])
    out: Array = decoded.swapaxes(1, 2).reshape(-1, *x.shape[1:])[: len(x)]
    return out


class _Table(NamedTuple):
    """Vectors ``[H, N, D]`` decoded from ``fmt``, still rotated if ``rotated``."""

    fmt: KVFormat
    vectors: Array
    rotated: bool

    @classmethod
    def of(cls, fmt: KVFormat, x: Array, heads: int, dtype: type, rotated: bool) -> _Table:
        vectors: Array = stored(fmt, x).astype(dtype)
        vectors = vectors if rotated else fmt.unrotate(vectors)
        of_head = [head * x.shape[1] // heads for head in range(heads)]
        return cls(fmt, vectors[:, of_head].swapaxes(0, 1), rotated)

    def scores(self, q: Array) -> Array:
        return (self.fmt.rotate(q) if self.rotated else q) @ self.vectors.swapaxes(1, 2)

    def mix(self, weights: Array) -> Array:
        out = weights @ self.vectors
        return self.fmt.unrotate(out) if self.rotated else out


def _attend(
    formats: LayerFormats,
    qkv: tuple[Array, Array, Array],
    window: int | None,
    dtype: type,
    rotated: bool,
) -> Array:
    q, k, v = qkv
    length, heads, dim = q.shape
    position = np.arange(length)
    seen = position <= position[:, None]
    if window is not None:
        seen &= position > position[:, None] - window
    near = position // GROUP == position[:, None] // GROUP
    if formats.sink:
        near |= position < GROUP

    def table(fmt: KVFormat, x: Array) -> _Table:
        return _Table.of(fmt, x, heads, dtype, rotated)

    queries: Array = q.swapaxes(0, 1).astype(dtype)
    if formats.fine is None:
        scores = table(formats.k, k).scores(queries)
    else:  # a full group is decoded from the finer format and encoded again
        fine_k, fine_v = formats.fine
        old_k, old_v = (f.unrotate(stored(f, x)) for f, x in ((fine_k, k), (fine_v, v)))
        old_scores = table(formats.k, old_k).scores(queries)
        scores = np.where(near, table(fine_k, k).scores(queries), old_scores)
    scores = np.where(seen, scores * dtype(dim**-0.5), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    if formats.fine is None:
        out = table(formats.v, v).mix(weights)
    else:
        out = table(fine_v, v).mix(np.where(near, weights, 0))
        out += table(formats.v, old_v).mix(np.where(near, 0, weights))
    return out.swapaxes(0, 1)


def exact(formats: LayerFormats, qkv: tuple[Array, Array, Array], window: int | None) -> Array:
    """Attention of all queries ``q [N, H, D]`` of a sequence to its keys and values
    ``[N, Hkv, D]``, scaled by 1 / sqrt(D)."""
    return _attend(formats, qkv, window, np.float64, rotated=False)


def plain(formats: LayerFormats, qkv: tuple[Array, Array, Array], window: int | None) -> Array:
    """The same, computed in float32."""
    return _attend(formats, qkv, window, np.float32, rotated=True)
