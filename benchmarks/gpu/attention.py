"""Attention alone: how fast pages of each KV format are read by decode steps, and prompts beside
torch's FlashAttention.

    python benchmarks/gpu/attention.py [--budget SECONDS] [--output ROWS.json]

decode   Attention of one token of each sequence, in as many layers as make the bytes read larger
         than the L2 cache. Each format takes turns with the 16-bit one and a copy.
         ``copy_percent``: bytes of pages read per second against bytes read and written per second
         by the copy; ``times_16bit``: against the time of the 16-bit format. Medians of turns.
prefill  Attention of a chunk that begins its sequence, after its write, which is timed by itself;
         ``times_flash``: without the write, ``times_flash_with_write``: with it, against
         F.scaled_dot_product_attention with the flash backend on the same shapes, causal, 16 bit.

All are CUDA graphs: times are those of kernels, not of launching them. ``--compile KV`` only runs
what makes the kernels of a format, so that several of them can be made at the same time.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from clock import Call, Deadline, Stopwatch, captured, free_memory, median_ratio, on_gpu
from pages import Filled, batch_of, num_base_pages
from report import Row, Rows, options, run
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvant.bench.attention import Heads
from kvant.bench.metrics import significant
from kvant.formats import PAGE_TOKENS, KVSpec
from kvant.kernels import BatchSequence
from kvant.kernels.triton.pool import find_device

COPY, FLASH = "copy", "flash"
TARGETS = {"int8": (80, 0.56), "int4h": (70, 0.36), "k4v4": (70, 0.36)}
"""By format: the least percent of the copy bandwidth, the most times the 16-bit time."""
FLASH_TARGETS = {"bf16": 1.05, "f16": 1.05}
CODES_TARGET = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured: heads, batches, contexts, chunks, bytes of a copy, samples of each."""

    shapes: tuple[str, ...] = ("32/8/128", "32/32/128")
    batches: tuple[int, ...] = (1, 4, 16, 64)
    contexts: tuple[int, ...] = (8192, 16384, 32768, 65536)
    chunks: tuple[int, ...] = (2048, 8192)
    copy: int = 2**30
    cold: int = 2**28
    layers: int = 16
    repeats: int = 11


SMOKE = Sizes(
    shapes=("2/1/16",), batches=(2,), contexts=(192,), chunks=(80,), copy=2**16, cold=1, repeats=1
)
COMPILE = Sizes(
    shapes=("8/8/128", "32/8/128", "28/4/128"), batches=(2,), contexts=(192, 8192), chunks=(1000,),
    copy=2**20, cold=1, repeats=1,
)  # fmt: skip
"""One of each share of query heads, and of one and several splits."""


def specs() -> list[str]:
    """The 16-bit cache of this GPU first."""
    has_bf16 = on_gpu() and torch.cuda.get_device_capability() >= (8, 0)
    return ["bf16" if has_bf16 else "f16", "int8", "int4h", "k4v4", "int4", "fp8"]


def dtype_name() -> str:
    """That of models, for EngineConfig."""
    return str(dtype_of(specs()[0])).removeprefix("torch.")


def dtype_of(kv: str) -> torch.dtype:
    """What keys, values and queries are beside a 16-bit cache of this name."""
    return torch.bfloat16 if kv == "bf16" else torch.float16


def copying(nbytes: int) -> Call:
    """A copy from device memory to device memory."""
    source, target = torch.randint(0, 127, (2, nbytes), dtype=torch.uint8, device=find_device())
    return lambda: target.copy_(source)


