"""What pages keep of the keys and values that were written: signal and noise by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvant.engine.engine import Engine
from kvant.eval.metrics import sqnr_db
from kvant.formats import PAGE_TOKENS
from kvant.formats.pages import LayerPages
from kvant.kernels import Backend, Batch, KVMemory

__all__ = ["Probe"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


class Probe:
    """A backend that passes everything on to another and compares each group of 64 positions,
    once it is full, with what later queries will see of it.

    For one sequence at a time, computed from its first position on. ``signal`` and ``noise`` are
    sums of squares, float64 ``[2, layers]``, keys first.
    """

    def __init__(self, inner: Backend, memory: KVMemory) -> None:
        self.name = inner.name
        self._inner = inner
        spec, shape = memory.spec, memory.shape
        self._shape, self._layers, self._pool = shape, spec.layout(shape), memory.base
        self._num_sink = int(spec.sink)
        self.signal: F64 = np.zeros((2, shape.num_layers))
        self.noise: F64 = np.zeros((2, shape.num_layers))
        empty = np.empty((2, 0, shape.num_kv_heads, shape.head_dim), np.float32)
        self._open = [empty] * shape.num_layers

    @classmethod
    def install(cls, engine: Engine) -> Probe:
        """Put a probe before the backend of an engine that does nothing at the moment."""
        engine.backend = probe = cls(engine.backend, engine.memory)
        return probe

    def write(self, layer: int, k: Any, v: Any, batch: Batch) -> None:
        """Pass on, then measure the groups that became full."""
        self._inner.write(layer, k, v, batch)
        (sequence,) = batch.sequences
        written = np.stack((_float32(k), _float32(v)))
        if sequence.start > 0:
            written = np.concatenate((self._open[layer], written), axis=1)
        first, last = sequence.start // PAGE_TOKENS, sequence.end // PAGE_TOKENS
        full = (last - first) * PAGE_TOKENS
        self._open[layer] = written[:, full:]
        if not full:
            return
        # The sink stays in its recent page; what was re-encoded is measured.
        skip = max(self._num_sink - first, 0)
        kept = self._read(layer, sequence.pages[first + skip : last])
        exact = written[:, skip * PAGE_TOKENS : full].astype(np.float64).reshape(kept.shape)
        self.signal[:, layer] += np.square(exact).sum(axis=(1, 2, 3, 4))
        self.noise[:, layer] += np.square(exact - kept).sum(axis=(1, 2, 3, 4))

    def _read(self, layer: int, pages: NDArray[np.int64]) -> NDArray[np.float32]:
        """Keys and values ``[2, n, 64, Hkv, D]`` that base pages hold."""
        place, heads = self._layers[layer], self._shape.num_kv_heads
        raw = self._pool.read(pages, place.offset, place.offset + place.nbytes)
        by_head = raw.reshape(len(pages), heads, place.nbytes // heads)
        opened = LayerPages(place, self._shape.head_dim, by_head)
        return np.stack(opened.decode(np.arange(len(pages))))

    def attend(self, layer: int, q: Any, batch: Batch, **options: Any) -> Any:
        """Pass on."""
        return self._inner.attend(layer, q, batch, **options)

    def sqnr_db(self) -> F64:
        """Signal to quantization noise ratio, dB ``[2, layers]``, keys first; infinite where
        nothing is lost."""
        return sqnr_db(self.signal, self.noise)


def _float32(x: Any) -> F32:
    """A float32 numpy array of a numpy array or torch tensor."""
    return np.asarray(x if isinstance(x, np.ndarray) else x.float().cpu(), np.float32)
