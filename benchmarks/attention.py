"""Attention kernels: how fast each KV format is read and written, on one backend.

    python benchmarks/attention.py --output benchmarks/results/attention-DATE.json

decode  `attend` for one new token of each of BATCH sequences: bytes of pages per second against the
        machine's read bandwidth in the same run; time, and its slope over context, against the
        first format of --kv
sdpa    the same, and a chunk of 2048 tokens behind 4096, against the fastest correct way of
        torch's scaled_dot_product_attention (bfloat16, contiguous keys and values)
write   `write` and `attend` as shares of the steps of SmolLM2: 8 sequences decode, 512 tokens of
        prompts

Formats take turns, repeat by repeat; figures are medians, ratios medians over repeats. Data is
cold: calls go from layer to layer and on to other pages, shuffled and in no sequence twice, until
--cold bytes have passed, so the caches hold nothing of use. Of each pool the backend wrote the
first pages; the others are copies of these.

A table goes to stderr; one JSON object is printed, --output stores it.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from record import record
from threadpoolctl import threadpool_limits
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvant import EngineConfig, GenerationConfig
from kvant.cache.sizing import recent_per_sequence
from kvant.cli.options import split_specs
from kvant.config import parse_bytes
from kvant.engine.engine import Engine
from kvant.engine.load import open_model, start_model
from kvant.formats import PAGE_TOKENS, KVShape, KVSpec
from kvant.kernels import Backend, Batch, BatchSequence, KVMemory, check_backend, make_backend
from kvant.request import Request

Row = dict[str, Any]
Call = Callable[[], Any]

CHUNK, HISTORY = 2048, 4096
"""The prompt's chunk that is compared with torch, and what lies behind it."""
WRITTEN = 128
"""Pages of a pool that the backend writes; the others are copies."""
RECENT = 128
"""Recent pages of a pool; calls go through all of them."""
MIN_SAMPLE = 0.01
"""Seconds that a sample takes at least."""
BANDWIDTH_BYTES = 2**30


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        return cls(*map(int, text.split("/")))

    def __str__(self) -> str:
        return "/".join(map(str, self))


