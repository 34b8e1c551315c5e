"""A backend at work: sequences of random vectors over shuffled, poisoned pages.

It plays the engine (the protocol of kvant.cache.paged and kernels/backend.py) without a model:
keys, values and queries are given, what comes back is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvant.cache.paged import Holding, PageCopy, PagedCache
from kvant.cache.pool import BytePool
from kvant.formats import PAGE_TOKENS, KVShape, KVSpec, PartView
from kvant.formats.pages import open_pages
from kvant.kernels import Batch, BatchSequence, KVMemory, make_backend
from tests.kernels.attention_oracle import LayerFormats, exact, plain

Array = NDArray[Any]

NUM_PAGES, NUM_RECENT, NUM_SCRATCH = 24, 17, 12


@dataclass(eq=False)
class Sequence:
    """Inputs ``[L, N, heads, D]`` of a sequence, and ``out`` like ``q`` as far as computed."""

    tokens: list[int]
    q: Array
    k: Array
    v: Array
    out: Array
    holding: Holding = field(default_factory=Holding)
    computed: int = 0
    known: dict[str, Array] = field(default_factory=dict)  # what the oracle said


Slice = tuple[Sequence, int, int]
Written = list[tuple[BytePool, set[int]]]


class Step(NamedTuple):
    """What a step computes, ``(sequence, start, end)``; its batch; and the pages of the base
    and the recent pool that it may write."""

    slices: list[Slice]
    batch: Batch
    written: Written


class Driver:
    """Runs sequences on one backend.

    Args:
        backend: its name.
        kv: spelling of the spec.
        heads: query heads; ``kv_heads`` of keys and values.
        poison: byte that all pages are full of before they are written.
    """

    def __init__(
        self,
        backend: str,
        kv: str,
        *,
        head_dim: int = 64,
        heads: int = 4,
        kv_heads: int = 2,
        layers: int = 1,
        window: int | None = None,
        poison: int = 0xFF,
    ) -> None:
        self.spec = KVSpec.parse(kv)
        self.shape = KVShape(num_layers=layers, num_kv_heads=kv_heads, head_dim=head_dim)
        self.heads = heads
        self.window = window
        num_recent, num_scratch = (NUM_RECENT, NUM_SCRATCH) if self.spec.recent else (0, 0)
        self.memory = KVMemory.allocate(
            self.spec, self.shape, NUM_PAGES, num_recent, num_scratch * PAGE_TOKENS
        )
        for pool in (self.memory.base, self.memory.recent, self.memory.scratch):
            pool.pages[:] = poison
        self.backend = make_backend(backend, self.memory)
        self.cache = PagedCache(NUM_PAGES, num_recent, sink=self.spec.sink, prefix_caching=True)
        rng = np.random.default_rng(0)
        self._base_order = rng.permutation(NUM_PAGES)  # page tables in no order at all
        self._recent_order = rng.permutation(num_recent)
        self._rng = rng

    def add(self, length: int, like: Sequence | None = None, shared: int = 0) -> Sequence:
        """A sequence whose first ``shared`` positions are those of ``like``. It starts with
        the pages that are cached for them."""
        layers, dim = self.shape.num_layers, self.shape.head_dim

        def vectors(heads: int) -> Array:
            return self._rng.standard_normal((layers, length, heads, dim), np.float32)

        tokens = self._rng.integers(0, 2**31, length).tolist()
        kv_heads = self.shape.num_kv_heads
        q, k, v = vectors(self.heads), vectors(kv_heads), vectors(kv_heads)
        if like is not None:
            tokens[:shared] = like.tokens[:shared]
            for ours, theirs in ((q, like.q), (k, like.k), (v, like.v)):
                ours[:, :shared] = theirs[:, :shared]
        seq = Sequence(tokens, q, k, v, out=np.full_like(q, np.nan))
        seq.computed = self.cache.adopt_prefix(seq.holding, tokens)
        return seq

    def replay(self, seq: Sequence) -> Sequence:
        """A new sequence with the inputs of one from a driver of the same spec."""
        out = np.full_like(seq.q, np.nan)
        new = Sequence(list(seq.tokens), seq.q, seq.k, seq.v, out, known=seq.known)
        new.computed = self.cache.adopt_prefix(new.holding, new.tokens)
        return new

    def fork(self, parent: Sequence, length: int) -> Sequence:
        """A sequence that shares all that ``parent`` has computed, its open page too."""
        end = parent.computed
        child = self.add(length, parent, end)
        self.cache.release(child.holding)
        child.computed = self.cache.adopt_fork(child.holding, parent.holding, end, end)
        return child

    def run(self, *sequences: Sequence, chunks: Ordered[int] = (512,)) -> None:
        """Compute all sequences to their ends; step ``i`` of sequence ``j`` takes
        ``chunks[(i + j) % len(chunks)]`` rows, so prompts and decodes meet in a batch."""
        step = 0
        while any(seq.computed < len(seq.tokens) for seq in sequences):
            self.step([(seq, chunks[(step + j) % len(chunks)]) for j, seq in enumerate(sequences)])
            step += 1

    def step(self, parts: Ordered[tuple[Sequence, int]]) -> None:
        """One step of up to so many rows of each sequence, all layers."""
        slices, batch, written = self.begin(parts)
        others = [np.delete(pool.pages, list(own), axis=0) for pool, own in written]
        for layer in range(self.shape.num_layers):
            q, k, v = self._projection(slices, layer)
            self.backend.write(layer, k, v, batch)
            out = self.backend.attend(
                layer, q, batch, scale=self.shape.head_dim**-0.5, window=self.window
            )
            assert out.shape == q.shape
            for part, (seq, start, end) in zip(batch.sequences, slices, strict=True):
                seq.out[layer, start:end] = out[part.row : part.row + end - start]
        for before, (pool, own) in zip(others, written, strict=True):
            after = np.delete(pool.pages, list(own), axis=0)
            assert np.array_equal(before, after), "a page was written that is not the batch's"
        for seq, _, end in slices:
            seq.computed = end
            self.cache.commit(seq.holding, seq.tokens, end)

    def begin(self, parts: Ordered[tuple[Sequence, int]]) -> Step:
        """Reserve pages for a step, make its copies and its batch."""
        slices: list[Slice] = []
        copies: list[PageCopy] = []
        for seq, count in parts:
            start, target = seq.computed, len(seq.tokens)
            end = self.cache.chunk_end(start, min(start + count, target), target)
            if end > start:
                made = self.cache.reserve(seq.holding, start, end)
                assert made is not None, "the pools of the driver are too small"
                slices.append((seq, start, end))
                copies += made
        for recent, source, target in copies:
            order = self._recent_order if recent else self._base_order
            pool = self.memory.recent if recent else self.memory.base
            pool.copy(order[source], order[target])
        return Step(slices, *self._batch(slices))

    def _projection(self, slices: list[Slice], layer: int) -> tuple[Array, Array, Array]:
        """Queries, keys and values of a batch: strided views, as of one fused projection."""
        rows = [[x[layer, a:b] for x in (s.q, s.k, s.v)] for s, a, b in slices]
        fused = np.concatenate([np.concatenate(row, axis=1) for row in rows])
        heads, kv_heads = self.heads, self.shape.num_kv_heads
        return fused[:, :heads], fused[:, heads:-kv_heads], fused[:, -kv_heads:]

    def _batch(self, slices: list[Slice]) -> tuple[Batch, Written]:
        sequences, positions = [], []
        base: set[int] = set()
        recent: set[int] = set()
        scratch = self.memory.recent.num_pages + self.memory.scratch.num_pages
        row = 0
        for seq, start, end in slices:
            pages = self._pages(seq)
            first, last = start // PAGE_TOKENS, end // PAGE_TOKENS
            fine: list[int] = []
            if self.spec.recent is None:
                base.update(pages[first:].tolist())
            else:
                base.update(pages[max(first, self.spec.sink) : last].tolist())
                for group in range(first, -(-end // PAGE_TOKENS)):
                    if self.spec.sink and group == 0:
                        fine.append(int(pages[0]))
                        recent.add(fine[-1])
                    elif group == last or start > group * PAGE_TOKENS:
                        fine.append(int(self._recent_order[seq.holding.recent]))
                        recent.add(fine[-1])
                    else:
                        scratch -= 1  # from the end: only the table says which page is whose
                        fine.append(scratch)
            sequences.append(BatchSequence(row, start, end, pages, np.array(fine, np.int64)))
            positions.append(np.arange(start, end))
            row += end - start
        tokens = np.concatenate([np.array(seq.tokens[a:b], np.int64) for seq, a, b in slices])
        batch = Batch(tokens, np.concatenate(positions), tuple(sequences), np.array([], np.int64))
        return batch, [(self.memory.base, base), (self.memory.recent, recent)]

    def _pages(self, seq: Sequence) -> Array:
        """Where the pages of a sequence's groups are in their pools."""
        pages = self._base_order[seq.holding.pages]
        sink = seq.holding.pages[: self.spec.sink]
        pages[: len(sink)] = self._recent_order[sink]
        return pages

    def base_bytes(self, seq: Sequence) -> Array:
        """The base pages of a sequence, in order."""
        return self.memory.base.pages[self._pages(seq)[self.spec.sink :]]

    def recent_vectors(self, seq: Sequence) -> Array:
        """What the recent pages of a sequence hold of its sink and its open group, still rotated:
        ``[K and V, L, tokens, Hkv, D]``; slots behind the open group have leftovers."""
        pages = seq.holding.pages[: self.spec.sink]
        tokens = min(seq.computed, PAGE_TOKENS) * len(pages)
        if seq.holding.recent is not None:
            pages = [*pages, seq.holding.recent]
            tokens += seq.computed % PAGE_TOKENS
        if not pages:
            return np.empty(0)
        spec, shape = self.spec.fine, self.shape
        read = []
        for page in self.memory.recent.pages[self._recent_order[pages]]:
            parts = [open_parts(spec, shape, page, layer) for layer in range(shape.num_layers)]
            read.append([[view.read(np.array([0])) for view in part] for part in parts])
        joined = np.concatenate(read, axis=-2)  # of [L, K and V, Hkv, 64, D]
        return joined[..., :tokens, :].transpose(1, 0, 3, 2, 4)

    def oracle(self, compute: Callable[..., Array], seq: Sequence) -> Array:
        """What ``exact`` or ``plain`` gives for all rows of a sequence, ``[L, N, H, D]``."""
        if compute.__name__ not in seq.known:
            formats = LayerFormats.of(self.spec, self.shape)
            layers = zip(formats, seq.q, seq.k, seq.v, strict=True)
            rows = [compute(each, qkv, self.window) for each, *qkv in layers]
            seq.known[compute.__name__] = np.stack(rows)
        return seq.known[compute.__name__]


def open_parts(spec: KVSpec, shape: KVShape, page: Array, layer: int) -> tuple[PartView, PartView]:
    """The K and V parts of one layer of one page, for all heads."""
    opened = open_pages(spec, shape, page[None])[layer]
    return opened.k, opened.v


def errors(driver: Driver, seq: Sequence) -> tuple[Array, Array]:
    """Length of the error of each output vector ``[L, N, H]``, and what it is in plain float32."""
    truth = driver.oracle(exact, seq)
    in_plain = driver.oracle(plain, seq) - truth
    return np.linalg.norm(seq.out - truth, axis=-1), np.linalg.norm(in_plain, axis=-1)


def assert_as_good_as_plain(driver: Driver, *sequences: Sequence, first: int = 0) -> None:
    """No output from position ``first`` on has more than twice the largest error of the plain
    float32 computation, both against float64 (the rule of flash-attention's tests)."""
    pairs = [errors(driver, seq) for seq in sequences]
    yardstick = max(in_plain.max() for _, in_plain in pairs)
    for error, _ in pairs:
        worst = error[:, first:].max()
        assert worst <= 2 * yardstick, f"{worst / yardstick:.2f} times the error of plain float32"
