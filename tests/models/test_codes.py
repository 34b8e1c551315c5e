"""Codes say what they say, and quantizers find good ones whatever the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvant.models.codes import QUANTIZERS, Codes, quantize_int4, quantize_int8, rotate, unrotate


def weights(seed: int, outputs: int, inputs: int, outliers: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    return weight * (1 + outliers * torch.rand(outputs, inputs, generator=generator) ** 20)


def test_codes_are_scaled_about_their_middle_and_offset_by_groups() -> None:
    """The definition, one weight at a time; the last group is shorter."""
    codes = torch.randint(0, 16, (3, 20), dtype=torch.uint8)
    scale, offset = torch.randn(3, 3), torch.randn(3, 3)
    found = Codes(codes, scale, offset, 4, 8).dequantize()
    for o in range(3):
        for i in range(20):
            value = float(scale[o, i // 8]) * (int(codes[o, i]) - 8) + float(offset[o, i // 8])
            assert float(found[o, i]) == pytest.approx(value, rel=1e-6, abs=1e-6)


def test_rows_and_concat_move_whole_rows() -> None:
    first, second = quantize_int4(weights(0, 4, 64)), quantize_int4(weights(1, 6, 64))
    plain = Codes(second.codes, second.scale, None, 4, second.group)
    both = Codes.concat([first, plain])
    assert both is not None
    expected = torch.cat([first.dequantize(), plain.dequantize()])
    assert torch.equal(both.dequantize(), expected)
    assert torch.equal(both.rows(lambda x: x.flip(0)).dequantize(), expected.flip(0))
    assert Codes.concat([first, quantize_int4(weights(1, 6, 64), 16)]) is None
    assert Codes.concat([first, quantize_int8(weights(1, 6, 64))]) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 700), st.sampled_from([0, 50]))
@example(0, 3, 512, 50)  # groups of 256, 192, 64, one of 64 that is shorter
@example(0, 3, 576, 50)
@example(0, 3, 320, 50)
@example(0, 3, 72, 50)
def test_int8_is_within_half_a_step(seed: int, outputs: int, inputs: int, outliers: int) -> None:
    """Of the rotated weights."""
    weight = weights(seed, outputs, inputs, outliers)
    codes = quantize_int8(weight)
    block = min(64, inputs & -inputs)
    assert (codes.bits, codes.offset, codes.rotation) == (8, None, block if block >= 8 else 0)
    assert codes.group in (256, 192, 128, 64) and codes.group % block == 0
    assert codes.scale.shape == (outputs, -(-inputs // codes.group))
    assert int(codes.codes.min()) >= 1  # symmetric: -127 to 127
    error = codes.dequantize() - weight
    if codes.rotation:
        error = rotate(error, codes.rotation)
    step = codes.scale.repeat_interleave(codes.group, dim=1)[:, :inputs]
    assert bool((error.abs() <= step * 0.501).all())


@pytest.mark.parametrize("block", [8, 16, 32, 64])
@pytest.mark.parametrize("inputs", [64, 192, 960])
def test_rotation_of_rows_and_weights_changes_no_product(block: int, inputs: int) -> None:
    weight, x = weights(0, 5, inputs), weights(1, 7, inputs)
    torch.testing.assert_close(
        rotate(x, block) @ rotate(weight, block).T, x @ weight.T, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(unrotate(rotate(x, block), block), x)


def test_rotation_spreads_what_stands_out() -> None:
    """An input that is a hundred times the others costs int8 little: in each row it leaves the
    others no more than a code or two without."""
    weight = weights(0, 8, 256)
    weight[:, 17] *= 100
    others = torch.arange(256) != 17
    error = (quantize_int8(weight).dequantize() - weight)[:, others]
    plain = weight.abs().amax(1, keepdim=True) / 127
    rounded = ((weight / plain).round() * plain - weight)[:, others]
    assert error.norm() < rounded.norm() / 5


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 200),
    st.sampled_from([8, 32, 128]),
    st.sampled_from([0, 50]),
)
def test_int4_is_no_worse_than_the_whole_range(
    seed: int, outputs: int, inputs: int, group: int, outliers: int
) -> None:
    """In every group, the last and shorter one included."""
    weight = weights(seed, outputs, inputs, outliers)
    codes = quantize_int4(weight, group)
    assert codes.codes.shape == weight.shape and int(codes.codes.max()) <= 15
    found = codes.dequantize()
    for part, other in zip(weight.split(group, 1), found.split(group, 1), strict=True):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = ((high - low) / 15).clamp_min(1e-30)
        plain = ((part - low) / step).round() * step + low
        error, most = (other - part).square().sum(1), (plain - part).square().sum(1)
        # Values of a shorter group are repeated at its end, so its sum weighs the last one more.
        slack = 1.00001 if part.shape[1] == group else group
        assert bool((error <= most * slack + 1e-9).all())


def test_int4_of_a_large_matrix_is_that_of_its_rows() -> None:
    """It is worked on in slabs."""
    weight = weights(0, 40, 4096)
    whole = quantize_int4(weight)
    rows = [quantize_int4(row) for row in weight.split(1)]
    assert torch.equal(whole.dequantize(), torch.cat([row.dequantize() for row in rows]))


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30, -1e30, 1e38])
def test_constant_rows_are_kept(kind: str, value: float) -> None:
    weight = torch.full((2, 40), value)
    weight[1] = 0
    codes = QUANTIZERS[kind](weight)
    assert codes.finite()
    if codes.rotation:  # it makes other numbers of them
        error = (codes.dequantize().double() - weight).norm()
        assert error <= 0.01 * weight.double().norm()
        assert not codes.dequantize()[1].any()
    else:
        torch.testing.assert_close(codes.dequantize(), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-10, 1e10, 1e30, 5e37])
def test_any_magnitude_is_as_good_as_another(kind: str, size: float) -> None:
    """Down to where float32 itself has no digits left."""
    weight = weights(0, 4, 64)
    exact = QUANTIZERS[kind](weight)
    codes = QUANTIZERS[kind](weight * size)
    assert codes.finite()
    if size > 1e-40:
        torch.testing.assert_close(codes.dequantize() / size, exact.dequantize())


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_types(kind: str, dtype: torch.dtype) -> None:
    weight = weights(0, 4, 64).to(dtype)
    found, expected = QUANTIZERS[kind](weight), QUANTIZERS[kind](weight.float())
    assert torch.equal(found.dequantize(), expected.dequantize())


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_told(kind: str, value: float) -> None:
    weight = weights(0, 4, 64)
    assert QUANTIZERS[kind](weight).finite()
    weight[2, 33] = value
    assert not QUANTIZERS[kind](weight).finite()
