"""f32, f16, bf16: exact or correctly rounded, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from kvant.formats import FORMATS, KVFormat
from tests.formats.scalar_oracle import F16_MAX

PLAIN = [FORMATS[name] for name in ("f32", "f16", "bf16")]

# Unit roundoff, and half the least denormal: |x - x'| <= RELATIVE |x| + ABSOLUTE.
RELATIVE = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}
ABSOLUTE = {"f32": 0.0, "f16": 2.0**-25, "bf16": 2.0**-134}
BF16_MAX = (2 - 2.0**-7) * 2.0**127

formats = pytest.mark.parametrize("fmt", PLAIN, ids=str)


def _round_trip(fmt: KVFormat, x: NDArray[Any]) -> NDArray[Any]:
    return fmt.decode(fmt.encode(x), x.shape[-1])


@formats
@given(x=arrays(np.float32, 8, elements=st.floats(allow_nan=False, allow_infinity=False, width=32)))
@settings(max_examples=150)
def test_error_is_that_of_one_rounding(fmt: KVFormat, x: NDArray[Any]) -> None:
    """f16 saturates where torch would make an Inf that the whole attention row inherits."""
    exact = x.astype(np.float64)
    if fmt.name == "f16":
        exact = exact.clip(-F16_MAX, F16_MAX)
    if fmt.name == "bf16":  # has the range of float32
        exact = exact.clip(-BF16_MAX, BF16_MAX)
        x = exact.astype(np.float32)
    error = np.abs(_round_trip(fmt, x).astype(np.float64) - exact)
    assert (error <= RELATIVE[fmt.name] * np.abs(exact) + ABSOLUTE[fmt.name]).all()


@formats
@given(x=arrays(np.float32, 8, elements=st.floats(width=32)))
@settings(max_examples=100)
def test_encoding_is_idempotent(fmt: KVFormat, x: NDArray[Any]) -> None:
    once = _round_trip(fmt, x)
    np.testing.assert_array_equal(_round_trip(fmt, once), once)


@formats
@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf, 0.0, -0.0))
def test_special_values_keep_to_their_element(fmt: KVFormat, value: float) -> None:
    """NaN and Inf stay what and where they are, zeros keep their sign."""
    x = np.linspace(-3, 3, 128, dtype=np.float32).reshape(2, 64)
    expected = _round_trip(fmt, x)
    x[1, 17] = expected[1, 17] = value
    decoded = _round_trip(fmt, x)
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(expected))


def test_bf16_rounds_as_torch_does() -> None:
    """Every upper half of a float32 with lower halves around the tie. Held down: truncation,
    ties away from zero, NaNs that become Inf when their payload is cut off."""
    import torch

    upper = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (upper | lower).view(np.float32)
    ours = _round_trip(FORMATS["bf16"], x)
    theirs = torch.from_numpy(x).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours[theirs == 0]), np.signbit(theirs[theirs == 0]))
