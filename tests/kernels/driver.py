"""A backend at work: sequences of random vectors over shuffled, poisoned pages.

It plays the engine (the protocol of kvant.cache.paged and kernels/backend.py) without a model:
keys, values and queries are given, what comes back is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvant.cache.paged import Holding, PageCopy, PagedCache
from kvant.cache.pool import Pool
from kvant.formats import PAGE_TOKENS, KVShape, KVSpec, PartView
from kvant.formats.pages import open_pages
from kvant.kernels import Batch, BatchSequence, make_backend, make_memory
from tests.kernels.attention_oracle import QKV, LayerFormats, Options, exact, plain
from tests.kernels.tolerance import Arithmetic, Rounding, arithmetic_of, rounding

Array = NDArray[Any]

NUM_PAGES, NUM_RECENT, NUM_SCRATCH = 24, 17, 12
GUARDS = 2  # pages that nobody is given: the first and the last of each pool


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
    adopted: int = 0  # from here on it is computed


def host(pool: Pool) -> Array:
    """The pages of a pool, which may be those of a GPU, ``uint8 [pages, bytes]``."""
    pages: Array = pool.pages if isinstance(pool.pages, np.ndarray) else pool.pages.cpu().numpy()
    return pages


Slice = tuple[Sequence, int, int]
Written = list[tuple[Pool, set[int]]]


class Step(NamedTuple):
    """What a step computes, ``(sequence, start, end)``; its batch; and the pages of each pool
    that it may write."""

    slices: list[Slice]
    batch: Batch
    written: Written


class Driver:
    """Runs sequences on one backend.

    Args:
        backend: its name.
        kv: spelling of the spec.
        heads: query heads; ``kv_heads`` of keys and values.
        window, softcap, sinks: options of ``attend``.
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
        softcap: float | None = None,
        sinks: Ordered[float] | None = None,
        poison: int = 0xFF,
    ) -> None:
        self.spec = KVSpec.parse(kv)
        self.shape = KVShape(num_layers=layers, num_kv_heads=kv_heads, head_dim=head_dim)
        self.heads = heads
        by_head = None if sinks is None else np.array(sinks, np.float32)
        self.options = Options(window, softcap, by_head)
        num_recent, num_scratch = (NUM_RECENT, NUM_SCRATCH) if self.spec.recent else (0, 0)
        self.memory = make_memory(
            backend,
            self.spec,
            self.shape,
            NUM_PAGES + GUARDS,
            num_recent + GUARDS if num_recent else 0,
            (num_scratch + GUARDS) * PAGE_TOKENS,
        )
        for pool in (self.memory.base, self.memory.recent, self.memory.scratch):
            pool.pages[:] = poison
        self.backend = make_backend(backend, self.memory)
        self.arithmetic: Arithmetic = arithmetic_of(backend)
        self.cache = PagedCache(NUM_PAGES, num_recent, sink=self.spec.sink, prefix_caching=True)
        rng = np.random.default_rng(0)
        self._base_order = 1 + rng.permutation(NUM_PAGES)  # page tables in no order at all
        self._recent_order = 1 + rng.permutation(num_recent)
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
        seq.computed = seq.adopted = self.cache.adopt_prefix(seq.holding, tokens, len(tokens) - 1)
        return seq

    def replay(self, seq: Sequence) -> Sequence:
        """A new sequence with the inputs of one from a driver of the same spec."""
        out = np.full_like(seq.q, np.nan)
        new = Sequence(list(seq.tokens), seq.q, seq.k, seq.v, out)
        new.computed = new.adopted = self.cache.adopt_prefix(
            new.holding, new.tokens, len(new.tokens) - 1
        )
        return new

    def fork(self, parent: Sequence, length: int) -> Sequence:
        """A sequence that shares all that ``parent`` has computed, its open page too."""
        end = parent.computed
        child = self.add(length, parent, end)
        self.cache.release(child.holding)
        child.computed = self.cache.adopt_fork(child.holding, parent.holding, end, end)
        child.adopted = child.computed
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
        others = [np.delete(host(pool), list(own), axis=0) for pool, own in written]
        for layer in range(self.shape.num_layers):
            q, k, v = self._projection(slices, layer)
            self.backend.write(layer, k, v, batch)
            out = self.backend.attend(
                layer, q, batch, scale=self.shape.head_dim**-0.5, **self.options._asdict()
            )
            assert out.shape == q.shape
            for part, (seq, start, end) in zip(batch.sequences, slices, strict=True):
                seq.out[layer, start:end] = out[part.row : part.row + end - start]
        for before, (pool, own) in zip(others, written, strict=True):
            after = np.delete(host(pool), list(own), axis=0)
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
        first_scratch = self.memory.recent.num_pages
        end_scratch = scratch = first_scratch + self.memory.scratch.num_pages - 1
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
        assert scratch == end_scratch or scratch > first_scratch, (
            "the pools of the driver are too small"
        )
        groups = {page - first_scratch for page in range(scratch, end_scratch)}
        memory = self.memory
        return batch, [(memory.base, base), (memory.recent, recent), (memory.scratch, groups)]

    def _pages(self, seq: Sequence) -> Array:
        """Where the pages of a sequence's groups are in their pools."""
        pages = self._base_order[seq.holding.pages]
        sink = seq.holding.pages[: self.spec.sink]
        pages[: len(sink)] = self._recent_order[sink]
        return pages

    def base_bytes(self, seq: Sequence) -> Array:
        """The base pages of a sequence, in order."""
        return host(self.memory.base)[self._pages(seq)[self.spec.sink :]]

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
        for page in host(self.memory.recent)[self._recent_order[pages]]:
            parts = [open_parts(spec, shape, page, layer) for layer in range(shape.num_layers)]
            read.append([[view.read(np.array([0])) for view in part] for part in parts])
        joined = np.concatenate(read, axis=-2)  # of [L, K and V, Hkv, 64, D]
        return joined[..., :tokens, :].transpose(1, 0, 3, 2, 4)


