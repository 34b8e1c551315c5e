"""The native encoder writes the bytes of the formats, whatever the values and the processor."""

from __future__ import annotations

import numpy as np
import pytest

from kvant.formats import FORMATS, PAGE_TOKENS, KVShape, KVSpec
from kvant.kernels.backend import Batch, BatchSequence, KVMemory
from kvant.kernels.cpu import CPUBackend, available_isas
from kvant.kernels.reference import ReferenceBackend
from tests.kernels.adversary import HEADS, filled_pools, vectors

HEAD_DIMS = (8, 24, 64, 80, 112, 128, 256)  # blocks of 8 and of 256; halves of a vector left over
SPECS = (
    *(name for name, fmt in FORMATS.items() if not fmt.by_page),
    *(f"{name}+s64r64:f32" for name, fmt in FORMATS.items() if fmt.by_page),
    "k=int3c,v=int4m+r64:k=bf16,v=int8h",
    "k=int5c,v=int3m+r64:f16",
    "k=int2m,v=int3m+r64:k=int8,v=int4m",
)


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("isa", available_isas())
def test_every_byte_is_the_reference_backends(
    isa: str, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held down: roundings, NaN and Inf, -0.0, lanes behind the last dimension, padding, bytes of
    other tokens. The rows begin within a group, fill two and leave one open."""
    monkeypatch.setenv("KVANT_ISA", isa)
    spec = KVSpec.parse(kv)
    start, end = 19, 3 * PAGE_TOKENS + 10
    fine_pages = np.array([2, 5, 6, 1])  # 5 and 6 are scratch pages 1 and 2
    pages = np.array([2, 0, 3, 1])
    seq = BatchSequence(0, start, end, pages, fine_pages)
    none = np.zeros(end - start, np.int64)
    batch = Batch(none, np.arange(start, end), (seq,), none[:0])
    for head_dim in HEAD_DIMS:
        rng = np.random.default_rng(head_dim)
        k, v = (vectors(rng, end - start, head_dim) for _ in range(2))
        shape = KVShape(num_layers=1, num_kv_heads=HEADS, head_dim=head_dim)
        want, got = (KVMemory.allocate(spec, shape, 4, 4, 4 * PAGE_TOKENS) for _ in range(2))
        expected, written = filled_pools(want), filled_pools(got)
        with np.errstate(all="ignore"):
            ReferenceBackend(want).write(0, k, v, batch)
        CPUBackend(got, num_threads=1).write(0, k, v, batch)
        for at, wanted in zip(written, expected, strict=True):
            np.testing.assert_array_equal(at, wanted, err_msg=f"{isa} {kv} {head_dim}")
