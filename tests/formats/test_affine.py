"""int8, int4, int8h, int4h per token, int8c ... int3c per channel: the error bound, the exact
codes, and what must not spread."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from kvant.formats import FORMATS, PAGE_TOKENS
from kvant.formats.affine import Affine
from kvant.formats.packing import unpack
from tests.formats.scalar_oracle import (
    F16_MAX,
    HALF_ULP,
    HEAD_DIMS,
    TINIEST,
    dequantize,
    packed,
    quantize,
)

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

AFFINE = [cast(Affine, FORMATS[name]) for name in ("int8", "int4", "int8h", "int4h")]
CHANNEL = [cast(Affine, FORMATS[f"int{bits}c"]) for bits in (8, 6, 5, 4, 3)]

# What float16 metadata may cost of the signal to noise ratio of an ideal min/max grid.
METADATA_LOSS_DB = 0.05

formats = pytest.mark.parametrize("fmt", AFFINE, ids=str)
by_channel = pytest.mark.parametrize("fmt", CHANNEL, ids=str)
unrotated = pytest.mark.parametrize(
    "fmt", [*(fmt for fmt in AFFINE if not fmt.rotated), *CHANNEL], ids=str
)


class Groups(NamedTuple):
    """Groups ``x [n, N]`` as a format stores them: tokens of dimension N, or channels over the N
    tokens of a page. ``rows`` are the packed codes of each token, plane by plane."""

    scale: Any
    zero: Any
    rows: list[list[list[int]]]
    decoded: F32

    @classmethod
    def of(cls, fmt: Affine, x: F32) -> Groups:
        vectors = x.T if fmt.by_page else x
        scale, zero, *codes = fmt.quantize(vectors)
        decoded = fmt.dequantize((scale, zero, *codes), vectors.shape[-1])
        rows = [[plane[token].tolist() for plane in codes] for token in range(len(vectors))]
        return cls(scale, zero, rows, decoded.T if fmt.by_page else decoded)


def _size(fmt: Affine) -> int:
    """The least elements of a group."""
    return PAGE_TOKENS if fmt.by_page else 8


def _vectors(dim: int, levels: int) -> dict[str, F32]:
    """Vectors on which engines of the field fail or lose accuracy; all inside the bound."""
    rng = np.random.default_rng(dim)
    normal = rng.standard_normal(dim)
    unit = rng.permutation(np.linspace(0, 1, dim))
    outlier = normal.copy()
    outlier[dim // 2] = 1e4
    steps = rng.integers(0, levels, dim) + 0.5  # all quotients are ties, in exact arithmetic
    steps[:2] = 0, levels
    vectors = {
        "gaussian": normal,
        "ties": steps,
        "ties of an odd scale": steps * float(np.float16(0.3)),
        "ties on a zero": steps * float(np.float16(0.007)) - 2,
        "gaussian, shifted": normal - 7,
        "one outlier": outlier,
        "constant": np.full(dim, 3.7),
        "constant, negative": np.full(dim, -1e-3),
        "huge constant": np.full(dim, F16_MAX * (levels + 1)),
        "zeros": np.zeros(dim),
        "negative zeros": np.full(dim, -0.0),
        "both zeros": np.where(unit > 0.5, 0.0, -0.0),
        "denormal float16 range": unit * 20 * 2.0**-24,
        "below float16": normal * 1e-12,
        "denormal float32 range": np.rint(unit * 300) * 2.0**-149,
        "denormal float32 range, negative": np.rint(unit * -300) * 2.0**-149,
        "tiny range on an offset": 100 + 0.1 * unit,
        "tiny range on a negative offset": -1000 - 0.001 * unit,
        "one float32 ulp on an offset": np.where(unit > 0.5, 100, np.nextafter(np.float32(100), 0)),
        "huge": unit * (F16_MAX * levels),
        "huge, from the lowest zero": unit * (F16_MAX * levels) - F16_MAX,
    }
    return {name: vector.astype(np.float32) for name, vector in vectors.items()}


def _slack(x: Any, zero: Any, decoded: Any, levels: int) -> NDArray[np.float64]:
    """What float32 rounding adds to scale / 2, term by term: ``x - zero`` and its quotient by
    the scale are rounded once each, so is the decoded value; the quotient that makes the scale
    loses TINIEST at most by underflow, ``levels`` times."""
    return np.asarray(
        (2 * HALF_ULP + HALF_ULP**2) * np.abs(x - zero)
        + HALF_ULP * np.abs(decoded)
        + levels * TINIEST
    )


def _assert_bound(fmt: Affine, x: F32, nearest_to: F64 | None = None) -> None:
    """|x - x'| <= scale / 2 for groups ``x [n, N]`` as the format stores them, in float64."""
    scale, zero, _, found = Groups.of(fmt, x)
    decoded = found.astype(np.float64)
    exact = x.astype(np.float64) if nearest_to is None else nearest_to
    half_step = np.maximum(scale.astype(np.float64), 0)[..., None] / 2
    slack = _slack(exact, zero.astype(np.float64)[..., None], decoded, fmt.levels)
    excess = np.abs(exact - decoded) - half_step - slack
    worst = np.unravel_index(excess.argmax(), excess.shape)
    assert excess[worst] <= 0, f"element {worst}: {exact[worst]} became {decoded[worst]}"


