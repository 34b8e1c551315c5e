"""int4m, int3m, int2m: exact codes and scales, what the search for a clip factor gains, and what
must not spread."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from kvant.formats import FORMATS
from kvant.formats.midpoint import Midpoint
from kvant.formats.packing import unpack
from tests.formats.scalar_oracle import (
    F16_MAX,
    HALF_ULP,
    HEAD_DIMS,
    TINIEST,
    from_midpoints,
    midpoint,
    packed,
)

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

MIDPOINT = [cast(Midpoint, FORMATS[f"int{bits}m"]) for bits in (4, 3, 2)]

# Least mean square error of a uniform midpoint grid for a Gaussian of variance 1, by bits:
# J. Max, Quantizing for minimum distortion, 1960, table II. The search adapts the grid to each
# vector and may only be better.
MAX_1960 = {4: 0.01154, 3: 0.03744, 2: 0.1188}

# What float16 scales and float32 sums may cost of the ratio that the same search has in float64.
METADATA_LOSS_DB = 0.001

TIES = {
    4: ((-1, 0, 0, 0, 1, 4, 1, -2), (-5, -8, 3, -7, 8, 6, 6, 7)),
    3: ((0, 1, 1, 0, 0, -1, 0, 2), (8, -8, 6, -6, 5, -4, 1, -2)),
    2: ((-1, -2, 1, -1, -2, -1, 0, 1), (10, -9, -9, -9, 16, 8, -4, -15)),
}

formats = pytest.mark.parametrize("fmt", MIDPOINT, ids=str)


def _vectors(dim: int) -> dict[str, F32]:
    """Vectors, as if rotated already, at which a search or its roundings may go wrong."""
    rng = np.random.default_rng(dim)
    normal = rng.standard_normal(dim)
    outlier = normal.copy()
    outlier[dim // 2] = -1e4
    signs = np.where(rng.random(dim) < 0.5, -1.0, 1.0)
    small = rng.integers(-9, 10, dim)
    vectors = {
        "gaussian": normal,
        "gaussian, far from 1": normal * 1e4,
        "one outlier": outlier,
        "alone": np.eye(dim)[1] * 5,
        "constant": np.full(dim, 3.7),
        "two values": signs * 0.3,
        "zeros": np.zeros(dim),
        "negative zeros": np.full(dim, -0.0),
        "integers, on borders of codes": small,
        "borders of an odd scale": small * float(np.float16(0.3)),
        "denormal scale": normal * 2.0**-20,
        "scales that are 0 for the smaller factors": signs * 2.0**-22 * 0.9,
        "scale 0": small * 2.0**-30,
        "denormal float32": small * 2.0**-149,
        "errors that are 0 once squared": normal * 2.0**-80,
        "scale at its limit": normal / np.abs(normal).max() * F16_MAX * 8,
        "beyond the scale": normal * 1e9,
        "squares that overflow": normal * 1e25,
        "sums that overflow": signs * 1.2e19,
        "the largest": signs * 3.4e38,
    }
    return {name: vector.astype(np.float32) for name, vector in vectors.items()}


def _assert_like_scalars(fmt: Midpoint, x: F32) -> None:
    scale, *codes = fmt.quantize(x)
    decoded = fmt.dequantize((scale, *codes), x.shape[-1])
    for row, vector in enumerate(x.tolist()):
        expected = midpoint(vector, fmt.bits)
        assert scale[row].tobytes() == np.float16(expected.scale).tobytes(), expected
        assert [plane[row].tolist() for plane in codes] == packed(expected.codes, fmt.bits)
        exact = np.array(from_midpoints(expected, fmt.bits))
        np.testing.assert_array_equal(decoded[row], exact.astype(np.float32))
        np.testing.assert_array_equal(decoded[row].astype(np.float64), exact)  # no rounding


@formats
@pytest.mark.parametrize("dim", (8, 24, 40))
def test_named_vectors_match_exact_arithmetic(fmt: Midpoint, dim: int) -> None:
    """8 folds to one element, 24 to 3 and 40 to 5 that are added in order."""
    _assert_like_scalars(fmt, np.stack(list(_vectors(dim).values())))


_ELEMENTS = st.one_of(
    st.floats(-4, 4, width=32),
    st.integers(-8, 8).map(float),  # on borders of codes, and many equal errors
    st.floats(width=32),  # NaN, Inf, denormals and the largest numbers included
    st.integers(-300, 300).map(lambda n: n * 2.0**-27),  # scales of few bits, or none
)


@formats
@given(x=arrays(np.float32, 24, elements=_ELEMENTS))
@example(x=np.resize(np.array([2.0**-24, 2.0**-25], np.float32), 24))
@settings(max_examples=50)
def test_every_bit_is_that_of_exact_arithmetic_with_the_roundings_spelled_out(
    fmt: Midpoint, x: F32
) -> None:
    """Held down: sums in another order, a fused multiply-add, a search in float64, the smallest
    of equal factors, truncation in place of floor."""
    _assert_like_scalars(fmt, x[None])


def _on_grid(x: F64, scale: F64 | float, bits: int) -> F64:
    """What the grid of this scale, clipped at its ends, makes of x; in float64."""
    half = 2 ** (bits - 1)
    step = np.where(scale > 0, scale, 1)
    return np.asarray(scale * (np.floor(x / step).clip(-half, half - 1) + 0.5))


def _trials(fmt: Midpoint, x: F64) -> tuple[list[float], list[float]]:
    """Scales from the largest down, and the sums of squares of their errors."""
    largest = np.abs(x).max() / 2 ** (fmt.bits - 1)
    trials = [factor / 16 * largest for factor in range(16, 8, -1)]
    return trials, [float(np.square(_on_grid(x, t, fmt.bits) - x).sum()) for t in trials]


@formats
@given(x=arrays(np.float64, 8, elements=st.integers(-16, 16).map(float)))
@settings(max_examples=80)
def test_the_best_factor_is_found(fmt: Midpoint, x: F64) -> None:
    """Scales of small integers and the sums of their errors are exact in any arithmetic."""
    scale, *_ = fmt.quantize(x.astype(np.float32))
    trials, sums = _trials(fmt, x)
    assert float(scale) == trials[int(np.argmin(sums))]


@formats
def test_of_equal_factors_the_largest_is_kept(fmt: Midpoint) -> None:
    """Two factors of these vectors have the same error, and no other has less."""
    for vector in TIES[fmt.bits]:
        trials, sums = _trials(fmt, np.array(vector, np.float64))
        first, *others = (t for t, error in zip(trials, sums, strict=True) if error == min(sums))
        assert others and first > others[0]
        assert float(fmt.quantize(np.array(vector, np.float32))[0]) == first


@formats
def test_rounding_breaks_ties_in_the_order_of_the_sum(fmt: Midpoint) -> None:
    """Vectors with ties that are a few ulps away: which factor is kept depends on the last bits of
    sums, so on their order. Held down: a sum over neighbours, by a library or in float64, and
    squares that are not rounded."""
    rng = np.random.default_rng(0)
    ties = np.repeat(np.array(TIES[fmt.bits], np.float64), 20, axis=0)
    vectors = rng.permuted(np.tile(ties, 3), axis=1)
    near = vectors * (1 + rng.integers(-4, 5, vectors.shape) * 2.0**-23)
    _assert_like_scalars(fmt, near.astype(np.float32))


@formats
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_decoded_elements_are_the_nearest_of_their_grid(fmt: Midpoint, dim: int) -> None:
    """No level of the stored scale is nearer than the chosen one, but for the rounding of the
    quotient that decides: half an ulp of it, on each side of a border."""
    x = np.stack(list(_vectors(dim).values()))
    scale, *codes = fmt.quantize(x)
    decoded = fmt.dequantize((scale, *codes), dim).astype(np.float64)
    step = scale.astype(np.float64)[:, None, None]
    grid = step * (np.arange(2**fmt.bits) - (2 ** (fmt.bits - 1) - 0.5))
    exact = x.astype(np.float64)
    nearest = np.abs(grid - exact[..., None]).min(axis=-1)
    slack = 2 * HALF_ULP * np.abs(exact) + 2 * TINIEST * step[..., 0]
    assert (np.abs(decoded - exact) <= nearest + slack).all()


@formats
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_clipping_never_costs_anything(fmt: Midpoint, dim: int) -> None:
    """The error is at most that of the scale that clips nothing, up to the rounding of the
    float32 sums that decide: three for a square, one for each level of the sum."""
    rng = np.random.default_rng(dim)
    x = rng.standard_t(3, (300, dim)).astype(np.float32)
    scale, *codes = fmt.quantize(x)
    error = np.square(fmt.dequantize((scale, *codes), dim).astype(np.float64) - x).sum(axis=-1)
    largest = np.abs(x).max(axis=-1, keepdims=True) / np.float32(2 ** (fmt.bits - 1))
    unclipped = largest.astype(np.float16).astype(np.float64)
    without = np.square(_on_grid(x.astype(np.float64), unclipped, fmt.bits) - x).sum(axis=-1)
    odd = dim // (dim & -dim)
    levels = 3 + (dim & -dim).bit_length() - 1 + odd - 1
    rounding = (1 + HALF_ULP) ** (2 * levels) / (1 - HALF_ULP) ** (2 * levels)
    assert (error <= without * rounding).all()


@formats
def test_gaussian_noise_is_below_that_of_the_best_fixed_grid(fmt: Midpoint) -> None:
    """128 Gaussian elements, against the literature and against the same search in float64."""
    x = np.random.default_rng(2).standard_normal((4000, 128)).astype(np.float32)
    exact = x.astype(np.float64)
    noise = np.square(fmt.decode(fmt.encode(x), 128) - exact).mean()
    assert noise <= MAX_1960[fmt.bits] * np.square(exact).mean()
    rotated = fmt.rotate(exact)
    largest = np.abs(rotated).max(axis=-1, keepdims=True) / 2 ** (fmt.bits - 1)
    errors = [
        np.square(_on_grid(rotated, factor / 16 * largest, fmt.bits) - rotated).sum(axis=-1)
        for factor in range(9, 17)
    ]
    ideal = np.min(errors, axis=0).sum() / exact.size
    assert 10 * np.log10(noise / ideal) <= METADATA_LOSS_DB


@formats
@pytest.mark.parametrize("poison", (np.nan, np.inf, -np.inf))
def test_a_vector_that_is_not_finite_is_nan_as_a_whole_and_alone(
    fmt: Midpoint, poison: float
) -> None:
    """Held down: a NaN that turns into a plausible code, and one that spoils its neighbours."""
    x = np.random.default_rng(0).standard_normal((3, 2, 80)).astype(np.float32)
    clean = fmt.encode(x)
    x[1, 0, 17] = poison
    broken = fmt.encode(x)
    for before, after in zip(clean, broken, strict=True):
        others = np.ones(before.shape[:2], bool)
        others[1, 0] = False
        np.testing.assert_array_equal(before[others], after[others])
    assert not unpack(broken[1:], fmt.bits, 80)[1, 0].any()
    expected = fmt.decode(clean, 80)
    expected[1, 0] = np.nan
    np.testing.assert_array_equal(fmt.decode(broken, 80), expected)


@formats
@pytest.mark.parametrize("head_dim", (80, 96, 128))
def test_vectors_do_not_depend_on_their_batch(fmt: Midpoint, head_dim: int) -> None:
    """The shape in which vectors arrive leaves no trace in the bytes, nor in the choice of the
    clip factor. Held down: a sum by a library, whose order depends on strides."""
    x = np.random.default_rng(1).standard_normal((5, 3, head_dim)).astype(np.float32)
    together = fmt.encode(x)
    strided = fmt.encode(x.swapaxes(0, 1)[:, ::2])
    alone = fmt.encode(x[2, 1])
    for all_, some, one in zip(together, strided, alone, strict=True):
        np.testing.assert_array_equal(all_.swapaxes(0, 1)[:, ::2], some)
        np.testing.assert_array_equal(all_[2, 1], one)


@formats
def test_it_is_an_affine_format_for_kernels(fmt: Midpoint) -> None:
    """x' = scale * code + zero with zero = -scale * (H - 1/2), bit by bit in float32."""
    x = np.random.default_rng(3).standard_normal((50, 64)).astype(np.float32)
    scale, *codes = fmt.quantize(x)
    wide = scale.astype(np.float32)[:, None]
    zero = -wide * np.float32(2 ** (fmt.bits - 1) - 0.5)
    affine = wide * unpack(codes, fmt.bits, 64) + zero
    np.testing.assert_array_equal(affine, fmt.dequantize((scale, *codes), 64))
