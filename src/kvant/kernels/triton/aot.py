"""Compile every kernel of the triton backend on a machine without a GPU, and see what it takes.

    python -m kvant.kernels.triton.aot [--arch 80 ...] [--kv int8 ...] [--quick] [--json]

There is no second list of signatures: the backend itself runs on tensors in ordinary memory, and
what it would launch is compiled instead, for one architecture after another, by Triton and its
bundled assemblers. ``ptxas -v`` says how many registers a thread has and how many bytes of it are
spilled; Triton says how much shared memory a block takes.

The exit status is 1 if a kernel spills more than :data:`SPILL_LIMIT` allows, or takes more shared
memory than its architecture has.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvant.errors import ConfigError
from kvant.formats import PAGE_TOKENS, KVShape, KVSpec
from kvant.kernels.backend import Batch, BatchSequence, KVMemory

__all__ = [
    "ARCHITECTURES",
    "CASES",
    "SPILL_LIMIT",
    "SCALAR_SPILL_LIMIT",
    "Architecture",
    "Case",
    "Kernel",
    "compile_cases",
    "compiling",
    "main",
]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What CUDA's programming guide says of a compute capability: the most shared memory of a
    block in bytes, and multiprocessors of its largest chip."""

    shared: int
    multiprocessors: int


ARCHITECTURES = {
    70: Architecture(98304, 80),  # V100
    75: Architecture(65536, 72),  # T4, RTX 20
    80: Architecture(166912, 108),  # A100
    86: Architecture(101376, 84),  # A10, A40, RTX 30
    89: Architecture(101376, 142),  # L4, L40S, RTX 40
    90: Architecture(232448, 132),  # H100, H200
    100: Architecture(232448, 148),  # B200
    120: Architecture(101376, 188),  # RTX 50, RTX PRO 6000
}

SPILL_LIMIT = 512
"""Bytes of spill stores and loads in a thread's code that a kernel may have. Some words that
outlive a loop (pointers, masks, sums) cost little; a tile that does not fit shows as kilobytes."""
SCALAR_SPILL_LIMIT = 16384
"""The same where there are no tensor cores, on sm_70 and sm_75 (Triton has none) and in float32:
a product is of fused multiply-adds whose operands all threads hold, which never fits."""

_TENSOR_CORES = 80
"""The first architecture that has them, and arithmetic of bfloat16."""


@dataclass(frozen=True, slots=True)
class Case:
    """What the backend is run on: a cache and the kind of queries, keys and values."""

    kv: str
    head_dim: int = 128
    heads: int = 8
    kv_heads: int = 2
    dtype: str = "float16"
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    since: int = 70
    """The first architecture that has the shared memory for it."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of queries, keys and values."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def attention(self) -> dict[str, Any]:
        """Options of ``attend_rows``."""
        return {
            "scale": self.head_dim**-0.5,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": torch.zeros(self.heads) if self.sinks else None,
        }


# Every format as K or V, head_dims read by words and by bytes, every option of attention. The first
# has every kernel.
CASES = (
    Case("k4v4"),
    Case("bf16", dtype="bfloat16"),
    Case("f16"),
    Case("int8"),
    Case("int4"),
    Case("int4h"),
    Case("fp8"),
    Case("k=int8h,v=f32", head_dim=64),
    Case("k=f32,v=int8h", head_dim=64, dtype="float32"),
    Case("k8v8"),
    Case("k=int6c,v=int3m+s64r64", head_dim=64, window=128, softcap=30.0, sinks=True),
    Case("k=int5c,v=int2m+r64", head_dim=64),
    Case("k3v3", head_dim=64),
    Case("int8", head_dim=256, heads=2, kv_heads=1),
    Case("int8", head_dim=256, dtype="float32", since=80),
    Case("int4h+r64:f32", dtype="bfloat16"),
    Case("k=int6c,v=int3m+s64r64", head_dim=80),
    Case("k=int4,v=bf16", head_dim=96),
    Case("k=int3c,v=fp8+r64", head_dim=32),
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A compiled kernel: 32-bit registers of a thread, bytes that a thread spills (stores and
    loads), bytes of shared memory and warps of a block."""

    arch: int
    kv: str
    head_dim: int
    name: str
    registers: int
    spills: int
    shared: int
    warps: int
    scalar: bool = False
    """Whether it has no products on tensor cores."""

    def problem(self) -> str | None:
        """What limit it exceeds, if one."""
        most = ARCHITECTURES[self.arch].shared
        limit = SCALAR_SPILL_LIMIT if self.scalar else SPILL_LIMIT
        if self.shared > most:
            return f"takes {self.shared} bytes of shared memory, and a block has {most}"
        if self.spills > limit:
            return f"spills {self.spills} bytes, and the limit is {limit}"
        return None