@formats
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_error_is_at_most_half_a_step(fmt: Affine, head_dim: int) -> None:
    """Held down: constant rows that divide by zero, ranges whose 16-bit scale becomes 0, zeros
    rounded to above the minimum on large offsets, maxima clipped by a scale rounded down."""
    named = _vectors(head_dim, fmt.levels)
    if fmt.rotated:  # rotation takes these out of the range in which the bound is promised
        named = {name: x for name, x in named.items() if not name.startswith("huge")}
    _assert_bound(fmt, fmt.rotate(np.stack(list(named.values()))))


@by_channel
def test_error_of_a_channel_is_at_most_half_a_step(fmt: Affine) -> None:
    """The same of the 64 tokens of a page, each channel with vectors of its own."""
    _assert_bound(fmt, np.stack(list(_vectors(PAGE_TOKENS, fmt.levels).values())))


@st.composite
def _in_range(draw: st.DrawFn, size: int, levels: int) -> F32:
    """Groups of any offset and range for which the bound is promised."""
    unit = draw(arrays(np.float32, (1, size), elements=st.floats(-1, 1, width=32)))
    offset = draw(st.floats(-60000, 60000, width=32))
    spread = 2.0 ** draw(st.integers(-40, 12))
    stretch = draw(st.sampled_from((1, levels)))
    x = unit.astype(np.float64) * spread
    return (np.where(x > 0, x * stretch, x) + offset).astype(np.float32)


@unrotated
@given(data=st.data())
@settings(max_examples=100)
def test_error_is_at_most_half_a_step_for_any_group_in_range(
    fmt: Affine, data: st.DataObject
) -> None:
    _assert_bound(fmt, data.draw(_in_range(_size(fmt), fmt.levels)))


@unrotated
@given(x=arrays(np.float32, 8, elements=st.floats(allow_nan=False, allow_infinity=False, width=32)))
@example(x=np.full(8, -3e38, np.float32))
@example(x=np.array([-1e30, 1e30] * 4, np.float32))
@example(x=np.full(8, 3e38, np.float32))
@settings(max_examples=100)
def test_beyond_float16_metadata_the_nearest_value_in_reach_is_stored(fmt: Affine, x: F32) -> None:
    """Held down: a scale or zero that overflows to Inf and makes the whole group NaN."""
    groups = np.resize(x, (1, _size(fmt)))
    top = float(Groups.of(fmt, groups).zero[0]) + fmt.levels * F16_MAX
    _assert_bound(fmt, groups, np.clip(groups.astype(np.float64), -F16_MAX, top))


