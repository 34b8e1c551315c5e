"""Weights of 4 bits in the order of torch's own int4 product ("tinygemm"), and their expansion.

torch multiplies a few rows by such weights (``torch.ops.aten._weight_int4pack_mm``), in bfloat16 on
compute capability 8.0 and above; many rows are faster with expanded weights and cuBLAS. Its words
of 32 bits hold what a lane of a tensor core's 16 x 8 tile wants of two neighbouring tiles.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["GROUPS", "expand_int4", "inner_tiles"]

GROUPS = (32, 64, 128, 256)
"""Inputs of a group that torch's product knows."""

_BLOCK = 1024  # weights of a program


def inner_tiles(inputs: int) -> int | None:
    """How many tiles of 16 inputs lie side by side in the packed weights of a layer: the most that
    divide it. None if not even two do, the least."""
    return next((tiles for tiles in (8, 4, 2) if inputs % (16 * tiles) == 0), None)


def expand_int4(words: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """The weights ``[out, in]``, of the type of ``scales``.

    Args:
        words: int32 ``[out / 8, in / (16 tiles), 32, tiles / 2]``, as torch packs them.
        scales: ``[groups, out, 2]``, scale and offset (of codes from -8 to 7).
        group: inputs of a group.
    """
    outputs, tiles = words.shape[0] * 8, words.shape[3] * 2
    inputs = words.shape[1] * 16 * tiles
    out = scales.new_empty((outputs, inputs))
    grid = (outputs, triton.cdiv(inputs, _BLOCK))
    _expand[grid](
        words, scales, out, outputs, inputs, GROUP=group, TILES=tiles, BLOCK=_BLOCK, num_warps=4
    )
    return out


@triton.jit
def _expand(
    words,
    scales,
    out,
    outputs,
    inputs,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = k < inputs
    tile = k // 16
    lane = n % 8 * 4 + k % 8 // 2
    line = (n // 8).to(tl.int64) * (inputs // (16 * TILES)) + tile // TILES
    word = tl.load(words + (line * 32 + lane) * (TILES // 2) + tile % TILES // 2, there, 0)
    code = (word >> (k % 2 * 16 + tile % 2 * 8 + k % 16 // 8 * 4)) & 15
    factors = scales + ((k // GROUP).to(tl.int64) * outputs + n) * 2
    scale = tl.load(factors, there, 0.0).to(tl.float32)
    offset = tl.load(factors + 1, there, 0.0).to(tl.float32)
    weight = (code - 8).to(tl.float32) * scale + offset
    tl.store(out + n.to(tl.int64) * inputs + k, weight.to(out.dtype.element_ty), there)