def decode_rows(
    sizes: Sizes, kvs: Sequence[str], heads: Heads, batch: int, context: int, copy: Call
) -> Iterator[Row]:
    """All formats at one batch and context, each in turns with the first one and the copy."""
    shape, first = heads.kv_shape(1), KVSpec.parse(kvs[0])
    cold = first.bytes_per_token(shape) * batch * context
    layers = min(sizes.layers, max(1, math.ceil(sizes.cold / (cold / 4))))

    def needed(spec: KVSpec) -> int:
        return layers * spec.page_bytes(shape) * batch * (num_base_pages(spec, context) + 1)

    def reader(kv: str) -> tuple[Filled, Call]:
        spec, dtype = KVSpec.parse(kv), dtype_of(kvs[0])
        pages = max(2, batch * num_base_pages(spec, context))
        pool = Filled(spec, heads, layers=layers, num_pages=pages, sequences=batch, dtype=dtype)
        return pool, captured(decode_call(pool, batch, context, dtype))

    pools: dict[str, Filled] = {}
    calls: dict[str, Call] = {COPY: copy}
    for kv in kvs:
        room, least = free_memory(), needed(KVSpec.parse(kv))
        if least > 0.9 * room:
            said = f"{least / 1e9:.0f} GB of pages, and {room / 1e9:.0f} GB are free"
            yield {"kv": kv, "note": f"left out: {said} beside what is compared with"}
            if kv == kvs[0]:
                return
            continue
        pools[kv], calls[kv] = reader(kv)
        times = Stopwatch().interleaved(calls, sizes.repeats)
        yield decode_row(kv, pools[kv], batch, context, times, kvs[0], sizes)
        if kv != kvs[0]:
            del pools[kv], calls[kv]
            gc.collect()


def decode_call(pool: Filled, batch: int, context: int, dtype: torch.dtype) -> Call:
    """Attend in all layers, for one row of each sequence."""
    q = torch.randn((batch, pool.heads.heads, pool.heads.head_dim), device=find_device()).to(dtype)
    step = pool.tables.decodes(batch, context)
    width = max(len(seq.pages) for seq in step.sequences)
    plan = pool.backend.decode_plan(batch, max(1, width))
    plan.load(step)
    scale = pool.heads.head_dim**-0.5

    def call() -> Any:
        for layer in range(pool.layers):
            out = pool.backend.attend_rows(layer, q, plan, scale=scale)
        return out

    assert torch.isfinite(call()).all()
    return call


def decode_row(
    kv: str,
    pool: Filled,
    batch: int,
    context: int,
    times: dict[str, list[float]],
    first: str,
    sizes: Sizes,
) -> Row:
    """The figures of one format."""
    nbytes = pool.layers * pool.bytes_read(batch, context)
    percent = 100 * median_ratio(times[COPY], times[kv]) * nbytes / (2 * sizes.copy)
    times_first = median_ratio(times[kv], times[first])
    row: Row = {
        "kv": kv,
        "layers": pool.layers,
        "seconds": significant(statistics.median(times[kv]) / pool.layers),
        "bytes": nbytes // pool.layers,
        "bytes_per_second": significant(nbytes / statistics.median(times[kv])),
        "copy_bytes_per_second": significant(2 * sizes.copy / statistics.median(times[COPY])),
        "copy_percent": significant(percent),
        "times_16bit": significant(times_first),
    }
    if kv in TARGETS:
        least, most = TARGETS[kv]
        row["meets_target"] = percent >= least and times_first <= most
    return row


