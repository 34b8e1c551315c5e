"""Codes in bit fields: nothing is lost, and every field is where the docstring puts it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from kvant.formats import packing
from tests.formats.scalar_oracle import FIELDS, HEAD_DIMS, packed, row_bytes

widths = pytest.mark.parametrize("bits", FIELDS)
head_dims = pytest.mark.parametrize("head_dim", HEAD_DIMS)


def _codes(bits: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(bits).integers(0, 2**bits, shape, np.uint8)


def test_every_width_has_its_fields() -> None:
    assert {bits: list(fields) for bits, fields in packing.WIDTHS.items()} == FIELDS
    assert all(sum(fields) == bits for bits, fields in FIELDS.items())


@widths
@head_dims
def test_unpack_inverts_pack(bits: int, head_dim: int) -> None:
    codes = _codes(bits, 3, 5, head_dim)
    planes = packing.pack(codes, bits)
    assert [plane.dtype for plane in planes] == [np.uint8] * len(planes)
    np.testing.assert_array_equal(packing.unpack(planes, bits, head_dim), codes)


@widths
@head_dims
def test_every_field_is_where_the_docstring_puts_it(bits: int, head_dim: int) -> None:
    """Byte for byte against one field at a time; what no dimension has is 0. Held down: fields
    of neighbouring dimensions in one byte, the highest bits first, the lowest plane last."""
    codes = _codes(bits, 4, head_dim)
    planes = packing.pack(codes, bits)
    for row, vector in enumerate(codes.tolist()):
        assert [plane[row].tolist() for plane in planes] == packed(vector, bits)


def test_map_and_oracle_agree_with_the_words_of_the_docstring() -> None:
    """A worked example: 5 bits are 4 + 1, and 16 dimensions take 8 and 4 bytes, of which the
    last two have no dimension."""
    codes = [d + 16 * (d in (2, 9)) for d in range(16)]
    nibbles, bits = packed(codes, 5)
    assert nibbles == [d + 16 * (d + 8) for d in range(8)]
    # 4 bytes, so bit j of byte c is dimension c + 4 j: 2 is bit 0 of byte 2, 9 bit 2 of byte 1
    assert bits == [0, 4, 1, 0]
    assert packed([3] * 8, 3) == [[15, 15, 15, 15], [0, 0, 0, 0]]
    assert packed([1] * 8, 2) == [[5, 5, 5, 5]]
    assert packed([0] * 7 + [2], 2) == [[0, 0, 0, 8]]


@widths
@head_dims
def test_rows_are_the_fewest_whole_words(bits: int, head_dim: int) -> None:
    planes = packing.pack(_codes(bits, 2, head_dim), bits)
    expected = [row_bytes(width, head_dim) for width in FIELDS[bits]]
    assert [plane.shape for plane in planes] == [(2, count) for count in expected]
    assert [packing.columns(width, head_dim) for width in FIELDS[bits]] == expected
    for width, count in zip(FIELDS[bits], expected, strict=True):
        assert 0 <= 8 * count - width * head_dim < 32


@widths
@given(data=st.data())
@settings(max_examples=30)
def test_a_byte_belongs_to_one_vector(bits: int, data: st.DataObject) -> None:
    """Any bytes are codes of so many bits, and a change of one vector is one of its row."""
    head_dim = 8 * data.draw(st.integers(1, 16))
    planes = [
        data.draw(arrays(np.uint8, (2, packing.columns(width, head_dim)))) for width in FIELDS[bits]
    ]
    codes = packing.unpack(planes, bits, head_dim)
    assert codes.shape == (2, head_dim) and codes.max() < 2**bits
    one: list[Any] = [plane[1] for plane in planes]
    np.testing.assert_array_equal(packing.unpack(one, bits, head_dim), codes[1])


@widths
def test_no_vectors_at_all(bits: int) -> None:
    """Held down: a chunk or a page list that is empty, which cannot be reshaped."""
    planes = packing.pack(np.empty((2, 0, 80), np.uint8), bits)
    assert packing.unpack(planes, bits, 80).shape == (2, 0, 80)
