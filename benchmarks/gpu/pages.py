"""A cache whose pages are all full of random vectors, without the time of a prefill: the backend
writes the first pages of each pool, the others are copies of these."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvant.bench.attention import Heads
from kvant.cache.sizing import recent_per_sequence
from kvant.formats import PAGE_TOKENS, KVSpec
from kvant.kernels import Batch, BatchSequence, KVMemory, make_backend, make_memory
from kvant.kernels.triton.pool import find_device

_WRITTEN = 32
"""Base pages that the backend writes."""
_CHUNK = 1024
"""Rows of a write."""


def batch_of(sequences: list[BatchSequence]) -> Batch:
    """All rows of some sequences; the logits of the last row of each are wanted."""
    positions = np.concatenate([np.arange(seq.start, seq.end) for seq in sequences])
    rows = np.cumsum([seq.end - seq.start for seq in sequences]) - 1
    return Batch(np.zeros_like(positions), positions, tuple(sequences), rows)


def repeat_pages(pages: Any, written: int) -> None:
    """Fill a pool ``[pages, bytes]`` with copies of its first pages."""
    done = written
    while done < len(pages):
        count = min(done, len(pages) - done)
        pages[done : done + count] = pages[:count]
        done += count


class Tables:
    """Page tables of sequences that share no base pages, in no order.

    Args:
        spec: the formats.
        num_pages, num_recent: of the pools.
    """

    def __init__(self, spec: KVSpec, num_pages: int, num_recent: int) -> None:
        self._spec, self._num_recent = spec, num_recent
        self._order = np.random.default_rng(0).permutation(num_pages)

    def decodes(self, batch: int, context: int) -> Batch:
        """The last token of each of so many sequences of ``context`` tokens; their recent pages
        are shared if there are too few."""
        sink, recent = int(self._spec.sink), self._spec.recent is not None
        groups = -(-context // PAGE_TOKENS)
        own = groups - recent  # the open group is in a recent page
        sequences = []
        end = context - (context % PAGE_TOKENS == 0)  # a full group would go to a base page
        for row in range(batch):
            at = row * own
            pages = np.take(self._order, np.arange(at, at + own), mode="wrap")
            fine = np.arange(0)
            if recent:
                first = row * (1 + sink)
                fine = np.array([first % self._num_recent])
                pages[:sink] = (first + 1) % self._num_recent
            sequences.append(BatchSequence(row, end - 1, end, pages, fine))
        return batch_of(sequences)


def num_base_pages(spec: KVSpec, context: int) -> int:
    """Base pages that :class:`Tables` takes for a sequence."""
    return -(-context // PAGE_TOKENS) - recent_per_sequence(spec)


def fill(backend: Any, memory: KVMemory, dtype: torch.dtype) -> None:
    """Random vectors everywhere."""
    spec, shape = memory.spec, memory.shape
    base, recent = memory.base, memory.recent
    sink = int(spec.sink)
    device = find_device()

    def write(sequence: BatchSequence) -> None:
        rows = sequence.end - sequence.start
        batch = batch_of([sequence])
        for layer in range(shape.num_layers):
            k, v = torch.randn(
                (2, rows, shape.num_kv_heads, shape.head_dim), device=device, dtype=dtype
            )
            backend.write(layer, k, v, batch)

    kept = min(4, recent.num_pages)
    for page in range(kept):
        own = np.array([page])
        full = PAGE_TOKENS - (1 - sink)  # without a sink a full group would go to a base page
        write(BatchSequence(0, 0, full, own[:sink], own))
    if kept:
        repeat_pages(recent.pages, kept)
    written = min(_WRITTEN, base.num_pages)
    step = min(_CHUNK, memory.scratch.num_pages * PAGE_TOKENS or _CHUNK)
    table = np.concatenate([np.zeros(sink, np.int64), np.arange(written)])
    for start in range(sink * PAGE_TOKENS, len(table) * PAGE_TOKENS, step):
        end = min(start + step, len(table) * PAGE_TOKENS)
        scratch = recent.num_pages + np.arange((end - start) // PAGE_TOKENS)
        fine = scratch if spec.recent else scratch[:0]
        write(BatchSequence(0, start, end, table, fine))
    repeat_pages(base.pages, written)


class Filled:
    """A cache by itself.

    Args:
        spec, heads, layers: its formats and geometry.
        num_pages: base pages; with a recent part there are as many recent ones as ``sequences``
            need, at most 256.
        chunk: rows of the largest prompt chunk that will be written.
        dtype: of keys and values.
    """

    def __init__(
        self,
        spec: KVSpec,
        heads: Heads,
        *,
        layers: int,
        num_pages: int,
        sequences: int,
        dtype: torch.dtype,
        chunk: int = _CHUNK,
    ) -> None:
        shape = heads.kv_shape(layers)
        recent = min(256, recent_per_sequence(spec) * max(2, sequences)) if spec.recent else 0
        self.spec, self.heads, self.layers = spec, heads, layers
        self.memory = make_memory("triton", spec, shape, num_pages, recent, max(chunk, _CHUNK))
        self.backend: Any = make_backend("triton", self.memory)
        self.tables = Tables(spec, num_pages, recent)
        fill(self.backend, self.memory, dtype)

    def bytes_read(self, batch: int, context: int) -> int:
        """Bytes of one layer's pages that a decode step sees."""
        shape, fine = self.heads.kv_shape(self.layers), recent_per_sequence(self.spec)
        base = -(-context // PAGE_TOKENS) - fine
        of_base = self.spec.layout(shape)[0].nbytes
        of_fine = self.spec.fine.layout(shape)[0].nbytes
        return batch * (base * of_base + fine * of_fine)
