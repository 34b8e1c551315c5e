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
QKV = tuple[Array, Array, Array]

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


class Options(NamedTuple):
    """Those of :meth:`Backend.attend`, with the scale 1 / sqrt(D)."""

    window: int | None = None
    softcap: float | None = None
    sinks: Array | None = None


class Piece(NamedTuple):
    """Keys and values ``[N, Hkv, D]`` in the formats in which they are seen by some queries:
    ``visible [N, N]``, query and key."""

    visible: Array
    k_format: KVFormat
    k: Array
    v_format: KVFormat
    v: Array


class Attended(NamedTuple):
    """Outputs ``[N, H, D]``; the weights they are made with and the derivatives of scores by
    those before the softcap, ``[H, N, N]``."""

    out: Array
    weights: Array
    slope: Array


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


def by_query_head(x: Array, heads: int) -> Array:
    """``x [Hkv, ...]`` with the KV head of each of the query heads: ``[H, ...]``."""
    return x[[head * len(x) // heads for head in range(heads)]]


def pieces(formats: LayerFormats, k: Array, v: Array, window: int | None) -> list[Piece]:
    """Everything that is seen, by the formats it is seen in."""
    position = np.arange(len(k))
    seen = position <= position[:, None]
    if window is not None:
        seen &= position > position[:, None] - window
    if formats.fine is None:
        return [Piece(seen, formats.k, k, formats.v, v)]
    near = position // GROUP == position[:, None] // GROUP
    if formats.sink:
        near |= position < GROUP
    fine_k, fine_v = formats.fine
    # a full group is decoded from the finer format and encoded again
    old_k, old_v = (f.unrotate(stored(f, x)) for f, x in ((fine_k, k), (fine_v, v)))
    return [
        Piece(seen & near, fine_k, k, fine_v, v),
        Piece(seen & ~near, formats.k, old_k, formats.v, old_v),
    ]


class Table(NamedTuple):
    """Vectors ``[H, N, D]`` decoded from ``fmt``, still rotated if ``rotated``."""

    fmt: KVFormat
    vectors: Array
    rotated: bool

    @classmethod
    def of(cls, fmt: KVFormat, x: Array, heads: int, dtype: type, rotated: bool) -> Table:
        vectors: Array = stored(fmt, x).swapaxes(0, 1).astype(dtype)
        vectors = vectors if rotated else fmt.unrotate(vectors)
        return cls(fmt, by_query_head(vectors, heads), rotated)

    def scores(self, q: Array) -> Array:
        return (self.fmt.rotate(q) if self.rotated else q) @ self.vectors.swapaxes(1, 2)

    def mix(self, weights: Array) -> Array:
        out = weights @ self.vectors
        return self.fmt.unrotate(out) if self.rotated else out


def softmax(scores: Array, sinks: Array | None) -> Array:
    """Weights of scores ``[H, N, N]``, -inf where a key is not seen."""
    sink = np.full(len(scores), -np.inf) if sinks is None else sinks
    sink = sink.astype(scores.dtype)[:, None, None]
    highest = np.maximum(scores.max(axis=-1, keepdims=True), sink)
    weights = np.exp(scores - highest)
    out: Array = weights / (weights.sum(axis=-1, keepdims=True) + np.exp(sink - highest))
    return out


def _attend(
    formats: LayerFormats, qkv: QKV, options: Options, dtype: type, rotated: bool
) -> Attended:
    q, k, v = qkv
    length, heads, dim = q.shape
    queries: Array = q.swapaxes(0, 1).astype(dtype)
    scores = np.full((heads, length, length), -np.inf, dtype)
    slope = np.ones_like(scores)
    seen = pieces(formats, k, v, options.window)
    for piece in seen:
        table = Table.of(piece.k_format, piece.k, heads, dtype, rotated)
        dots = table.scores(queries) * dtype(dim**-0.5)
        if options.softcap is not None:
            bent = np.tanh(dots / dtype(options.softcap))
            dots = dtype(options.softcap) * bent
            slope = np.where(piece.visible, 1 - bent * bent, slope)
        scores = np.where(piece.visible, dots, scores)
    weights = softmax(scores, options.sinks)
    out = np.zeros_like(queries)
    for piece in seen:
        table = Table.of(piece.v_format, piece.v, heads, dtype, rotated)
        out += table.mix(np.where(piece.visible, weights, 0))
    return Attended(out.swapaxes(0, 1), weights, slope)


def exact(formats: LayerFormats, qkv: QKV, options: Options) -> Attended:
    """Attention of all queries ``q [N, H, D]`` of a sequence to its keys and values
    ``[N, Hkv, D]``, scaled by 1 / sqrt(D)."""
    return _attend(formats, qkv, options, np.float64, rotated=False)


def plain(formats: LayerFormats, qkv: QKV, options: Options) -> Array:
    """The outputs, computed in float32."""
    return _attend(formats, qkv, options, np.float32, rotated=True).out