class _Driver:
    """Stands in for a GPU: what Triton asks before it compiles, and nothing of what it asks before
    it launches."""

    def __init__(self, arch: int) -> None:
        facts = ARCHITECTURES[arch]
        self._arch = arch
        properties = {
            "max_shared_mem": facts.shared,
            "multiprocessor_count": facts.multiprocessors,
            "max_num_regs": 65536,
            "warpSize": 32,
        }
        self.utils = SimpleNamespace(get_device_properties=lambda _: properties)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, _: int) -> int:
        return 0


@contextmanager
def compiling(arch: int) -> Iterator[dict[str, tuple[Any, str]]]:
    """Within, a kernel that is launched is compiled for ``arch`` and not run. Yields what has been
    compiled, by hash: Triton's ``CompiledKernel`` and what ``ptxas -v`` said.

    Raises:
        ConfigError: Triton's interpreter is on.
    """
    if knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    found: dict[str, tuple[Any, str]] = {}
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:  # noqa: ARG001
        with redirect_stdout(io.StringIO()) as log:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found.setdefault(kernel.hash, (kernel, log.getvalue()))
        return kernel

    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = folder  # a kernel that is found there is not assembled again
        knobs.nvidia.dump_ptxas_log = True
        driver.set_active(_Driver(arch))
        JITFunction.run = compile_only
        try:
            yield found
        finally:
            JITFunction.run = launch
            driver._active = None


def compile_cases(arch: int, cases: Sequence[Case], *, quick: bool = False) -> list[Kernel]:
    """All kernels of the cases; one that several launch is that of the first. ``quick``: only
    those that a decoder launches for a prompt by itself and a decode of a long context."""
    kernels = []
    with compiling(arch) as found:
        for case in (each for each in cases if each.since <= arch):
            before = set(found)
            _run(case, arch, quick=quick)
            if case is cases[0]:
                _run_ops()
            kernels += [_kernel(arch, case, *found[each]) for each in found if each not in before]
    return kernels


def _kernel(arch: int, case: Case, compiled: Any, log: str) -> Kernel:
    def total(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, log)))

    metadata = compiled.metadata
    return Kernel(
        arch=arch,
        kv=case.kv,
        head_dim=case.head_dim,
        name=metadata.name,
        registers=max(map(int, re.findall(r"Used (\d+) registers", log))),
        spills=total(r"(\d+) bytes spill stores") + total(r"(\d+) bytes spill loads"),
        shared=metadata.shared,
        warps=metadata.num_warps,
        scalar="mma" not in compiled.asm["ptx"],
    )


# Pages of each pool, and rows of a step: no more than the batches below need.
_PAGES, _RECENT, _ROWS = 72, 8, 256


