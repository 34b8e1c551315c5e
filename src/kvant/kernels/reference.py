"""The reference backend: the living specification of ``write`` and ``attend``, in numpy.

Float32 throughout, no cleverness: whole pages are dequantized, scores are a matrix product and
softmax is computed in one piece. Every other backend is tested against it. It also runs what
the others cannot.

What a query sees is decided by positions alone: earlier pages in the spec's own formats, and its
own page, and the first if it is a sink, in the finer format if the spec has one. The arithmetic
is too: queries are taken in tiles of 16 positions (position // 16), always 16 rows against whole
pages with the rest masked. A tile's shapes, and so the order of every sum, do not depend on the
chunk or the batch: results are bit-equal for any chunking of a prompt, prefix hit or batch
composition.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvant.formats import PAGE_TOKENS, KVFormat
from kvant.formats.pages import LayerPages, open_pages
from kvant.kernels.backend import Batch, BatchSequence, KVMemory

__all__ = ["ReferenceBackend"]

F32 = NDArray[np.float32]
_TILE = 16


class _Segment(NamedTuple):
    """Keys and values ``[Hkv, N, D]`` in the domains in which their formats store them."""

    k_format: KVFormat
    v_format: KVFormat
    k: F32
    v: F32

    @classmethod
    def read(cls, store: LayerPages, pages: NDArray[Any]) -> _Segment:
        return cls(store.k.fmt, store.v.fmt, store.k.read(pages), store.v.read(pages))

    def first(self, count: int) -> _Segment:
        return self._replace(k=self.k[:, :count], v=self.v[:, :count])


class _Softmax(NamedTuple):
    """What becomes of dot products; the options of ``attend``."""

    scale: float
    softcap: float | None
    sinks: F32  # [H]; without sinks -inf, which changes no bit

    def weights(self, scores: F32, visible: NDArray[np.bool_]) -> tuple[F32, F32]:
        """Of dot products ``[Hkv, share * n, N]``, rows of a head together: weights that are not
        normalized yet, and their sums ``[..., 1]``. Keys that a query does not see
        (``visible [n, N]``) may be anything, NaN included."""
        rows = len(visible)
        scores = scores * np.float32(self.scale)
        if self.softcap is not None:
            cap = np.float32(self.softcap)
            scores = cap * np.tanh(scores / cap)
        scores = np.where(
            np.tile(visible, (scores.shape[1] // rows, 1)), scores, np.float32(-np.inf)
        )
        sink = np.repeat(self.sinks.reshape(len(scores), -1), rows, axis=1)[..., None]
        highest = np.maximum(scores.max(axis=-1, keepdims=True), sink)
        weights = np.exp(scores - highest)
        return weights, weights.sum(axis=-1, keepdims=True) + np.exp(sink - highest)


class ReferenceBackend:
    """See the module's docstring; the contract is :class:`kvant.kernels.backend.Backend`."""

    name = "reference"

    def __init__(self, memory: KVMemory, num_threads: int | None = None) -> None:  # noqa: ARG002
        spec, shape = memory.spec, memory.shape
        self._has_recent = spec.recent is not None
        self._num_sink = int(spec.sink)
        self._num_recent = memory.recent.num_pages
        self._base = open_pages(spec, shape, memory.base.pages)
        self._recent = open_pages(spec.fine, shape, memory.recent.pages)
        self._scratch = open_pages(spec.fine, shape, memory.scratch.pages, one_layer=True)

    def write(self, layer: int, k: Any, v: Any, batch: Batch) -> None:
        """Encode new tokens; a group that becomes full is re-encoded from its fine page, unless
        it is the sink."""
        k, v = _float32(k), _float32(v)
        if not self._has_recent:
            pages = np.concatenate(
                [seq.pages[np.arange(seq.start, seq.end) // PAGE_TOKENS] for seq in batch.sequences]
            )
            self._base[layer].write(pages, batch.positions % PAGE_TOKENS, k, v)
            return
        for seq in batch.sequences:
            rows = slice(seq.row, seq.row + seq.end - seq.start)
            position = batch.positions[rows]
            groups = position // PAGE_TOKENS
            pages = seq.fine_pages[groups - seq.start // PAGE_TOKENS]
            for store, first, here in (
                (self._recent[layer], 0, pages < self._num_recent),
                (self._scratch[layer], self._num_recent, pages >= self._num_recent),
            ):
                slots = position[here] % PAGE_TOKENS
                store.write(pages[here] - first, slots, k[rows][here], v[rows][here])
            first_group = max(seq.start // PAGE_TOKENS, self._num_sink)
            for group in range(first_group, seq.end // PAGE_TOKENS):
                store, page = self._fine_page(layer, seq, group)
                self._base[layer].fill(seq.pages[group : group + 1], *store.decode(page))

    def attend(
        self,
        layer: int,
        q: Any,
        batch: Batch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: F32 | None = None,
    ) -> Any:
        """Plain softmax attention over dequantized pages, a tile of one sequence at a time."""
        queries = _float32(q)
        if sinks is None:
            sinks = np.full(queries.shape[1], -np.inf, np.float32)
        softmax = _Softmax(scale, softcap, sinks)
        out = np.empty_like(queries)
        for seq in batch.sequences:
            last_group = (seq.end - 1) // PAGE_TOKENS
            in_base = seq.pages[self._num_sink : last_group + (not self._has_recent)]
            base = _Segment.read(self._base[layer], in_base)
            sink = [_Segment.read(self._recent[layer], seq.pages[:1])] if self._num_sink else []
            for first in range(seq.start - seq.start % _TILE, seq.end, _TILE):
                segments = self._segments(layer, seq, first // PAGE_TOKENS, sink, base)
                start, end = max(seq.start, first), min(seq.end, first + _TILE)
                rows = slice(seq.row + start - seq.start, seq.row + end - seq.start)
                tile = np.zeros((_TILE, *queries.shape[1:]), np.float32)
                tile[start - first : end - first] = queries[rows]
                visible = _visible(first, sum(seg.k.shape[1] for seg in segments), window)
                attended = _attention(tile, segments, visible, softmax)
                out[rows] = attended[start - first : end - first]
        return _like(out, q)

    def _segments(
        self, layer: int, seq: BatchSequence, group: int, sink: list[_Segment], base: _Segment
    ) -> list[_Segment]:
        """What queries of a group see, whole pages: sink, earlier pages, their own."""
        if not self._has_recent:
            return [base.first((group + 1) * PAGE_TOKENS)]
        own = _Segment.read(*self._fine_page(layer, seq, group))
        if group < self._num_sink:
            return [own]
        return [*sink, base.first((group - self._num_sink) * PAGE_TOKENS), own]

    def _fine_page(
        self, layer: int, seq: BatchSequence, group: int
    ) -> tuple[LayerPages, NDArray[np.int64]]:
        """The page of a group that the rows touch, and where to read it."""
        index = group - seq.start // PAGE_TOKENS
        page = seq.fine_pages[index : index + 1]
        if page[0] < self._num_recent:
            return self._recent[layer], page
        return self._scratch[layer], page - self._num_recent


def _visible(first: int, num_keys: int, window: int | None) -> NDArray[np.bool_]:
    """Which of the keys ``[0, num_keys)`` the queries of the tile at ``first`` see:
    ``[16, num_keys]``."""
    query, key = np.arange(first, first + _TILE)[:, None], np.arange(num_keys)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _attention(
    q: F32, segments: list[_Segment], visible: NDArray[np.bool_], softmax: _Softmax
) -> F32:
    """Attend queries ``q [n, H, D]`` to the concatenation of the segments; ``[n, H, D]``."""
    rows, heads, dim = q.shape
    kv_heads = segments[0].k.shape[0]
    share = heads // kv_heads
    grouped = q.reshape(rows, kv_heads, share, dim).transpose(1, 2, 0, 3)
    flat: F32 = grouped.reshape(kv_heads, share * rows, dim)
    with np.errstate(invalid="ignore", over="ignore"):
        scores = np.concatenate(
            [seg.k_format.rotate(flat) @ seg.k.swapaxes(1, 2) for seg in segments], axis=-1
        )
        weights, total = softmax.weights(scores, visible)
        out = np.zeros_like(flat)
        position = 0
        for seg in segments:
            length = seg.k.shape[1]
            part = _weighted_sum(weights[..., position : position + length], seg.v)
            out += seg.v_format.unrotate(part)
            position += length
        out /= total
    by_row = out.reshape(kv_heads, share, rows, dim).transpose(2, 0, 1, 3)
    return by_row.reshape(rows, heads, dim)


def _weighted_sum(weights: F32, v: F32) -> F32:
    """``weights [.., n, N] @ v [.., N, D]`` in which a NaN or Inf value reaches only the rows
    that give it weight (0 * NaN would reach all)."""
    broken = np.logical_not(np.isfinite(v).all(axis=-1, keepdims=True))
    if not broken.any():
        return weights @ v
    out = weights @ np.where(broken, np.float32(0), v)
    out[((weights > 0) & broken.swapaxes(1, 2)).any(axis=-1)] = np.nan
    return out


def _float32(x: Any) -> F32:
    """A float32 numpy array of a numpy array or CPU torch tensor."""
    return x.astype(np.float32, copy=False) if isinstance(x, np.ndarray) else x.float().numpy()


def _like(out: F32, template: Any) -> Any:
    if isinstance(template, np.ndarray):
        return out
    import torch

    return torch.from_numpy(out).to(template.dtype)