def prefill_rows(sizes: Sizes, kvs: Sequence[str], heads: Heads, chunk: int) -> Iterator[Row]:
    """Each format in turns with torch's FlashAttention, on a chunk from position 0."""
    dtype, device = dtype_of(specs()[0]), find_device()
    rows = torch.randn((chunk, heads.heads + 2 * heads.kv_heads, heads.head_dim), device=device)
    q, k, v = rows.to(dtype).split([heads.heads, heads.kv_heads, heads.kv_heads], dim=1)
    flash = flash_call(q, k, v)
    flops = 2 * chunk * chunk * heads.heads * heads.head_dim
    for kv in kvs:
        spec = KVSpec.parse(kv)
        groups = -(-chunk // PAGE_TOKENS)
        pool = Filled(
            spec, heads, layers=1, num_pages=groups + 2, sequences=1, dtype=dtype, chunk=chunk + 64
        )
        backend, batch = pool.backend, batch_of([prompt(spec, pool, chunk)])
        calls: dict[str, Call] = {
            FLASH: flash,
            "write": captured(partial(backend.write, 0, k, v, batch)),
            kv: captured(partial(backend.attend, 0, q, batch, scale=heads.head_dim**-0.5)),
        }
        times = Stopwatch().interleaved(calls, sizes.repeats)
        both = [sum(pair) for pair in zip(times[kv], times["write"], strict=True)]
        against = median_ratio(times[kv], times[FLASH])
        yield {
            "kv": kv,
            "seconds": significant(statistics.median(times[kv])),
            "write_seconds": significant(statistics.median(times["write"])),
            "flash_seconds": significant(statistics.median(times[FLASH])),
            "tflops": significant(flops / statistics.median(times[kv]) / 1e12),
            "times_flash": significant(against),
            "times_flash_with_write": significant(median_ratio(both, times[FLASH])),
            "meets_target": against <= FLASH_TARGETS.get(kv, CODES_TARGET),
        }
        del pool, backend, batch, calls
        gc.collect()


def prompt(spec: KVSpec, pool: Filled, chunk: int) -> BatchSequence:
    """A prompt's first chunk."""
    full, sink = chunk // PAGE_TOKENS, int(spec.sink)
    if spec.recent is None:
        return BatchSequence(0, 0, chunk, np.arange(-(-chunk // PAGE_TOKENS)), np.arange(0))
    scratch = pool.memory.recent.num_pages + np.arange(full)
    scratch[:sink] = 0
    fine = np.append(scratch, 1) if chunk % PAGE_TOKENS else scratch
    pages = np.arange(full)
    pages[:sink] = 0
    return BatchSequence(0, 0, chunk, pages, fine)


def flash_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    """torch's FlashAttention of ``[T, heads, D]``; on a CPU its plain one."""
    q4, k4, v4 = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    kind = SDPBackend.FLASH_ATTENTION if q.is_cuda else SDPBackend.MATH
    with sdpa_kernel(kind):  # chosen while the graph is captured
        return captured(
            lambda: functional.scaled_dot_product_attention(
                q4, k4, v4, is_causal=True, enable_gqa=grouped
            )
        )


def program(args: argparse.Namespace, rows: Rows, deadline: Deadline) -> None:
    sizes = SMOKE if args.smoke else COMPILE if args.compile else Sizes()
    kvs = specs() if args.compile is None else [kv for kv in specs() if kv == args.compile]
    if not kvs:  # the other 16-bit format
        return
    copy = copying(sizes.copy)
    took = Stopwatch().interleaved({COPY: copy}, sizes.repeats)[COPY]
    rate = 2 * sizes.copy / statistics.median(took)
    rows.add({"what": "bandwidth", "copy_bytes_per_second": significant(rate)})
    shapes = [Heads.parse(text) for text in sizes.shapes]
    # Prompts have two sevenths of the time: what is stated of decodes matters more.
    decodes = Deadline(deadline.left * 5 / 7)
    # Every context and batch of the first shape before those of the second.
    for heads, context, batch in product(shapes, sizes.contexts, sizes.batches):
        case = {"what": "decode", "shape": str(heads), "batch": batch, "context": context}
        if decodes.passed():
            rows.add({"what": "deadline", "note": f"decode ends before {case}"})
            break
        rows.attempt(
            case, lambda h=heads, b=batch, c=context: decode_rows(sizes, kvs, h, b, c, copy)
        )
    for heads, chunk in product(shapes, sizes.chunks):
        case = {"what": "prefill", "shape": str(heads), "chunk": chunk}
        if deadline.passed():
            rows.add({"what": "deadline", "note": f"prefill ends before {case}"})
            break
        rows.attempt(case, lambda h=heads, c=chunk: prefill_rows(sizes, kvs, h, c))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--compile", metavar="KV", help="only make the kernels of a format")
    with torch.inference_mode():
        sys.exit(run(program, parser.parse_args()))
