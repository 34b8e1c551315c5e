"""Weights of few bits: codes with scales by group of inputs.

int8 is symmetric over rotated inputs: products with 8-bit activations (W8A8) lose little only if no
input stands out, and a Hadamard rotation spreads those that do over a block (QuaRot, arXiv
2404.00456). int4 has a scale and an offset for each group of inputs, found by a search over clipped
ranges as those of GPTQ's and llama.cpp's round-to-nearest baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvant.formats.hadamard import signs

__all__ = ["QUANTIZERS", "Codes", "quantize_int4", "quantize_int8"]

GROUP = 32
"""Inputs that share a scale in int4, as in llama.cpp's Q4 types."""

_WIDE_GROUPS = (256, 192, 128, 64)  # of int8: the first that divides the inputs
_MOST_ROTATED = 64  # inputs of a rotated block

_SLAB = 1 << 15  # weights worked on at a time: they fit a cache, and torch starts no threads
_CLIPS = 12  # ranges that are tried for a group, from whole to 0.75 of it


@dataclass(frozen=True, slots=True)
class Codes:
    """``weight[o, i] = scale[o, g] * (codes[o, i] - 2**(bits - 1)) + offset[o, g]`` with
    ``g = i // group``.

    Attributes:
        codes: uint8 ``[out, in]``, each below ``2**bits``.
        scale: float32 ``[out, groups]``.
        offset: the same, or None for zeros.
        bits: 4 or 8.
        group: inputs of a group, the last one of which may be shorter.
        rotation: if not 0 these are the weights of inputs rotated by :func:`rotate` in blocks of so
            many, a power of two that divides ``in``.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    bits: int
    group: int
    rotation: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        outputs, inputs = self.codes.shape
        return outputs, inputs

    def dequantize(self) -> Tensor:
        """The weights of inputs that are not rotated, float32 ``[out, in]``."""

        def spread(x: Tensor) -> Tensor:
            return x.repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]

        out: Tensor = (self.codes.float() - 2.0 ** (self.bits - 1)) * spread(self.scale)
        if self.offset is not None:
            out += spread(self.offset)
        return unrotate(out, self.rotation) if self.rotation else out

    def finite(self) -> bool:
        """Whether all scales and offsets are finite; of weights that are not they are not."""
        parts = (self.scale,) if self.offset is None else (self.scale, self.offset)
        return all(bool(part.isfinite().all()) for part in parts)

    def regrouped(self, widest: int) -> Codes:
        """The same weights in groups of at most ``widest`` inputs, if they are one wide group."""
        inputs = self.codes.shape[1]
        if self.group <= widest or self.scale.shape[1] > 1:
            return self
        group = _wide_group(inputs)
        count = -(-inputs // group)
        offset = None if self.offset is None else self.offset.repeat_interleave(count, 1)
        scale = self.scale.repeat_interleave(count, 1)
        return replace(self, scale=scale, offset=offset, group=group)

    def rows(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """With ``change``, which only moves whole rows, done to every tensor."""
        offset = None if self.offset is None else change(self.offset)
        return replace(self, codes=change(self.codes), scale=change(self.scale), offset=offset)

    @staticmethod
    def concat(parts: Sequence[Codes]) -> Codes | None:
        """The rows of all parts, or None if they differ in bits or groups."""
        first = parts[0]
        kinds = {(p.bits, p.group, p.rotation) for p in parts}
        if len(kinds) > 1:
            return None
        offset: Tensor | None = None
        if any(p.offset is not None for p in parts):
            offset = torch.cat(
                [p.scale.new_zeros(p.scale.shape) if p.offset is None else p.offset for p in parts]
            )
        codes, scale = (
            torch.cat(x) for x in zip(*((p.codes, p.scale) for p in parts), strict=True)
        )
        return replace(first, codes=codes, scale=scale, offset=offset)


def _hadamard(block: int) -> Tensor:
    """Orthogonal, ``[block, block]``; its own inverse."""
    out = torch.ones(1, 1)
    while len(out) < block:
        out = torch.cat((torch.cat((out, out), 1), torch.cat((out, -out), 1)))
    return out.div_(block**0.5)


def _turned(x: Tensor, block: int) -> Tensor:
    return (x.reshape(-1, block) @ _hadamard(block)).view(x.shape)


def rotate(x: Tensor, block: int) -> Tensor:
    """Rotate the rows of ``x [n, in]``, block by block: as :mod:`kvant.formats.hadamard` does."""
    return _turned(x * torch.from_numpy(signs(x.shape[1]).copy()), block)


def unrotate(x: Tensor, block: int) -> Tensor:
    """Invert :func:`rotate`."""
    return _turned(x, block) * torch.from_numpy(signs(x.shape[1]).copy())


def _wide_group(inputs: int) -> int:
    return next((g for g in _WIDE_GROUPS if inputs % g == 0), _WIDE_GROUPS[-1])


def _slabs(weight: Tensor) -> Sequence[Tensor]:
    """Rows of ``weight [out, in]``, so many at a time as are worked on at once."""
    return torch.split(weight, max(1, _SLAB // weight.shape[1]))


def quantize_int8(weight: Tensor) -> Codes:
    """Eight bits of ``weight [out, in]``, rotated, with a scale for each wide group of inputs."""
    inputs = weight.shape[1]
    rotation = min(inputs & -inputs, _MOST_ROTATED)
    rotation = rotation if rotation >= 8 else 0
    group = _wide_group(inputs)

    def quantize(slab: Tensor) -> tuple[Tensor, Tensor]:
        slab = rotate(slab.float(), rotation) if rotation else slab.float()
        x = torch.nn.functional.pad(slab, (0, -inputs % group)).view(len(slab), -1, group)
        scale = x.abs().amax(2, keepdim=True) / 127
        codes = (x / scale.masked_fill(scale == 0, 1)).round_().clamp_(-127, 127).add_(128)
        return codes.to(torch.uint8).view(len(slab), -1)[:, :inputs], scale.squeeze(2)

    parts = [quantize(slab) for slab in _slabs(weight)]
    codes, scale = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    return Codes(codes, scale, None, 8, group, rotation)


def quantize_int4(weight: Tensor, group: int = GROUP) -> Codes:
    """Four bits with a scale and an offset for each ``group`` inputs of ``weight [out, in]``: of
    some ranges from the whole one inwards that of the least squared error."""
    slabs = [_quantize_groups(slab, group) for slab in _slabs(weight)]
    codes, scale, offset = (torch.cat(parts) for parts in zip(*slabs, strict=True))
    return Codes(codes, scale, offset, 4, group)


def _quantize_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[out, in]`` of 4 bits, scales and offsets ``[out, groups]``."""
    outputs, inputs = weight.shape
    missing = -inputs % group
    padded = torch.nn.functional.pad(weight.float(), (0, missing), mode="replicate")
    x = padded.view(outputs, -1, group)
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    middle, step = low / 2 + high / 2, high / 15 - low / 15
    x = (x - middle).div_(step.masked_fill(step == 0, 1))  # in steps: -7.5 to 7.5
    best, ratio = torch.full_like(middle, torch.inf), torch.ones_like(middle)
    for clip in range(_CLIPS):
        tried = 1 - 0.25 * clip / _CLIPS
        exact = (x / tried).sub_(0.5)  # codes are -8 to 7 about the middle and half a step
        error = exact.round().clamp_(-8, 7).sub_(exact).mul_(tried).square_().sum(2, keepdim=True)
        better = error < best
        best, ratio = torch.where(better, error, best), ratio.masked_fill_(better, tried)
    scale = step * ratio
    codes = x.div_(ratio).sub_(0.5).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
    offset = middle + scale / 2
    return codes.view(outputs, -1)[:, :inputs], scale.squeeze(2), offset.squeeze(2)


QUANTIZERS: dict[str, Callable[[Tensor], Codes]] = {"int8": quantize_int8, "int4": quantize_int4}
"""By the name of ``weight_dtype``."""