def open_parts(spec: KVSpec, shape: KVShape, page: Array, layer: int) -> tuple[PartView, PartView]:
    """The K and V parts of one layer of one page, for all heads."""
    opened = open_pages(spec, shape, page[None])[layer]
    return opened.k, opened.v


class Errors(NamedTuple):
    """Lengths of the errors of output vectors ``[L, N, H]``, or of one layer: as found, in plain
    float32; what rounding to integers adds, at most and usually."""

    found: Array
    plain: Array
    worst: Array
    typical: Array

    @classmethod
    def of(cls, driver: Driver, seq: Sequence) -> Errors:
        layers = zip(
            LayerFormats.of(driver.spec, driver.shape), seq.q, seq.k, seq.v, seq.out, strict=True
        )
        each = [cls._of_layer(driver, at, qkv, out) for at, *qkv, out in layers]
        return cls(*map(np.stack, zip(*each, strict=True)))

    @classmethod
    def _of_layer(cls, driver: Driver, at: LayerFormats, qkv: QKV, out: Array) -> Errors:
        known = _known(at, qkv, driver.options, driver.arithmetic)
        return cls(_length(out - known.truth), known.plain, *known.rounding)


class _Known(NamedTuple):
    """What the oracle says: exact outputs ``[N, H, D]``, errors of plain float32 ``[N, H]``."""

    truth: Array
    plain: Array
    rounding: Rounding


_KNOWN: dict[str, _Known] = {}  # of the last inputs: every instruction set has the same


def _known(at: LayerFormats, qkv: QKV, options: Options, arithmetic: Arithmetic) -> _Known:
    limits = [arithmetic(fmt) for fmt in (at.k, at.v, *(at.fine or ()))]
    inputs = [(x.shape, hashlib.sha1(x.tobytes()).digest()) for x in qkv]
    key = str((at, options, limits, inputs))
    if key not in _KNOWN:
        truth = exact(at, qkv, options)
        allowed = rounding(at, qkv, options, truth, arithmetic)
        in_plain = _length(plain(at, qkv, options) - truth.out)
        _KNOWN[key] = _Known(truth.out, in_plain, allowed)
        while len(_KNOWN) > 512:
            del _KNOWN[next(iter(_KNOWN))]
    return _KNOWN[key]


def _length(vectors: Array) -> Array:
    out: Array = np.linalg.norm(vectors, axis=-1)
    return out


def assert_accurate(driver: Driver, *sequences: Sequence, but: Array | None = None) -> None:
    """All that was computed, except for outputs in ``but [L, N, H]``, is as good as it can be: no
    output has more than twice the largest error of the plain float32 computation, both against
    float64 (the rule of flash-attention's tests).

    Where the backend rounds to integers (:mod:`tests.kernels.tolerance`) an error may be larger
    by the bound for it, and by six times its usual size; on average it must have that size.
    """
    every = [Errors.of(driver, seq) for seq in sequences]
    in_float = 2 * max(errors.plain.max() for errors in every)
    squares = []
    for seq, errors in zip(sequences, every, strict=True):
        judged = np.ones(errors.found.shape, bool) if but is None else ~but
        judged[:, : seq.adopted] = False
        found, _, worst, typical = (each[judged] for each in errors)
        excess = found - in_float - np.minimum(worst, 6 * typical)
        at = excess.argmax()
        assert excess[at] <= 0, (
            f"an error of {found[at]:.3g} where float32 may have {in_float:.3g} and rounding "
            f"usually adds {typical[at]:.3g}, never more than {worst[at]:.3g}"
        )
        rounded = typical > 0
        squares.append(np.square(found[rounded]) / (np.square(typical[rounded]) + in_float**2))
    square = np.concatenate(squares)
    if len(square):  # an average of n that are 1 on average, with a variance below 2
        assert square.mean() <= 1.15**2 + 4 * len(square) ** -0.5, (
            f"{len(square)} errors are {square.mean() ** 0.5:.2f} times as large as usual"
        )