def _run(case: Case, arch: int, *, quick: bool) -> None:
    """One layer of some steps, on the backend."""
    from kvant.kernels.triton.backend import TritonBackend

    spec = KVSpec.parse(case.kv)
    shape = KVShape(num_layers=1, num_kv_heads=case.kv_heads, head_dim=case.head_dim)
    recent = _RECENT if spec.recent else 0
    memory = KVMemory.allocate(spec, shape, _PAGES, recent, _ROWS)
    backend = TritonBackend(memory, divmod(arch, 10))
    is_old = arch < _TENSOR_CORES
    dtype = torch.float16 if case.dtype == "bfloat16" and is_old else case.torch_dtype
    cos, sin = torch.zeros((2, _PAGES * PAGE_TOKENS, case.head_dim // 2))
    for batch in _batches(spec, recent, _SPANS[::3] if quick else _SPANS):
        rows, heads = len(batch.tokens), case.heads + 2 * case.kv_heads
        qkv = torch.zeros((rows, heads, case.head_dim), dtype=dtype)
        keys, values = qkv[:, case.heads : -case.kv_heads], qkv[:, -case.kv_heads :]
        plans = [backend.plan(batch)]
        if not quick:
            backend.write(0, keys, values, batch)
        if rows == len(batch.sequences) and not quick:
            static = backend.decode_plan(rows, _PAGES)
            static.load(batch)
            plans.append(static)
        for plan in plans:
            queries = backend.rope_write(0, qkv.flatten(1), cos, sin, plan)
            backend.attend_rows(0, queries, plan, **case.attention)


def _run_ops() -> None:
    """What a decoder launches between its linear layers."""
    from kvant.kernels.triton.fused import add_rms_norm, silu_mul
    from kvant.kernels.triton.rotation import rotate_rows

    rotate_rows(torch.zeros((2, 128), dtype=torch.float16))
    rows = torch.zeros((2, 4096), dtype=torch.float16)
    add_rms_norm(rows, rows, torch.zeros(4096), 1e-5)
    add_rms_norm(rows, None, torch.zeros(4096), 1e-5)
    silu_mul(rows)


# A prompt's beginning; its next chunk beside decodes; decodes of short contexts, one of which fills
# a group; of long ones. (Start and end of each sequence's rows.)
_SPANS = (
    ((0, 150),),
    ((150, 250), (20, 21), (63, 64)),
    ((20, 21), (127, 128)),
    ((_PAGES * PAGE_TOKENS - 65, _PAGES * PAGE_TOKENS - 64), (300, 301)),
)


def _batches(
    spec: KVSpec, num_recent: int, steps: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[Batch]:
    for spans in steps:
        row, sequences = 0, []
        for start, end in spans:
            sequences.append(_sequence(spec, num_recent, row, start, end))
            row += end - start
        positions = np.concatenate([np.arange(start, end) for start, end in spans])
        rows = np.cumsum([end - start for start, end in spans]) - 1
        yield Batch(np.zeros_like(positions), positions, tuple(sequences), rows)


def _sequence(spec: KVSpec, num_recent: int, row: int, start: int, end: int) -> BatchSequence:
    """Its pages are the first ones: nothing is read or written."""
    groups, full = -(-end // PAGE_TOKENS), end // PAGE_TOKENS
    if spec.recent is None:
        return BatchSequence(row, start, end, np.arange(groups), np.arange(0))
    fine = [
        0 if spec.sink and not group
        else 1 if group == full or start > group * PAGE_TOKENS
        else num_recent + group - start // PAGE_TOKENS
        for group in range(start // PAGE_TOKENS, groups)
    ]  # fmt: skip
    pages = np.arange(max(full, int(spec.sink)))
    return BatchSequence(row, start, end, pages, np.array(fine, np.int64))


def _compile_all(
    archs: Sequence[int], cases: Sequence[Case], jobs: int | None, *, quick: bool
) -> list[Kernel]:
    """Each architecture in a process of its own, ``jobs`` at a time; the slowest first. ``quick``:
    the first case for all, each of the others for one of them."""
    archs, others = sorted(archs), cases[1:]
    shares = [others[at :: len(archs)] if quick else others for at in range(len(archs))]
    context = multiprocessing.get_context("spawn")
    workers = min(jobs or os.cpu_count() or 1, len(archs))
    compile_ = partial(compile_cases, quick=quick)
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        found = pool.map(compile_, archs, [(cases[0], *share) for share in shares])
        return [kernel for kernels in found for kernel in kernels]


def _table(kernels: Sequence[Kernel]) -> Iterator[str]:
    """For each kernel and architecture the most of everything."""
    groups: dict[tuple[str, int], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[kernel.name, kernel.arch].append(kernel)
    yield f"{'kernel':28} {'arch':>6} {'variants':>9} {'registers':>10} {'spills':>7} {'shared':>7}"
    for (name, arch), found in sorted(groups.items()):
        most = [max(getattr(k, what) for k in found) for what in ("registers", "spills", "shared")]
        yield f"{name:28} sm_{arch:<3} {len(found):9} {most[0]:10} {most[1]:7} {most[2]:7}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kvant.kernels.triton.aot",
        description="Compile the triton backend's kernels without a GPU.",
    )
    known = sorted(ARCHITECTURES)
    parser.add_argument("--arch", type=int, nargs="+", choices=known, default=known)
    parser.add_argument("--kv", nargs="+", help="only these KV caches, with a head_dim of 128")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--quick", action="store_true", help="all kernels for all, each format for one of --arch"
    )
    parser.add_argument("--json", action="store_true", help="every kernel, as JSON")
    args = parser.parse_args(arguments)
    cases = tuple(map(Case, args.kv)) if args.kv else CASES
    kernels = _compile_all(args.arch, cases, args.jobs, quick=args.quick)
    problems = [(kernel, problem) for kernel in kernels if (problem := kernel.problem())]
    if args.json:
        _print(json.dumps([dataclasses.asdict(kernel) for kernel in kernels], indent=2))
    else:
        _print("\n".join(_table(kernels)))
    for kernel, problem in problems:
        where = f"sm_{kernel.arch}, {kernel.kv}, head_dim {kernel.head_dim}"
        _print(f"{kernel.name} ({where}) {problem}", file=sys.stderr)
    return 1 if problems else 0


def _print(text: str, file: Any = None) -> None:
    print(text, file=file)


if __name__ == "__main__":
    sys.exit(main())
