"""The rotation: orthogonal, invertible, blockwise, and the same float32 bits everywhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvant.formats.hadamard import rotate, signs, unrotate
from tests.formats.scalar_oracle import HALF_ULP, HEAD_DIMS, hadamard

# Upper bound of the relative error of a rotation in the 2-norm, in units of HALF_ULP: one
# rounding for each level of butterflies, one for the factor and one for the product with it.
# Levels are orthogonal up to sqrt(2), so their errors add.
ROUNDINGS = {dim: round(math.log2(dim & -dim)) + 2 for dim in HEAD_DIMS}

# Bit d is set where the sign of dimension d is negative.
NEGATIVE = 0x3C99568653B8F6520B672B6EBE83866B365E05B61AC16EE89ECC3104737AFA89

dims = pytest.mark.parametrize("dim", HEAD_DIMS)


def _matrix(dim: int) -> NDArray[Any]:
    """The rotation as a float64 matrix; rows are images of unit vectors."""
    return rotate(np.eye(dim))


@dims
def test_rotation_is_orthogonal(dim: int) -> None:
    """Dot products survive, so rotated queries may meet rotated keys. In float64 the entries
    are +-1 / sqrt(B) with one rounding, a product of rows sums B of them."""
    product = _matrix(dim) @ _matrix(dim).T
    assert np.abs(product - np.eye(dim)).max() <= (dim + 2) * 2.0**-52


@dims
def test_blocks_are_sylvesters_with_signs_first(dim: int) -> None:
    """H[i, j] = (-1)^popcount(i & j) / sqrt(B) over blocks of the largest power of two (96 is 3
    of 32, 80 is 5 of 16); the sign belongs to the input dimension, and none is used twice."""
    block = {8: 8, 16: 16, 64: 64, 80: 16, 96: 32, 112: 16, 128: 128, 192: 64, 256: 256}[dim]
    sylvester = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    expected = np.kron(np.eye(dim // block), np.array(sylvester) / math.sqrt(block))
    np.testing.assert_array_equal(_matrix(dim), signs(dim)[:, None] * expected)


@dims
def test_unrotate_inverts_rotate_to_rounding(dim: int) -> None:
    """Forth and back in float32 loses what ROUNDINGS allows, measured in float64."""
    x = np.random.default_rng(dim).standard_normal((200, dim)).astype(np.float32)
    rotated = rotate(x)
    there = np.linalg.norm(rotated - rotate(x.astype(np.float64)), axis=-1)
    back = np.linalg.norm(unrotate(rotated).astype(np.float64) - x, axis=-1)
    length = np.linalg.norm(x.astype(np.float64), axis=-1)
    once = (1 + HALF_ULP) ** ROUNDINGS[dim] - 1
    assert (there <= once * length).all()
    assert (back <= (2 * once + once**2) * length).all()


@dims
def test_float32_bits_are_those_of_the_butterflies_in_order(dim: int) -> None:
    """Strides 1, 2, 4 ... and one multiplication at the end, no fused operation: page bytes
    depend on it. Against exact fractions rounded after each operation."""
    x = np.random.default_rng(dim).standard_normal((2, dim)).astype(np.float32)
    x[1] *= np.exp(np.random.default_rng(dim).uniform(-20, 20, dim)).astype(np.float32)
    for vector, rotated in zip(x, rotate(x), strict=True):
        expected = hadamard((vector * signs(dim)).tolist())
        np.testing.assert_array_equal(rotated, np.array(expected, np.float32))


def test_signs_are_the_top_bits_of_splitmix64() -> None:
    """Pinned to the published first outputs of splitmix64 with seed 0, so a kernel in any
    language makes the same."""
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC)
    assert signs(64)[:4].tolist() == [-1 if z >> 63 else 1 for z in published]
    assert sum(1 << d for d, sign in enumerate(signs(256).tolist()) if sign < 0) == NEGATIVE


@dims
def test_signs_of_a_head_are_a_prefix_of_one_sequence(dim: int) -> None:
    np.testing.assert_array_equal(signs(dim), signs(256)[:dim])
    assert not signs(dim).flags.writeable  # they are cached and shared


def test_dtype_and_shape_are_kept() -> None:
    for dtype in (np.float32, np.float64):
        x = np.zeros((2, 0, 3, 64), dtype)
        assert rotate(x).dtype == unrotate(x).dtype == dtype
        assert rotate(x).shape == unrotate(x).shape == x.shape
