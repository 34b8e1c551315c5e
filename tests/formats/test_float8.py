"""fp8: exact codes and scales, what torch calls float8_e4m3fn, and what must not spread."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from kvant.formats import FORMATS
from tests.formats.scalar_oracle import E4M3, F16_MAX, HALF_ULP, HEAD_DIMS, TINIEST, float8

F32 = NDArray[np.float32]

FP8 = FORMATS["fp8"]
MAX = 448

# Steps of a float with 3 bits of mantissa are 2^e / 8 from 2^e to 2^(e + 1): its ratio of signal to
# noise where logarithms of numbers are spread evenly.
EVEN_DB = 10 * math.log10(8**2 * 12 * 8 * math.log(2) / 3)


def _decoded(x: F32) -> F32:
    out: F32 = FP8.decode(FP8.encode(x), x.shape[-1])
    return out


def _at_scale_1(x: F32) -> F32:
    """Numbers within +-448 in vectors of 8 whose first element makes the scale 1."""
    vectors = np.full((-(-x.size // 7), 8), MAX, np.float32)
    vectors[:, 1:] = np.resize(x, (len(vectors), 7))
    return vectors


_ELEMENTS = st.one_of(
    st.floats(-4, 4, width=32),
    st.integers(-(2**10), 2**10).map(lambda n: n * 7.0),  # on borders of codes, with a few scales
    st.floats(width=32),  # NaN, Inf, denormals and the largest numbers included
    st.integers(-(2**14), 2**14).map(lambda n: n * 2.0**-27),  # scales of few bits, or none
)


@given(x=arrays(np.float32, 8, elements=_ELEMENTS))
@example(x=np.array([3.4e38, -3.4e38, 1e30, -448, 1, 0, -0.0, 1e-45], np.float32))  # saturates
@example(x=np.array([F16_MAX * MAX, -F16_MAX * MAX, 1e7, -1e3, 1, 0, -0.0, 1e-45], np.float32))
@example(x=np.array([1e-45, -1e-45, 0, -0.0, 0, 0, 0, 0], np.float32))  # scale 0
@example(x=np.full(8, 0.3, np.float32))
@settings(max_examples=300)
def test_every_bit_is_that_of_exact_arithmetic_with_the_roundings_spelled_out(x: F32) -> None:
    """Held down: scales rounded to nearest, products with a reciprocal, two roundings, overflow."""
    scale, codes = FP8.quantize(x)
    expected = float8(x.tolist())
    assert scale.tobytes() == np.float16(expected.scale).tobytes()
    assert codes.tolist() == expected.codes
    decoded = FP8.dequantize((scale, codes), 8)
    numbers = [math.copysign(E4M3[code & 127], 0.5 - (code >> 7)) for code in expected.codes]
    exact = np.array([expected.scale * number for number in numbers])
    np.testing.assert_array_equal(decoded.astype(np.float64), exact)  # no rounding
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(exact))


@given(x=arrays(np.float32, 16, elements=st.floats(-F16_MAX * MAX, F16_MAX * MAX, width=32)))
@settings(max_examples=200)
def test_the_error_is_that_of_one_rounding(x: F32) -> None:
    """Of each element by itself, however large others are."""
    scale = float(FP8.quantize(x)[0])
    exact = x.astype(np.float64)
    error = np.abs(_decoded(x) - exact)
    division = 2 * (HALF_ULP * np.abs(exact) + TINIEST * max(scale, MAX))  # of the scale's, too
    assert (error <= np.maximum(np.abs(exact) / 17, scale / 1024) + division).all()


@given(
    x=arrays(np.float32, 16, elements=st.floats(-(2.0**30), 2.0**30, width=32)).filter(
        lambda x: np.abs(x).max() >= 2.0**-10
    )
)
@settings(max_examples=200)
def test_encoding_is_idempotent(x: F32) -> None:
    """While scales have more than a few bits, the largest element becomes 448."""
    once = _decoded(x)
    for again, first in zip(FP8.encode(once), FP8.encode(x), strict=True):
        np.testing.assert_array_equal(again, first)


def test_numbers_are_torchs() -> None:
    """All upper halves of a float32 within +-448, with lower halves around the tie; and all codes
    of torch but its NaN."""
    import torch

    upper = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (upper | lower).view(np.float32)
    vectors = _at_scale_1(x[np.abs(x) <= MAX])
    scale, codes = FP8.quantize(vectors)
    theirs = torch.from_numpy(vectors).to(torch.float8_e4m3fn)
    assert (scale == 1).all()
    np.testing.assert_array_equal(codes, theirs.view(torch.uint8).numpy())
    every = np.setdiff1d(np.arange(256), (0x7F, 0xFF)).astype(np.uint8)
    numbers = torch.from_numpy(every).view(torch.float8_e4m3fn).float().numpy()
    ours = FP8.dequantize((np.float16(1), every), len(every))
    np.testing.assert_array_equal(ours.view(np.uint32), numbers.view(np.uint32))
    np.testing.assert_array_equal(np.unique(codes), every)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_gaussian_noise_is_below_that_of_numbers_of_any_size(dim: int) -> None:
    """The largest of a vector is far up in its power of two, where steps are small beside it."""
    x = np.random.default_rng(dim).standard_normal((4000, dim)).astype(np.float32)
    noise = np.square(_decoded(x).astype(np.float64) - x).mean()
    assert 10 * np.log10(np.square(x, dtype=np.float64).mean() / noise) >= EVEN_DB


@pytest.mark.parametrize("poison", (np.nan, np.inf, -np.inf))
def test_a_vector_that_is_not_finite_is_nan_as_a_whole_and_alone(poison: float) -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 80)).astype(np.float32)
    expected = _decoded(x)
    x[1, 0, 17], expected[1, 0] = poison, np.nan
    np.testing.assert_array_equal(_decoded(x), expected)
    scale, codes = FP8.encode(x[1, 0])
    assert scale.view(np.uint16) == 0x7E00 and not codes.any()


def test_vectors_do_not_depend_on_their_batch() -> None:
    x = np.random.default_rng(1).standard_normal((5, 3, 96)).astype(np.float32)
    for all_, some in zip(FP8.encode(x), FP8.encode(x.swapaxes(0, 1)[:, ::2]), strict=True):
        np.testing.assert_array_equal(all_.swapaxes(0, 1)[:, ::2], some)
