"""The triton backend writes the bytes of the reference, and what it would run on a GPU has the same
arithmetic."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvant.formats import FORMATS, PAGE_TOKENS, KVShape, KVSpec, hadamard
from kvant.kernels.backend import Batch, BatchSequence, KVMemory
from kvant.kernels.reference import ReferenceBackend
from kvant.kernels.triton.layout import Store
from kvant.kernels.triton.pool import find_device
from kvant.kernels.triton.rotation import rotate_rows
from kvant.kernels.triton.write import fill_pages, rope_and_write, write_rows
from kvant.models.ops import TorchOps
from tests.kernels.adversary import HEADS, filled_pools, vectors

DEVICE = find_device()
LAYER, LAYERS = 1, 2
START, END = 40, 2 * PAGE_TOKENS + 5  # begins within a group, fills two, leaves one open
PAGES = np.array([2, 0, 3])
FINE_PAGES = np.array([2, 5, 1])  # page 5 is scratch page 1
NUM_RECENT = 4
MISSING = 3  # rows of nobody


def _specs() -> list[str]:
    """Every format as K and as V; recent and sink groups where formats need them, and in some."""
    names = list(FORMATS)
    specs = []
    for i, k in enumerate(names):
        v = names[(i + 5) % len(names)]
        by_page = FORMATS[k].by_page or FORMATS[v].by_page
        specs.append(f"k={k},v={v}" + ("+s64r64:f32" if by_page else ""))
    return [*specs, "k4v4", "k=int5c,v=int3m+r64:k=bf16,v=int8h", "k=int2m,v=int3m+r64:int4m"]


SPECS = _specs()
# By turns a power of two that fills words of codes, and another: a format meets both, as K or as V.
HEAD_DIMS = 64, 80, 128, 96, 32, 8, 256, 112
CASES = [(kv, HEAD_DIMS[i % len(HEAD_DIMS)]) for i, kv in enumerate(SPECS)]


@dataclass
class Pages:
    """The same memory for the reference and for the kernels, full of bytes to be kept."""

    spec: KVSpec
    shape: KVShape

    def __post_init__(self) -> None:
        want, got = (
            KVMemory.allocate(self.spec, self.shape, NUM_RECENT, NUM_RECENT, 4 * PAGE_TOKENS)
            for _ in range(2)
        )
        self.reference = ReferenceBackend(want)
        self.expected = filled_pools(want)
        base, recent, scratch = (torch.from_numpy(x).to(DEVICE) for x in filled_pools(got))
        self.base = Store.open(self.spec, self.shape, base)
        self.recent = Store.open(self.spec.fine, self.shape, recent)
        self.scratch = Store.open(self.spec.fine, self.shape, scratch, one_layer=True)
        fine = self.spec.recent is not None
        self.targets = (self.recent, self.scratch) if fine else (self.base, None)

    @property
    def batch(self) -> Batch:
        none = np.zeros(END - START, np.int64)
        sequence = BatchSequence(0, START, END, PAGES, FINE_PAGES)
        return Batch(none, np.arange(START, END), (sequence,), none[:0])

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Positions and pages of the rows, and of some of nobody."""
        groups = np.arange(START, END) // PAGE_TOKENS
        pages = (FINE_PAGES if self.spec.recent else PAGES)[groups]
        positions = np.pad(np.arange(START, END), (0, MISSING))
        return _int32(positions), _int32(np.pad(pages, (0, MISSING), constant_values=-1))

    def fill(self) -> None:
        if self.spec.recent:
            groups = range(int(self.spec.sink), END // PAGE_TOKENS)
            fills = [(FINE_PAGES[group], PAGES[group]) for group in groups]
            args = self.recent, self.scratch, self.base, NUM_RECENT, LAYER
            fill_pages(_int32([*fills, (-1, -1)]), *args)

    def check(self) -> None:
        for store, wanted in zip(
            (self.base, self.recent, self.scratch), self.expected, strict=True
        ):
            got = store.pages.cpu().numpy()
            np.testing.assert_array_equal(got, wanted)


def _int32(x: NDArray[np.int64] | Sequence[object]) -> Tensor:
    return torch.from_numpy(np.array(x, np.int32)).to(DEVICE)


def _shape(head_dim: int) -> KVShape:
    return KVShape(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=head_dim)


def _with_missing(x: Tensor) -> Tensor:
    """Rows with others behind and between them in memory, which must not show."""
    wide = torch.full((len(x) + MISSING, *x.shape[1:-1], x.shape[-1]), torch.nan, dtype=x.dtype)
    wide[: len(x)] = x
    return torch.stack([wide, torch.full_like(wide, 3)], dim=1).to(DEVICE)[:, 0]


@pytest.mark.parametrize(
    ("kv", "head_dim", "dtype"),
    [
        *((*case, torch.float32) for case in CASES),
        ("k4v4", 64, torch.float16),
        ("k4v4", 64, torch.bfloat16),
    ],
)
@np.errstate(all="ignore")
def test_every_byte_is_the_reference_backends(kv: str, head_dim: int, dtype: torch.dtype) -> None:
    """Held down: roundings, NaN and Inf, -0.0, columns behind the last dimension, padding, bytes
    of other tokens and layers."""
    pages = Pages(KVSpec.parse(kv), _shape(head_dim))
    rng = np.random.default_rng(head_dim)
    k, v = (torch.from_numpy(vectors(rng, END - START, head_dim)).to(dtype) for _ in range(2))
    pages.reference.write(LAYER, k, v, pages.batch)
    arguments = _with_missing(k), _with_missing(v), *pages.rows, *pages.targets
    write_rows(*arguments, NUM_RECENT, LAYER)
    pages.fill()
    pages.check()


@pytest.mark.parametrize("head_dim", (64, 80))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@np.errstate(all="ignore")
def test_rope_is_that_of_torch(dtype: torch.dtype, head_dim: int) -> None:
    heads, rows = 3, END - START
    pages = Pages(KVSpec.parse("k=f32,v=int4h"), _shape(head_dim))
    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn((rows, heads + 2 * HEADS, head_dim), generator=generator).to(dtype)
    angles = 10 * torch.rand((END, head_dim // 2), generator=generator)
    tables = angles.cos(), angles.sin()
    here = [table[START:].unsqueeze(1) for table in tables]
    q, k = (TorchOps().rope(x, *here) for x in (qkv[:, :heads], qkv[:, heads : heads + HEADS]))
    pages.reference.write(LAYER, k, qkv[:, heads + HEADS :], pages.batch)

    out = torch.empty((rows + MISSING, heads, head_dim), dtype=dtype, device=DEVICE)
    on_device = (table.to(DEVICE) for table in tables)
    arguments = _with_missing(qkv.flatten(1)), heads, HEADS, *on_device, *pages.rows
    rope_and_write(*arguments, *pages.targets, NUM_RECENT, LAYER, out)
    pages.check()
    torch.testing.assert_close(out[:rows].cpu(), q.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("head_dim", (8, 80, 96, 128, 256))
@np.errstate(all="ignore")
def test_rotation_of_rows(head_dim: int) -> None:
    x = vectors(np.random.default_rng(head_dim), 70, head_dim)[:, 0]
    for inverse, exact in ((False, hadamard.rotate), (True, hadamard.unrotate)):
        got = rotate_rows(torch.from_numpy(x).to(DEVICE), inverse=inverse).cpu().numpy()
        bits = [np.where(np.isnan(y), 0, y.view(np.int32)) for y in (got, exact(x))]
        np.testing.assert_array_equal(*bits)


COMPILE = """
import sys
import torch
from kvant.formats import KVShape, KVSpec
from kvant.kernels.triton.aot import compiling
from kvant.kernels.triton.layout import Store
from kvant.kernels.triton.write import fill_pages, rope_and_write

spec = KVSpec.parse("k=int4c,v=int4m+r64:k=int8h,v=f16")
shape = KVShape(num_layers=1, num_kv_heads=1, head_dim=64)
base, recent = (Store.open(s, shape, torch.zeros((1, s.page_bytes(shape)), dtype=torch.uint8))
                for s in (spec, spec.fine))
rows = torch.zeros(1, dtype=torch.int32)
table = torch.zeros((1, 32))
qkv = torch.zeros((1, 192), dtype=torch.float16)
with compiling(80) as found:
    rope_and_write(qkv, 1, 1, table, table, rows, rows, recent, recent, 1, 0, qkv[:, :64])
    fill_pages(rows.view(1, 1).expand(1, 2).contiguous(), recent, recent, base, 1, 0)
for kernel, _ in found.values():
    print(kernel.asm["ptx"])
"""


def test_compiled_arithmetic_is_ieee() -> None:
    """Nothing fused or approximate, tiny numbers kept: so bits are those of the interpreter."""
    ptx = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    instructions = set(re.findall(r"^\s*(?:@\S+ )?([a-z]\S*\.f32\S*)", ptx, re.MULTILINE))
    assert {"div.rn.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32"} <= instructions
    assert not [name for name in instructions if re.search(r"fma|mad|ftz|approx|full", name)]