@unrotated
def test_a_scale_is_never_negative(fmt: Affine) -> None:
    """A group that is below the lowest zero as a whole is held by the zero alone. Held down: a
    ``max - zero`` below 0 stored as the scale, which no kernel expects."""
    low = np.repeat(np.array([[-1e6], [-65505.0]], np.float32), _size(fmt), axis=1)
    scale, zero, rows, _ = Groups.of(fmt, low)
    assert scale.tolist() == [0, 0]
    assert zero.tolist() == [-F16_MAX] * 2
    assert not any(byte for planes in rows for plane in planes for byte in plane)


_ANY_ELEMENT = st.one_of(
    st.floats(width=32),  # NaN, Inf, denormals and the largest numbers included
    st.floats(-1, 1, width=32),
    st.floats(99, 101, width=32),
    st.integers(-300, 300).map(lambda n: n * 2.0**-24),
)


@unrotated
@given(data=st.data())
@settings(max_examples=50)
def test_every_bit_is_that_of_exact_arithmetic_with_the_roundings_spelled_out(
    fmt: Affine, data: st.DataObject
) -> None:
    """Scale, zero, codes and decoded values against fractions, one element at a time. Held
    down: codes made with the unrounded scale, ties away from zero, nibbles in another order."""
    groups = data.draw(arrays(np.float32, (2, 8), elements=_ANY_ELEMENT))
    _assert_like_scalars(fmt, np.tile(groups, (1, _size(fmt) // 8)))


@unrotated
@pytest.mark.parametrize("head_dim", (8, 80))
def test_named_vectors_match_exact_arithmetic(fmt: Affine, head_dim: int) -> None:
    size = PAGE_TOKENS if fmt.by_page else head_dim
    _assert_like_scalars(fmt, np.stack(list(_vectors(size, fmt.levels).values())))


def _assert_like_scalars(fmt: Affine, x: F32) -> None:
    scale, zero, rows, decoded = Groups.of(fmt, x)
    expected = [quantize(group, fmt.bits) for group in x.tolist()]
    codes = [group.codes for group in expected]
    by_token = [list(token) for token in zip(*codes, strict=True)] if fmt.by_page else codes
    assert rows == [packed(token, fmt.bits) for token in by_token]
    for n, group in enumerate(expected):
        for stored, number in ((scale[n], group.scale), (zero[n], group.zero)):
            assert stored.tobytes() == np.float16(number).tobytes()  # +0 and one NaN only
        np.testing.assert_array_equal(decoded[n], np.array(dequantize(group), np.float32))


@formats
@pytest.mark.parametrize("poison", (np.nan, np.inf, -np.inf))
def test_a_vector_that_is_not_finite_is_nan_as_a_whole_and_alone(
    fmt: Affine, poison: float
) -> None:
    """Held down: a NaN that turns into a plausible code, and one that spoils its neighbours."""
    x = np.random.default_rng(0).standard_normal((3, 2, 64)).astype(np.float32)
    clean = fmt.encode(x)
    x[1, 0, 17] = poison
    broken = fmt.encode(x)
    for before, after in zip(clean, broken, strict=True):
        others = np.ones(before.shape[:2], bool)
        others[1, 0] = False
        np.testing.assert_array_equal(before[others], after[others])
    expected = fmt.decode(clean, 64)
    expected[1, 0] = np.nan
    np.testing.assert_array_equal(fmt.decode(broken, 64), expected)


@by_channel
@pytest.mark.parametrize("poison", (np.nan, np.inf, -np.inf))
def test_a_channel_that_is_not_finite_is_nan_as_a_whole_and_alone(
    fmt: Affine, poison: float
) -> None:
    """All 64 tokens of that dimension, of one head of one page."""
    x = np.random.default_rng(0).standard_normal((3, 2, PAGE_TOKENS, 80)).astype(np.float32)
    expected = fmt.decode(fmt.encode(x), 80)
    expected[1, 0, :, 17] = np.nan
    x[1, 0, 40, 17] = poison
    broken = fmt.encode(x)
    np.testing.assert_array_equal(fmt.decode(broken, 80), expected)
    _, zero, *codes = broken
    assert zero[1, 0, 17] == 0 and not unpack(codes, fmt.bits, 80)[1, 0, :, 17].any()


@formats
def test_vectors_do_not_depend_on_their_batch(fmt: Affine) -> None:
    """The shape in which vectors arrive (chunk, heads, strides) leaves no trace in the bytes."""
    x = np.random.default_rng(1).standard_normal((5, 3, 96)).astype(np.float32)
    together = fmt.encode(x)
    strided = fmt.encode(x.swapaxes(0, 1)[:, ::2])
    alone = fmt.encode(x[2, 1])
    for all_, some, one in zip(together, strided, alone, strict=True):
        np.testing.assert_array_equal(all_.swapaxes(0, 1)[:, ::2], some)
        np.testing.assert_array_equal(all_[2, 1], one)


@by_channel
def test_pages_do_not_depend_on_their_batch(fmt: Affine) -> None:
    x = np.random.default_rng(1).standard_normal((5, PAGE_TOKENS, 3, 96)).astype(np.float32)
    together = fmt.encode(x.swapaxes(1, 2))
    strided = fmt.encode(x.transpose(2, 0, 1, 3)[:, ::2])
    alone = fmt.encode(x[2, :, 1])
    for all_, some, one in zip(together, strided, alone, strict=True):
        np.testing.assert_array_equal(all_.swapaxes(0, 1)[:, ::2], some)
        np.testing.assert_array_equal(all_[2, 1], one)


@pytest.mark.parametrize("fmt", [*AFFINE, *CHANNEL], ids=str)
def test_gaussian_noise_is_that_of_an_ideal_grid(fmt: Affine) -> None:
    """A step of a grid from minimum to maximum is range / levels, and its square over 12 the
    noise; at least that of float64 with nothing rounded. Held down: half a step of bias or a
    wasted code, which a bound on the error cannot see."""
    x = np.random.default_rng(2).standard_normal((60, PAGE_TOKENS, 128)).astype(np.float32)
    exact = x.astype(np.float64)
    noise = np.square(fmt.decode(fmt.encode(x), 128) - exact).mean()
    groups = np.ptp(fmt.rotate(exact), axis=-2 if fmt.by_page else -1)
    ideal = (np.square(groups / fmt.levels) / 12).mean()
    assert 10 * np.log10(noise / ideal) <= METADATA_LOSS_DB


@pytest.mark.parametrize("bits", (8, 4))
def test_rotation_pays_for_an_outlier_channel(bits: int) -> None:
    """The reason for the ``h`` formats: one large channel costs the others less."""
    x = np.random.default_rng(3).standard_normal((500, 128)).astype(np.float32)
    x[:, 5] += 40
    plain, rotated = (
        np.square(fmt.decode(fmt.encode(x), 128) - x).mean()
        for fmt in (FORMATS[f"int{bits}"], FORMATS[f"int{bits}h"])
    )
    assert rotated < plain


@by_channel
def test_a_channel_of_its_own_offset_costs_nothing(fmt: Affine) -> None:
    """The reason for the ``c`` formats: offsets and gains of channels, as of Qwen2's keys, leave
    the noise of each in proportion to its gain."""
    x = np.random.default_rng(3).standard_normal((20, PAGE_TOKENS, 128)).astype(np.float32)
    gain = np.exp2(np.arange(128) % 8).astype(np.float32)
    offset = gain * (np.arange(128) % 5 - 2)

    def noise(pages: F32) -> F64:
        difference = fmt.decode(fmt.encode(pages), 128).astype(np.float64) - pages
        return np.asarray(np.sqrt(np.square(difference).mean(axis=(0, 1))))

    # Powers of two leave the grid as it is. Offsets of 2 gains make minima below 8, whose zeros are
    # rounded by 2^-8 gains at most: a thousandth of the range.
    np.testing.assert_array_equal(noise(x * gain), noise(x) * gain)
    with_offset = np.square(noise(x * gain + offset) / gain).mean()
    assert with_offset <= 1.01 * np.square(noise(x)).mean()
