"""How fast the pages of each KV format are read: attention alone, on one backend, for one new token
of each of some sequences. Bytes of pages per second against the machine's bandwidth; time, and its
slope over context, against the first format.

Data is cold: calls go from layer to layer and on to other pages, shuffled and in no sequence twice,
until ``cold`` bytes have passed, so the caches hold nothing of use. Of each pool the backend wrote
the first pages; the others are copies of these.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvant.bench.metrics import check_counts, significant
from kvant.bench.throughput import Row, Tick
from kvant.bench.timing import Call, Ceilings, interleaved, percent
from kvant.cache.sizing import recent_per_sequence
from kvant.errors import ConfigError
from kvant.formats import PAGE_TOKENS, KVShape, KVSpec
from kvant.kernels import Batch, BatchSequence, check_backend, make_backend, make_memory

__all__ = ["CHUNK", "HISTORY", "Heads", "Plan", "Pool", "measure_decode", "random"]

CHUNK, HISTORY = 2048, 4096
"""Tokens of a prompt's chunk, and of what lies behind it."""
_WRITTEN = 128
"""Pages of a pool that the backend writes; the others are copies."""
_RECENT = 128
"""Recent pages of a pool; calls go through all of them."""


class Heads(NamedTuple):
    """The geometry of attention: query heads, KV heads, head_dim."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def parse(cls, text: str) -> Heads:
        """``32/8/128``.

        Raises:
            ConfigError: it is no such geometry.
        """
        try:
            found = cls(*map(int, text.split("/")))
            valid = min(found) >= 1 and found.heads % found.kv_heads == 0
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise ConfigError(
                f'heads "{text}" must be HEADS/KV_HEADS/HEAD_DIM with KV heads that divide the '
                "heads, as 32/8/128"
            )
        return found

    def kv_shape(self, layers: int) -> KVShape:
        """The cache of so many layers."""
        return KVShape(num_layers=layers, num_kv_heads=self.kv_heads, head_dim=self.head_dim)

    def __str__(self) -> str:
        return "/".join(map(str, self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure.

    Args:
        specs: formats; the first is compared with.
        backend: whose kernels; not those of a GPU, which another clock must time.
        threads: of backend and torch.
        batches: numbers of sequences.
        contexts: their tokens, multiples of 64 from 128.
        repeats: samples of each figure.
        layers: most layers of a pool.
        cold: bytes that pass before data is read again.
        max_bytes: memory of all formats' pools.

    Raises:
        ConfigError: a value out of range.
    """

    specs: Sequence[KVSpec]
    backend: str
    threads: int
    batches: Sequence[int]
    contexts: Sequence[int]
    repeats: int
    layers: int
    cold: int
    max_bytes: int

    def __post_init__(self) -> None:
        check_counts(batch=self.batches, repeats=self.repeats, layers=self.layers)
        if check_backend(self.backend) == "triton":
            raise ConfigError(
                f'backend="{self.backend}" computes on a GPU, which kvant bench attention does not '
                'measure; take backend="cpu", or scripts/gpu-gate --steps setup attention'
            )
        for context in self.contexts:
            if context < 2 * PAGE_TOKENS or context % PAGE_TOKENS:
                raise ConfigError(
                    f"context={context} must be a multiple of {PAGE_TOKENS} from {2 * PAGE_TOKENS}"
                )

    def check(self, shape: Heads) -> None:
        """Raise ConfigError if a format or the backend does not suit heads of this shape."""
        check_backend(self.backend, shape.head_dim)
        for spec in self.specs:
            spec.check(shape.kv_shape(self.layers))

    def pools(self, shape: Heads, pages: int) -> dict[str, Pool]:
        """A pool of each format. All together they take ``max_bytes``; each has at least ``pages``,
        if that fits, and ``cold`` bytes in the smallest format."""
        sizes = [spec.page_bytes(shape.kv_shape(1)) for spec in self.specs]
        for layers in range(self.layers, 0, -1):
            wanted = max(pages, math.ceil(self.cold / (layers * min(sizes))))
            if wanted * layers * sum(sizes) <= self.max_bytes:
                break
        else:
            layers, wanted = 1, self.max_bytes // sum(sizes)
        return {spec.label: Pool(spec, shape, layers, wanted, self) for spec in self.specs}


