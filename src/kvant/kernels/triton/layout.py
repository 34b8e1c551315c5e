"""What kernels are compiled for: a part of a page, as a constant.

A :class:`Part` is a ``tl.constexpr`` argument: kernels branch on its fields while they are
compiled, so each pair of formats has its own machine code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kvant.formats import KVFormat, KVShape, KVSpec, packing
from kvant.formats.base import Side
from kvant.formats.plain import Plain

__all__ = ["Layer", "Part", "Store", "padded"]


def padded(head_dim: int) -> int:
    """The length of the vectors that kernels work on: the power of two at or above head_dim, at
    least 16, the least that a tensor core multiplies."""
    return max(16, 1 << (head_dim - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Part:
    """K or V of one KV head in a page (:mod:`kvant.formats.base` has the byte map).

    Attributes:
        side: ``k`` or ``v``.
        family: ``plain``, ``affine``, ``midpoint`` or ``float8``.
        dtype: of plain values: ``f32``, ``f16`` or ``bf16``.
        bits: of a code.
        rotated, by_page: those of the format.
        head_dim: D; ``padded_dim`` is the power of two that tensors have instead.
        nbytes: of the part.
        scale, zero: where these planes begin, in bytes from the part's first one.
        widths, codes, columns: of each plane of codes, lowest bits first: bits of its fields, where
            it begins, and bytes of a token. For plain values ``codes[0]`` is their plane.
        block: columns of V that lie side by side in each plane; unused for K.
    """

    side: Side
    family: str
    dtype: str
    bits: int
    rotated: bool
    by_page: bool
    head_dim: int
    padded_dim: int
    nbytes: int
    scale: int
    zero: int
    widths: tuple[int, ...]
    codes: tuple[int, ...]
    columns: tuple[int, ...]
    block: tuple[int, ...]

    @classmethod
    def of(cls, fmt: KVFormat, side: Side, head_dim: int) -> Part:
        """A format as kernels see it."""
        offsets, at = {}, 0
        planes = list(fmt.planes(head_dim))
        for plane in planes:
            offsets[plane.name] = at
            at += plane.nbytes
        rows = [plane for plane in planes if plane.of == "token" and plane.columns]
        coded = not isinstance(fmt, Plain)
        return cls(
            side=side,
            family=type(fmt).__name__.lower(),
            dtype="" if coded else fmt.name,
            bits=fmt.bits,
            rotated=fmt.rotated,
            by_page=fmt.by_page,
            head_dim=head_dim,
            padded_dim=padded(head_dim),
            nbytes=at,
            scale=offsets.get("scale", 0),
            zero=offsets.get("zero", 0),
            widths=packing.WIDTHS[fmt.bits] if coded else (),
            codes=tuple(offsets[plane.name] for plane in rows),
            columns=tuple(plane.columns for plane in rows),
            block=tuple(math.gcd(16, plane.columns) for plane in rows),
        )


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer in a page: its parts, where it begins, and the bytes of a KV head of it."""

    k: Part
    v: Part
    offset: int

    @property
    def head_bytes(self) -> int:
        """Bytes of a head page: K, then V."""
        return self.k.nbytes + self.v.nbytes


@dataclass(frozen=True, slots=True)
class Store:
    """A pool as kernels see it: ``pages`` is a tensor, uint8 ``[pages, bytes of a page]``; part
    ``side`` of KV head ``h`` begins ``layer.offset + h * layer.head_bytes`` bytes (V:
    ``+ layer.k.nbytes``) after its page's first byte."""

    pages: Any
    layers: tuple[Layer, ...]

    @classmethod
    def open(cls, spec: KVSpec, shape: KVShape, pages: Any, *, one_layer: bool = False) -> Store:
        """The layers of ``pages``; with ``one_layer`` all of them begin at a page's first byte."""
        layers = tuple(
            Layer(
                Part.of(layer.k, "k", shape.head_dim),
                Part.of(layer.v, "v", shape.head_dim),
                0 if one_layer else layer.offset,
            )
            for layer in spec.layout(shape)
        )
        return cls(pages, layers)

    @property
    def page_bytes(self) -> int:
        """Bytes from one page to the next."""
        return int(self.pages.shape[1])
