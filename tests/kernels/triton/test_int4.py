"""Weights of 4 bits in the layout of torch's int4 product: expansion, and what scales mean."""

from __future__ import annotations

import pytest
import torch

from kvant.kernels.triton.int4 import GROUPS, expand_int4, inner_tiles
from kvant.kernels.triton.pool import find_device
from kvant.models.codes import Codes, quantize_int4
from kvant.models.gpu import int4_factors, int4_pairs

DEVICE = find_device()


def some_codes(outputs: int, inputs: int, group: int, *, offset: bool = True) -> Codes:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    found = quantize_int4(weight, group)
    return found if offset else Codes(found.codes, found.scale, None, 4, group)


def words_of(codes: torch.Tensor, tiles: int) -> torch.Tensor:
    """What torch packs on a GPU (ATen's int4mm.cu), from its description: a lane has output
    ``lane // 4`` of 8, and of each tile of 16 inputs those at ``lane % 4 * 2 + {0, 1, 8, 9}``; a
    word has two tiles, even inputs in its lower half."""
    outputs, inputs = codes.shape
    out = torch.zeros(outputs // 8, inputs // (16 * tiles), 32, tiles // 2, dtype=torch.int64)
    for n in range(outputs):
        for k in range(inputs):
            tile, within = divmod(k, 16)
            lane = n % 8 * 4 + within % 8 // 2
            nibble = k % 2 * 4 + tile % 2 * 2 + within // 8
            place = n // 8, tile // tiles, lane, tile % tiles // 2
            out[place] |= int(codes[n, k]) << 4 * nibble
    return torch.where(out >= 2**31, out - 2**32, out).int()


def rounded(codes: Codes) -> torch.Tensor:
    """The weights that bfloat16 factors stand for, float32."""
    offset = None if codes.offset is None else codes.offset.bfloat16().float()
    scale = codes.scale.bfloat16().float()
    return Codes(codes.codes, scale, offset, 4, codes.group).dequantize()


@pytest.mark.parametrize(
    ("inputs", "group", "tiles"), [(32, 32, 2), (192, 32, 4), (128, 64, 8), (256, 256, 8)]
)
@pytest.mark.parametrize("offset", [True, False])
def test_expansion(inputs: int, group: int, tiles: int, offset: bool) -> None:
    assert inner_tiles(inputs) == tiles and group in GROUPS
    codes = some_codes(16, inputs, group, offset=offset)
    words = words_of(codes.codes, tiles).to(DEVICE)
    found = expand_int4(words, int4_factors(codes).to(DEVICE), group)
    # Triton's interpreter cuts bits off where a GPU rounds to bfloat16.
    bound = 2.0**-8 if DEVICE.type == "cuda" else 2.0**-7
    torch.testing.assert_close(found.cpu().float(), rounded(codes), rtol=bound, atol=1e-7)


def test_no_tiles_for_odd_inputs() -> None:
    assert [inner_tiles(n) for n in (48, 80, 100)] == [None, None, None]


@pytest.mark.parametrize("group", [32, 64])
def test_torch_means_the_same_by_scales(group: int) -> None:
    """By torch's product for CPUs, which has the scales of that for GPUs."""
    codes = some_codes(32, 128, group)
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.codes.int(), 2)
    unit = torch.eye(128).bfloat16()
    args = words, group, int4_factors(codes)
    found = torch.ops.aten._weight_int4pack_mm_for_cpu(unit, *args)
    torch.testing.assert_close(found.t().float(), rounded(codes), rtol=2.0**-8, atol=0)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="torch packs so on GPUs only")
@pytest.mark.parametrize("inputs", [64, 192, 256])
def test_torch_packs_as_described(inputs: int) -> None:
    codes = some_codes(24, inputs, 32)
    tiles = inner_tiles(inputs)
    pairs = int4_pairs(codes.codes.to(DEVICE))
    found = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
    assert torch.equal(found.cpu(), words_of(codes.codes, tiles or 0))