class Pool:
    """Pages of one format, all filled, and a backend over them."""

    def __init__(self, spec: KVSpec, shape: Heads, layers: int, pages: int, plan: Plan) -> None:
        self.layers = layers
        self._spec, self._shape = spec, shape
        kv_shape = shape.kv_shape(layers)
        recent = _RECENT if spec.recent else 0
        self._memory = make_memory(plan.backend, spec, kv_shape, pages, recent, CHUNK)
        self._backend = make_backend(plan.backend, self._memory, plan.threads)
        self._fine = recent_per_sequence(spec)
        self._base_bytes = spec.layout(kv_shape)[0].nbytes
        self._fine_bytes = spec.fine.layout(kv_shape)[0].nbytes
        self._order = np.random.default_rng(0).permutation(pages)
        self._fill()

    def sequences(self, context: int) -> int:
        """How many of this length have pages of their own."""
        return len(self._order) // (context // PAGE_TOKENS)

    def bytes_read(self, batch: int, context: int) -> int:
        """Bytes of one layer's head pages that a decode step sees."""
        base = context // PAGE_TOKENS - self._fine
        return batch * (base * self._base_bytes + self._fine * self._fine_bytes)

    def decode(self, batch: int, context: int, cold: int) -> Call:
        """Attend for the last token of sequences that share no pages; as many steps in turn as it
        takes to read ``cold`` bytes."""
        groups = context // PAGE_TOKENS
        count = math.ceil(cold / (self.layers * self.bytes_read(batch, context)))
        count = min(self.sequences(context) // batch, count)
        steps = self._order[: count * batch * groups].reshape(count, batch, groups).copy()
        recent = cycle(range(self._memory.recent.num_pages))
        return self._attend(
            [
                _batch([self._last_token(row, pages, recent) for row, pages in enumerate(step)])
                for step in steps
            ]
        )

    def prefill(self) -> Call:
        """Attend with a chunk behind its history; its groups have been written."""
        table = self._order[: (HISTORY + CHUNK) // PAGE_TOKENS].copy()
        table[: self._spec.sink] = 0
        sequence = self._chunk(HISTORY, HISTORY + CHUNK, table)
        self._write(sequence)
        return self._attend([_batch([sequence])])

    def _fill(self) -> None:
        pool, sink = self._memory.base, self._spec.sink
        for page in range(self._memory.recent.num_pages):
            own = np.array([page])
            self._write(BatchSequence(0, 0, PAGE_TOKENS, own * sink, own))
        written = min(_WRITTEN, pool.num_pages)
        table = np.arange(-int(sink), written)
        table[:sink] = 0
        for start in range(0, len(table) * PAGE_TOKENS, CHUNK):
            self._write(self._chunk(start, min(start + CHUNK, len(table) * PAGE_TOKENS), table))
        for first in range(written, pool.num_pages, written):
            pool.pages[first : first + written] = pool.pages[: pool.num_pages - first][:written]

    def _write(self, sequence: BatchSequence) -> None:
        batch = _batch([sequence])
        for layer in range(self.layers):
            rows = (len(batch.positions), self._shape.kv_heads, self._shape.head_dim)
            self._backend.write(layer, random(*rows), random(*rows), batch)

    def _chunk(self, start: int, end: int, pages: NDArray[np.int64]) -> BatchSequence:
        """Whole groups, which pass through scratch pages."""
        if not self._fine:
            return BatchSequence(0, start, end, pages, pages[:0])
        groups = np.arange(start, end, PAGE_TOKENS) // PAGE_TOKENS
        fine = np.where(groups < self._spec.sink, pages[0], _RECENT + np.arange(len(groups)))
        return BatchSequence(0, start, end, pages, fine)

    def _last_token(
        self, row: int, pages: NDArray[np.int64], recent: Iterator[int]
    ) -> BatchSequence:
        """Of a full last page."""
        fine = [next(recent) for _ in range(self._fine)]
        if self._spec.sink:
            pages[0] = fine.pop()
        end = len(pages) * PAGE_TOKENS
        return BatchSequence(row, end - 1, end, pages, np.array(fine, np.int64))

    def _attend(self, batches: Sequence[Batch]) -> Call:
        """Attend in all layers, each time with the next of the batches."""
        q = random(len(batches[0].positions), self._shape.heads, self._shape.head_dim)
        scale, source = self._shape.head_dim**-0.5, cycle(batches)

        def call() -> torch.Tensor:
            batch = next(source)
            for layer in range(self.layers):
                out: torch.Tensor = self._backend.attend(layer, q, batch, scale=scale)
            return out

        assert torch.isfinite(call()).all()
        return call


def _batch(sequences: Sequence[BatchSequence]) -> Batch:
    positions = np.concatenate([np.arange(seq.start, seq.end) for seq in sequences])
    return Batch(np.zeros_like(positions), positions, tuple(sequences), np.arange(0))


def random(*shape: int) -> torch.Tensor:
    """Queries, keys or values."""
    return torch.randn(shape).bfloat16()


@torch.inference_mode()
def measure_decode(plan: Plan, shape: Heads, ceilings: Ceilings, tick: Tick) -> list[Row]:
    """Rows of every batch, context and format, then the slopes over contexts."""
    pools = plan.pools(shape, max(plan.batches) * max(plan.contexts) // PAGE_TOKENS)
    rows: list[Row] = []
    for batch, context in product(plan.batches, plan.contexts):
        case: Row = {"what": "decode", "shape": str(shape), "batch": batch, "context": context}
        fits = next(iter(pools.values())).sequences(context)
        if fits < batch:
            lower = 2 ** int(math.log2(fits)) if fits else 0
            skip = lower in (0, *plan.batches)
            what = "skipped" if skip else f"measured with {lower}"
            rows.append(case | {"note": f"more than max_bytes, {what}"})
            case["batch"] = 0 if skip else lower
        if case["batch"]:
            rows += _decode_rows(plan, case, pools, ceilings)
        tick(1)
    return rows + _slopes(rows)


def _decode_rows(plan: Plan, case: Row, pools: dict[str, Pool], ceilings: Ceilings) -> list[Row]:
    batch, context = case["batch"], case["context"]
    calls = {kv: pool.decode(batch, context, plan.cold) for kv, pool in pools.items()}
    times = interleaved(calls | ceilings.calls, plan.repeats)
    bandwidth = ceilings.bandwidth(times)
    rows = []
    for kv, pool in pools.items():
        took, nbytes = times[kv] / pool.layers, pool.bytes_read(batch, context)
        row = case | {
            "kv": kv,
            "bytes": nbytes,
            "seconds": significant(statistics.median(took)),
            "bytes_per_second": round(nbytes / statistics.median(took)),
            "times_first": significant(statistics.median(times[kv] / times[plan.specs[0].label])),
            "bandwidth": round(statistics.median(bandwidth)),
            "percent_of_bandwidth": percent(nbytes / took, bandwidth),
        }
        rows.append(row)
    return rows


def _slopes(rows: Iterable[Row]) -> list[Row]:
    """Least squares of seconds over context, for each format and batch of a shape."""
    lines = defaultdict(list)
    for row in rows:
        if "kv" in row:
            lines[row["shape"], row["batch"], row["kv"]].append((row["context"], row["seconds"]))
    found: list[Row] = []
    first: dict[int, float] = {}
    for (shape, batch, kv), points in lines.items():
        if len(points) >= 3:
            contexts, times = np.array(points, np.float64).T
            slope, offset = np.polyfit(contexts, times, 1)
            found.append(
                {
                    "what": "slope",
                    "shape": shape,
                    "batch": batch,
                    "kv": kv,
                    "points": len(points),
                    "seconds_per_token": significant(slope),
                    "seconds_at_0": significant(offset),
                    "times_first": significant(slope / first.setdefault(batch, slope)),
                }
            )
    return found
