"""What the reference backend promises beyond the contract of all backends: the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.driver import Driver


@pytest.mark.parametrize("kv", ["f32", "int8", "int4h+r64", "k4v4", "k8v8;0=int4"])
@pytest.mark.parametrize(("head_dim", "window"), [(64, None), (80, 70)])
def test_outputs_are_bit_equal_for_any_chunks_and_company(
    kv: str, head_dim: int, window: int | None
) -> None:
    """Tiles are decided by positions, so nothing else decides the order of a sum. Held down:
    temperature 0 that answers differently under load, and prefix hits that change a token."""

    def driver() -> Driver:
        return Driver("reference", kv, head_dim=head_dim, window=window, heads=6)

    alone = driver()
    seq = alone.add(150)
    alone.run(seq)
    for chunks in [(17,), (100, 1, 3)]:
        other = driver()
        again = other.replay(seq)
        other.run(again, *[other.add(length) for length in (3, 129)], chunks=chunks)
        np.testing.assert_array_equal(again.out, seq.out)
    hit = other.replay(seq)
    assert hit.computed == 128
    other.run(hit, chunks=(1,))
    np.testing.assert_array_equal(hit.out[:, 128:], seq.out[:, 128:])