class Store:
    """A pool of pages in one format, all filled, and a backend over it."""

    def __init__(self, spec: KVSpec, shape: Shape, layers: int, pages: int, backend: str) -> None:
        self.spec, self.shape, self.layers = spec, shape, layers
        kv_shape = KVShape(num_layers=layers, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim)
        self.memory = KVMemory.allocate(spec, kv_shape, pages, RECENT if spec.recent else 0, CHUNK)
        self.backend = make_backend(backend, self.memory)
        self._fine = recent_per_sequence(spec)
        self._base_bytes = spec.layout(kv_shape)[0].nbytes
        self._fine_bytes = spec.fine.layout(kv_shape)[0].nbytes
        self._order = np.random.default_rng(0).permutation(pages)
        self._fill()

    def _fill(self) -> None:
        pool = self.memory.base
        for page in range(self.memory.recent.num_pages):
            own = np.array([page])
            self._write([BatchSequence(0, 0, PAGE_TOKENS, own * self.spec.sink, own)])
        written = min(WRITTEN, pool.num_pages)
        table = np.arange(-int(self.spec.sink), written)
        table[: self.spec.sink] = 0
        for start in range(0, len(table) * PAGE_TOKENS, CHUNK):
            self._write([self._chunk(start, min(start + CHUNK, len(table) * PAGE_TOKENS), table)])
        for first in range(written, pool.num_pages, written):
            pool.pages[first : first + written] = pool.pages[: pool.num_pages - first][:written]

    def _write(self, sequences: list[BatchSequence]) -> None:
        batch = _batch(sequences)
        rows = len(batch.positions)
        for layer in range(self.layers):
            k, v = (random(rows, self.shape.kv_heads, self.shape.head_dim) for _ in "kv")
            self.backend.write(layer, k, v, batch)

    def _chunk(self, start: int, end: int, pages: NDArray[np.int64]) -> BatchSequence:
        """Whole groups, which pass through scratch pages."""
        if not self._fine:
            return BatchSequence(0, start, end, pages, pages[:0])
        groups = np.arange(start, end, PAGE_TOKENS) // PAGE_TOKENS
        fine = np.where(groups < self.spec.sink, pages[0], RECENT + np.arange(len(groups)))
        return BatchSequence(0, start, end, pages, fine)

    def decode_batches(self, batch: int, context: int, cold: int) -> list[Batch]:
        """Steps of ``batch`` sequences of ``context`` tokens that share no pages, as many as it
        takes to read ``cold`` bytes."""
        groups = context // PAGE_TOKENS
        each = self.layers * self.bytes_read(batch, context)
        tables = self._order[: len(self._order) // groups * groups].reshape(-1, groups)
        recent = cycle(range(self.memory.recent.num_pages))
        count = min(len(tables) // batch, math.ceil(cold / each))
        steps = tables[: count * batch].reshape(count, batch, groups).copy()
        return [
            _batch([self._row(row, pages, recent) for row, pages in enumerate(step)])
            for step in steps
        ]

    def _row(self, row: int, pages: NDArray[np.int64], recent: Iterable[int]) -> BatchSequence:
        """The last token of a full page."""
        fine = [page for _, page in zip(range(self._fine), recent, strict=False)]
        if self.spec.sink:
            pages[0] = fine.pop()
        end = len(pages) * PAGE_TOKENS
        return BatchSequence(row, end - 1, end, pages, np.array(fine, np.int64))

    def bytes_read(self, batch: int, context: int) -> int:
        """Bytes of one layer's head pages that a decode step sees."""
        base = context // PAGE_TOKENS - self._fine
        return batch * (base * self._base_bytes + self._fine * self._fine_bytes)

    def attend(self, batches: Sequence[Batch]) -> Call:
        """A call that attends in all layers, each time with the next of the batches."""
        q = random(len(batches[0].positions), self.shape.heads, self.shape.head_dim)
        scale = self.shape.head_dim**-0.5
        source = cycle(batches)

        def call() -> torch.Tensor:
            batch = next(source)
            for layer in range(self.layers):
                out = self.backend.attend(layer, q, batch, scale=scale)
            return out

        assert torch.isfinite(call()).all()
        return call

    def prefill(self) -> Call:
        """A call that attends with a chunk behind its history; its groups have been written."""
        table = self._order[: (HISTORY + CHUNK) // PAGE_TOKENS].copy()
        table[: self.spec.sink] = 0
        sequence = self._chunk(HISTORY, HISTORY + CHUNK, table)
        self._write([sequence])
        return self.attend([_batch([sequence])])


def _batch(sequences: Sequence[BatchSequence]) -> Batch:
    positions = np.concatenate([np.arange(seq.start, seq.end) for seq in sequences])
    return Batch(np.zeros_like(positions), positions, tuple(sequences), np.arange(0))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def seconds(call: Call, passes: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(passes):
        call()
    return (time.perf_counter() - start) / passes


def interleaved(calls: dict[str, Call], repeats: int) -> dict[str, NDArray[np.float64]]:
    """Seconds of each call, ``repeats`` samples taken in turns, after a warm-up."""
    passes = {name: math.ceil(MIN_SAMPLE / seconds(call)) for name, call in calls.items()}
    samples = [
        [seconds(call, passes[name]) for name, call in calls.items()] for _ in range(repeats)
    ]
    return dict(zip(calls, np.array(samples).T, strict=True))


def bandwidth(threads: int) -> dict[str, float]:
    """Bytes per second that all threads together read from memory: best of several ways."""
    floats = torch.ones(BANDWIDTH_BYTES // 4)
    parts = np.array_split(floats.numpy().view(np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        calls: dict[str, Call] = {
            "torch sum": floats.sum,
            "torch amax": floats.amax,
            "numpy sum": lambda: list(pool.map(np.sum, parts)),
            "numpy max": lambda: list(pool.map(np.max, parts)),
        }
        found = {
            name: BANDWIDTH_BYTES / min(seconds(call) for _ in range(5))
            for name, call in calls.items()
        }
    try:
        native = importlib.import_module("kvant.kernels.cpu").read_bandwidth
    except (ImportError, AttributeError):
        return found
    return found | {"native": max(native(BANDWIDTH_BYTES, threads) for _ in range(5))}


def pool_size(args: argparse.Namespace, shape: Shape, pages: int) -> tuple[int, int]:
    """Layers and pages of a pool, so that all formats' together take --max-bytes: at least
    ``pages``, if that fits, and --cold bytes in the smallest format."""
    one = KVShape(num_layers=1, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim)
    sizes = [spec.page_bytes(one) for spec in args.kv]
    for layers in range(args.layers, 0, -1):
        wanted = max(pages, math.ceil(args.cold / (layers * min(sizes))))
        if wanted * layers * sum(sizes) <= args.max_bytes:
            return layers, wanted
    return 1, args.max_bytes // sum(sizes)


def stores(args: argparse.Namespace, shape: Shape, pages: int) -> dict[str, Store]:
    layers, pages = pool_size(args, shape, pages)
    return {spec.label: Store(spec, shape, layers, pages, args.backend) for spec in args.kv}


def decode(args: argparse.Namespace, shape: Shape) -> list[Row]:
    most = max(args.batch) * max(args.contexts) // PAGE_TOKENS
    pools = stores(args, shape, most)
    first = next(iter(pools.values()))
    rows: list[Row] = []
    for batch, context in product(args.batch, args.contexts):
        case: Row = {"what": "decode", "shape": str(shape), "batch": batch, "context": context}
        fits = first.memory.base.num_pages // (context // PAGE_TOKENS)
        if fits < batch:
            lower = 2 ** int(math.log2(fits)) if fits else 0
            skip = lower in (0, *args.batch)
            what = "skipped" if skip else f"measured with {lower}"
            rows.append(case | {"note": f"more than --max-bytes, {what}"})
            if skip:
                continue
            case["batch"] = batch = lower
        print(f"{shape} batch {batch} context {context}", file=sys.stderr)
        calls = {
            kv: pool.attend(pool.decode_batches(batch, context, args.cold))
            for kv, pool in pools.items()
        }
        times = interleaved(calls, args.repeats)
        baseline = times[args.kv[0].label]
        for kv, pool in pools.items():
            took = statistics.median(times[kv]) / pool.layers
            read = pool.bytes_read(batch, context)
            rows.append(
                case
                | {
                    "kv": kv,
                    "bytes": read,
                    "seconds": significant(took),
                    "bytes_per_second": round(read / took),
                    "times_first": significant(statistics.median(times[kv] / baseline)),
                }
            )
    return rows + slopes(rows)


def slopes(rows: list[Row]) -> list[Row]:
    """Least squares of seconds over context, for each format and batch of a shape."""
    lines = defaultdict(list)
    for row in rows:
        if "kv" in row:
            lines[row["batch"], row["kv"]].append((row["context"], row["seconds"]))
    found: list[Row] = []
    first: dict[int, float] = {}
    for (batch, kv), points in lines.items():
        if len(points) < 3:
            continue
        slope, offset = np.polyfit(*zip(*points, strict=True), 1)
        found.append(
            {
                "what": "slope",
                "shape": rows[0]["shape"],
                "batch": batch,
                "kv": kv,
                "points": len(points),
                "seconds_per_token": significant(slope),
                "seconds_at_0": significant(offset),
                "times_first": significant(slope / first.setdefault(batch, slope)),
            }
        )
    return found


def torch_decode(shape: Shape, batch: int, context: int, cold: int) -> dict[str, Call]:
    """torch's ways for a decode step over contiguous keys and values."""
    heads, kv_heads, dim = shape
    count = math.ceil(cold / (4 * batch * context * kv_heads * dim))
    pairs = cycle([[random(batch, kv_heads, context, dim) for _ in "kv"] for _ in range(count)])
    q = random(batch, heads, 1, dim)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    return {
        "enable_gqa": lambda: scaled_dot_product_attention(q, *next(pairs), enable_gqa=True),
        "heads as rows": lambda: scaled_dot_product_attention(grouped, *next(pairs)),
    }


def torch_prefill(shape: Shape) -> dict[str, Call]:
    """torch's ways for a chunk, causal inside, behind a history."""
    heads, kv_heads, dim = shape
    total = HISTORY + CHUNK
    q, k, v = random(1, heads, CHUNK, dim), *(random(1, kv_heads, total, dim) for _ in "kv")
    share = heads // kv_heads
    seen = torch.ones(CHUNK, total, dtype=torch.bool).tril(HISTORY)
    added = torch.zeros(CHUNK, total).masked_fill(~seen, -math.inf).bfloat16()
    masks: dict[str, Any] = {
        "boolean mask": seen,
        "additive mask": added,
        "causal_lower_right": causal_lower_right(CHUNK, total),
    }
    wide = [x.repeat_interleave(share, dim=1) for x in (k, v)]
    attention = scaled_dot_product_attention
    calls: dict[str, Call] = {}
    for name, mask in masks.items():
        calls[name] = lambda mask=mask: attention(q, k, v, attn_mask=mask, enable_gqa=True)
        calls[f"{name}, heads repeated"] = lambda mask=mask: attention(q, *wide, attn_mask=mask)
    truth = calls["boolean mask"]().float()
    return {name: call for name, call in calls.items() if agrees(name, call, truth)}


def agrees(name: str, call: Call, truth: torch.Tensor) -> bool:
    """Whether a way of torch works and computes the same."""
    try:
        right = torch.allclose(call().float(), truth, atol=0.02)
    except (RuntimeError, TypeError, ValueError) as error:
        print(f"torch, {name}: {error}", file=sys.stderr)
        return False
    if not right:
        print(f"torch, {name}: other results", file=sys.stderr)
    return right


def sdpa(args: argparse.Namespace, shape: Shape) -> list[Row]:
    batch, context = max(args.batch), HISTORY
    pools = stores(args, shape, batch * context // PAGE_TOKENS)
    steps = {kv: p.decode_batches(batch, context, args.cold) for kv, p in pools.items()}
    ours = {kv: pool.attend(steps[kv]) for kv, pool in pools.items()}
    theirs = torch_decode(shape, batch, context, args.cold)
    case: Row = {"what": "sdpa decode", "shape": str(shape), "batch": batch, "context": context}
    rows = against_torch(case, ours, theirs, pools, args.repeats)
    ours = {kv: pool.prefill() for kv, pool in pools.items()}
    case = {"what": "sdpa prefill", "shape": str(shape), "chunk": CHUNK, "context": HISTORY + CHUNK}
    return rows + against_torch(case, ours, torch_prefill(shape), pools, args.repeats)


def against_torch(
    case: Row, ours: dict[str, Call], theirs: dict[str, Call], pools: dict[str, Store], repeats: int
) -> list[Row]:
    print(*case.values(), file=sys.stderr)
    times = interleaved(
        {**ours, **{f"torch: {name}": call for name, call in theirs.items()}}, repeats
    )
    for kv, pool in pools.items():
        times[kv] /= pool.layers
    best = min((name for name in times if name not in ours), key=lambda n: np.median(times[n]))
    return [
        case
        | {
            "kv": name,
            "seconds": significant(statistics.median(took)),
            "speed_of_torch": significant(statistics.median(times[best] / took)),
        }
        for name, took in times.items()
    ]


class Stopwatch:
    """A backend that times another."""

    def __init__(self, inner: Backend) -> None:
        self.inner, self.name = inner, inner.name
        self.spent = {"write": 0.0, "attend": 0.0}

    def write(self, *args: Any) -> None:
        self.spent["write"] += seconds(lambda: self.inner.write(*args))

    def attend(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        out = self.inner.attend(*args, **options)
        self.spent["attend"] += time.perf_counter() - start
        return out


def write(args: argparse.Namespace) -> list[Row]:
    """Steps of a model. Decode: means over 64 steps, in which each sequence fills a page."""
    batch, prompt = max(args.batch), args.prompt
    longest = PAGE_TOKENS + 4 * batch * prompt // 512  # the first decodes while others wait
    base = EngineConfig(num_threads=args.threads, backend=args.backend)
    opened = open_model(args.model, base)
    weights = opened.weights(base.dtype)
    engines = {}
    for spec in args.kv:
        config = EngineConfig(
            kv=spec,
            kv_tokens=batch * (prompt + longest + PAGE_TOKENS),
            max_batch_size=batch,
            enable_prefix_caching=False,
            backend=args.backend,
        )
        engines[spec.label] = start_model(opened, weights, config).engine
    rows = []
    for new in (1, longest):  # prompts only; then decode steps too, of which these count
        steps = [timed_steps(engines, batch, prompt, new) for _ in range(args.model_repeats)]
        for kv in engines:
            kind = "prefill" if new == 1 else "decode"
            wanted = 512 if new == 1 else batch
            found = [[s for s in run[kv] if s["rows"] == wanted][:PAGE_TOKENS] for run in steps]
            means = [
                {name: statistics.mean(s[name] for s in run) for name in run[0]} for run in found
            ]
            row: Row = {"what": "write", "step": kind, "kv": kv, "rows": wanted, "prompt": prompt}
            for name in ("step", "write", "attend"):
                row[f"{name}_seconds"] = significant(statistics.median(m[name] for m in means))
            for name in ("write", "attend"):
                share = statistics.median(m[name] / m["step"] for m in means)
                row[f"{name}_percent"] = round(100 * share, 2)
            rows.append(row)
    return rows


def timed_steps(
    engines: dict[str, Engine], batch: int, prompt: int, new: int
) -> dict[str, list[dict[str, float]]]:
    """Run the same requests in all engines, which take turns step by step."""
    print(f"{batch} prompts of {prompt} and {new} tokens", file=sys.stderr)
    rng = np.random.default_rng(0)
    for engine in engines.values():
        for index in range(batch):
            tokens = rng.integers(0, engine.vocab_size, prompt).tolist()
            engine.submit(Request(index, tokens, prompt, GenerationConfig(), prompt + new))
    found: dict[str, list[dict[str, float]]] = {kv: [] for kv in engines}
    while any(engine.has_work for engine in engines.values()):
        for kv, engine in engines.items():
            inner = engine.backend
            engine.backend = watch = Stopwatch(inner)
            start = time.perf_counter()
            plan = engine.step()
            took = time.perf_counter() - start
            engine.backend = inner
            if plan is not None:
                rows = sum(part.end - part.start for part in plan.slices)
                found[kv].append({"rows": rows, "step": took, **watch.spent})
    return found


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def table(rows: list[Row], names: Sequence[str]) -> None:
    """Print rows; the columns are ``names``."""
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells), file=sys.stderr)


def shown(row: Row) -> Row:
    """A row with the figures that are read: microseconds and GB/s."""
    out = dict(row)
    if "bytes" in row:
        out["MiB"] = round(row["bytes"] / 2**20, 2)
        out["GB/s"] = round(row["bytes_per_second"] / 1e9, 2)
        out["%"] = row["percent_of_bandwidth"]
    if "seconds" in row:
        out["us"] = round(1e6 * row["seconds"], 1)
    return out


def against(rows: list[Row], ways: dict[str, float]) -> list[Row]:
    """Rows with the share of the bandwidth that was measured around them: on a shared machine it
    changes from minute to minute."""
    best = max(ways.values())
    for row in rows:
        if "bytes" in row:
            row["bandwidth"] = round(best)
            row["percent_of_bandwidth"] = round(100 * row["bytes_per_second"] / best, 1)
    return rows


def report(rows: list[Row], ways: dict[str, float]) -> list[Row]:
    """Print tables; all results."""
    print(*(f"{name}: {rate / 1e9:.1f} GB/s" for name, rate in ways.items()), file=sys.stderr)
    columns = {
        "decode": "shape batch context kv us MiB GB/s % times_first note",
        "slope": "shape batch kv seconds_per_token seconds_at_0 points times_first",
        "sdpa": "what shape context kv us speed_of_torch",
        "write": "step kv rows step_seconds write_seconds write_percent attend_percent",
    }
    for what, names in columns.items():
        if chosen := [shown(row) for row in rows if row["what"].startswith(what)]:
            table(chosen, names.split())
    found = {name: round(rate) for name, rate in ways.items()}
    return [{"what": "bandwidth", "bytes_per_second": found}, *rows]


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    kv = "bf16,int8,int8h,int4,int4h,k8v8,k8v4,k4v4"
    add("--kv", type=split_specs, default=kv, help="KV specs; the first is compared with")
    add("--backend", type=check_backend, default="auto")
    add("--parts", type=lambda text: text.split(","), default="decode,sdpa,write")
    add("--shapes", default="9/3/64,32/8/128,32/32/128,16/1/256", help="heads/KV heads/head_dim")
    add("--sdpa-shapes", default="9/3/64")
    contexts = "1024,2048,4096,8192,16384,32768,65536"
    add("--contexts", type=numbers, default=contexts, help="multiples of 64, from 128")
    add("--batch", type=numbers, default="1,8")
    add("--repeats", type=int, default=11)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--layers", type=int, default=4, help="most layers of a pool")
    add("--cold", type=parse_bytes, default="256MiB", help="bytes before data is read again")
    add("--max-bytes", type=parse_bytes, default="6GiB", help="memory of all formats' pools")
    add("--model", default="smollm2-135m", help="the model of the part write")
    add("--prompt", type=int, default=1024, help="tokens of its prompts, a multiple of 512")
    add("--model-repeats", type=int, default=3)
    add("--output", type=Path)
    return parser


def main() -> None:
    args = options().parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # where a backend has threads of its own
    threadpool_limits(limits=1, user_api="blas")  # one pool of busy threads, as in an engine
    torch.manual_seed(0)
    rows: list[Row] = []
    ways = before = bandwidth(args.threads)
    with torch.inference_mode():
        for part, shapes in (("decode", args.shapes), ("sdpa", args.sdpa_shapes)):
            for text in shapes.split(",") if part in args.parts else ():
                found = (decode if part == "decode" else sdpa)(args, Shape.parse(text))
                after = bandwidth(args.threads)
                rows += against(found, {name: (before[name] + after[name]) / 2 for name in after})
                before = after
        if "write" in args.parts:
            rows += write(args)
    record(report(rows, ways), args.output)


if __name__ == "__main__":
    main()
