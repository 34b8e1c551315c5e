"""What a KV format is: a value that knows its mathematics, its byte map and its sizes.

A *page* holds 64 consecutive positions of one sequence, for all layers and KV heads. Inside it
each (layer, KV head) owns one contiguous *head page*: the K part, then the V part. A part is
the planes of its format one after another, each a multiple of 64 bytes:

    plane with no columns     one scalar per token, in token order (a scale, a zero)
    plane with C columns      one row of C elements per token, interleaved in 4-byte words
    plane of the page         one row of C elements for all 64 tokens, in order; zeros fill the
                              last 64 bytes up

The interleaving is the same rule for every format; ``w = 4 / itemsize`` elements make a word:

    K   [token // 16][column // w][token % 16][column % w]
    V   [column // b][word of tokens][column % b][token in word]      b = gcd(16, columns)

A K line is 16 tokens x 4 bytes, what ``vpdpbusd`` multiplies with a broadcast of the query and
what a lane of ``mma.m16n8k16`` holds of its B fragment; a V line is 16 columns x one word of
tokens for the same reasons. With 1-byte elements word ``j`` of a block of 16 tokens holds
tokens {2j, 2j+1, 2j+8, 2j+9}, so that the accumulator fragment of Q K^T is the A fragment of
P V without shuffles; with wider elements it holds consecutive tokens. Every byte of the first two
kinds of planes belongs to one token, so a format without planes of the third kind lets tokens be
appended one by one without reading their neighbours. The others are *formats by page*: a page is
encoded as a whole, when its 64 tokens are known.

Nothing here depends on torch or on any other part of kvant.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvant.formats import hadamard, packing

__all__ = ["PAGE_TOKENS", "Array", "KVFormat", "PartView", "Plane", "Side"]

Array = NDArray[Any]
Side = Literal["k", "v"]

PAGE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Plane:
    """One array of a part. ``columns`` is 0 for one scalar per token; a plane ``of`` the page has
    its columns once for all tokens."""

    name: str
    dtype: str
    columns: int
    of: Literal["token", "page"] = "token"

    @property
    def nbytes(self) -> int:
        """Bytes for one page of one KV head, a multiple of 64."""
        row = np.dtype(self.dtype).itemsize * max(self.columns, 1)
        return PAGE_TOKENS * row if self.of == "token" else -(-row // 64) * 64


@dataclass(frozen=True, slots=True)
class _Interleave:
    """Stored shape of one plane of one head page, and which of its axes count tokens."""

    shape: tuple[int, ...]
    token_axes: tuple[int, ...]
    column_axes: tuple[int, ...]

    @property
    def axes(self) -> tuple[int, ...]:
        """The order of axes that gives tokens, then columns."""
        return self.token_axes + self.column_axes

    @classmethod
    def of(cls, plane: Plane, side: Side) -> _Interleave:
        if plane.of == "page":
            return cls((plane.nbytes // np.dtype(plane.dtype).itemsize,), (), (0,))
        if plane.columns == 0:
            return cls((PAGE_TOKENS,), (0,), ())
        word = 4 // np.dtype(plane.dtype).itemsize
        if side == "k":
            return cls((PAGE_TOKENS // 16, plane.columns // word, 16, word), (0, 2), (1, 3))
        block = math.gcd(16, plane.columns)
        blocks = plane.columns // block
        if word == 4:  # token = 16 * axis 1 + 8 * axis 4 + 2 * axis 2 + axis 5
            return cls((blocks, PAGE_TOKENS // 16, 4, block, 2, 2), (1, 4, 2, 5), (0, 3))
        return cls((blocks, PAGE_TOKENS // word, block, word), (1, 3), (0, 2))


class KVFormat(ABC):
    """How the key or value vectors of one KV head are stored, 64 tokens at a time, in ``bits`` bits
    of code or number for each element; ``by_page`` formats encode the 64 tokens at once.

    Subclasses are frozen dataclasses; two formats are equal when their fields are. The maths
    is ``decode(encode(x))``, with ``encode = quantize . rotate``; attention works on
    dequantized (still rotated) vectors and rotates queries and outputs instead.
    """

    name: str
    bits: int
    rotated: bool
    by_page: bool
    head_dim_multiple: int

    @abstractmethod
    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        """The planes of a part, in storage order."""

    @abstractmethod
    def quantize(self, x: Array) -> tuple[Array, ...]:
        """Encode float32 vectors ``x [..., D]`` (already rotated): one array per plane,
        ``[..., columns]`` or ``[...]``. Vectors are independent of each other, but in a format by
        page ``x`` is ``[..., 64, D]``, whole pages, and planes of the page are
        ``[..., columns]`` without the axis of tokens."""

    @abstractmethod
    def dequantize(self, planes: Sequence[Array], head_dim: int) -> Array:
        """Invert :meth:`quantize`: float32 ``[..., D]``, still rotated."""

    def rotate(self, x: Array) -> Array:
        """Take ``x [..., D]`` to the domain in which this format stores vectors."""
        return hadamard.rotate(x) if self.rotated else x

    def unrotate(self, x: Array) -> Array:
        """Invert :meth:`rotate`."""
        return hadamard.unrotate(x) if self.rotated else x

    def encode(self, x: Array) -> tuple[Array, ...]:
        """Rotate and quantize float32 vectors ``x [..., D]``."""
        return self.quantize(self.rotate(np.asarray(x, np.float32)))

    def decode(self, planes: Sequence[Array], head_dim: int) -> Array:
        """What :meth:`encode` kept of a vector, in the original domain."""
        return self.unrotate(self.dequantize(planes, head_dim))

    def part_bytes(self, head_dim: int) -> int:
        """Bytes of one part: 64 tokens of K or of V of one KV head."""
        return sum(plane.nbytes for plane in self.planes(head_dim))

    def bits_per_element(self, head_dim: int) -> float:
        """Effective bits per element, metadata included."""
        return 8 * self.part_bytes(head_dim) / (PAGE_TOKENS * head_dim)

    @staticmethod
    def _code_planes(width: int, head_dim: int) -> tuple[Plane, ...]:
        """The planes of codes of ``width`` bits (:mod:`kvant.formats.packing`)."""
        return tuple(
            Plane(f"codes{field}", "uint8", packing.columns(field, head_dim))
            for field in packing.WIDTHS[width]
        )

    def __str__(self) -> str:
        return self.name


class PartView:
    """Token-addressed access to one part (K or V, one layer) of a pool of pages.

    ``raw`` is a ``uint8 [pages, KV heads, part bytes]`` view into the pool; writes go through
    to it.
    """

    def __init__(self, fmt: KVFormat, side: Side, head_dim: int, raw: Array) -> None:
        self.fmt = fmt
        self._head_dim = head_dim
        self._planes: list[tuple[Plane, _Interleave, Array]] = []
        offset = 0
        for plane in fmt.planes(head_dim):
            bytes_ = raw[:, :, offset : offset + plane.nbytes]
            order = _Interleave.of(plane, side)
            self._planes.append(
                (plane, order, bytes_.view(plane.dtype).reshape(raw.shape[:2] + order.shape))
            )
            offset += plane.nbytes

    def write(self, pages: Array, slots: Array, x: Array) -> None:
        """Encode ``x [N, H, D]`` into positions ``slots [N]`` of ``pages [N]``; not for a format
        by page."""
        assert not self.fmt.by_page, "a page of this format is filled as a whole"
        for (_, order, stored), values in zip(self._planes, self.fmt.encode(x), strict=True):
            by_token = stored.transpose(
                0, *(a + 2 for a in order.token_axes), 1, *(a + 2 for a in order.column_axes)
            )
            where = np.unravel_index(slots, [order.shape[a] for a in order.token_axes])
            columns = [order.shape[a] for a in order.column_axes]
            by_token[(pages, *where)] = values.reshape(*values.shape[:2], *columns)

    def fill(self, pages: Array, x: Array) -> None:
        """Encode ``x [n, 64, H, D]`` into all positions of ``pages [n]``."""
        encoded = self.fmt.encode(x.swapaxes(1, 2))
        for (plane, order, stored), values in zip(self._planes, encoded, strict=True):
            if plane.of == "page":
                values = np.pad(values, ((0, 0), (0, 0), (0, order.shape[0] - plane.columns)))
            split = values.reshape(*values.shape[:2], *(order.shape[a] for a in order.axes))
            stored[pages] = split.transpose(0, 1, *(2 + np.argsort(order.axes)))

    def read(self, pages: Array) -> Array:
        """Dequantize whole pages: float32 ``[H, 64 * len(pages), D]``, still rotated."""
        planes = []
        for plane, order, stored in self._planes:
            rows = stored[pages].transpose(1, 0, *(a + 2 for a in order.axes))
            if plane.of == "page":
                planes.append(rows[..., : plane.columns])
                continue
            columns = (plane.columns,) if plane.columns else ()
            planes.append(rows.reshape(*rows.shape[:2], PAGE_TOKENS, *columns))
        vectors = self.fmt.dequantize(planes, self._head_dim)
        return vectors.reshape(vectors.shape[0], len(pages) * PAGE_TOKENS, self._head_dim)
