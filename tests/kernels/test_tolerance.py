"""The tolerance for arithmetic in integers: what such arithmetic needs, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from kvant.formats import KVFormat
from tests.kernels.attention_oracle import (
    GROUP,
    QKV,
    LayerFormats,
    Options,
    Piece,
    Table,
    pieces,
    softmax,
)
from tests.kernels.driver import Driver, assert_accurate
from tests.kernels.tolerance import Codes

Array = NDArray[Any]

COARSE, FINE = (127, 255), (32512, 16383)
SPECS = ("int8", "k=int8h,v=int4h", "int4h+r64", "k4v4", "k=int8,v=int3c+s64r64")


class Integers(NamedTuple):
    """Attention of a backend that rounds to integers, up to the ``limits`` for queries and for
    weights. Unlike it backends may have ``uncentred`` codes, or not take the nearest integer."""

    limits: tuple[int, int]
    uncentred: bool = False
    to_integer: Callable[[Array], Array] = np.rint

    def attend(self, formats: LayerFormats, qkv: QKV, options: Options) -> Array:
        """Outputs ``[N, H, D]``."""
        q, k, v = qkv
        queries = q.swapaxes(0, 1).astype(float)
        scores = np.full((len(queries), len(q), len(q)), -np.inf)
        seen = pieces(formats, k, v, options.window)
        for piece in seen:
            dots = self._dots(piece, queries) * q.shape[-1] ** -0.5
            if options.softcap is not None:
                dots = options.softcap * np.tanh(dots / options.softcap)
            scores = np.where(piece.visible, dots, scores)
        weights = softmax(scores, options.sinks)
        out = np.zeros_like(queries)
        for piece in seen:
            out += self._mix(piece, np.where(piece.visible, weights, 0))
        return out.swapaxes(0, 1)

    def _dots(self, piece: Piece, q: Array) -> Array:
        fmt = piece.k_format
        dots = Table.of(fmt, piece.k, len(q), float, rotated=False).scores(q)
        for page, code, scale in self._pages(fmt, piece.k, len(q)):
            u = fmt.rotate(q) * (scale if fmt.by_page else 1)
            keys = code * (1 if fmt.by_page else scale)
            dots[..., page] += self._error(u, self.limits[0]) @ keys.swapaxes(1, 2)
        return dots

    def _mix(self, piece: Piece, p: Array) -> Array:
        fmt = piece.v_format
        out = Table.of(fmt, piece.v, len(p), float, rotated=False).mix(p)
        for page, code, scale in self._pages(fmt, piece.v, len(p)):
            w = p[..., page] * (1 if fmt.by_page else scale.swapaxes(1, 2))
            values = code * (scale if fmt.by_page else 1)
            out += fmt.unrotate(self._error(w, self.limits[1]) @ values)
        return out

    def _pages(self, fmt: KVFormat, x: Array, heads: int) -> list[tuple[slice, Array, Array]]:
        """The positions of each page, its codes ``[H, n, D]`` and scales that broadcast to it."""
        if fmt.bits >= 16:
            return []
        codes, out = Codes.of(fmt, x, heads), []
        for page, start in enumerate(range(0, len(x), GROUP)):
            count = min(len(x) - start, GROUP)
            code = codes.code[:, page, :count] + self.uncentred * (1 << fmt.bits - 1)
            out.append((slice(start, start + count), code, codes.scale[:, page, :count]))
        return out

    def _error(self, x: Array, limit: int) -> Array:
        step = np.abs(x).max(axis=-1, keepdims=True) / limit
        step = np.where(step > 0, step, 1)
        return np.asarray(step * self.to_integer(x / step) - x)


def judge(kv: str, backend: Integers, claimed: tuple[int, int], **options: Any) -> None:
    """Hold the outputs of ``backend`` against the tolerance for the arithmetic that it claims."""
    driver = Driver("reference", kv, **options)
    driver.arithmetic = lambda fmt: (0, 0) if fmt.bits >= 16 else claimed
    sequences = [driver.add(length) for length in (1, 70, 193)]
    for seq in sequences:
        layers = zip(LayerFormats.of(driver.spec, driver.shape), seq.q, seq.k, seq.v, strict=True)
        seq.out[:] = [backend.attend(at, qkv, driver.options) for at, *qkv in layers]
    assert_accurate(driver, *sequences)


@pytest.mark.parametrize("limits", (COARSE, FINE, (127, 16383)))
@pytest.mark.parametrize("kv", SPECS)
def test_it_admits_what_rounding_does(kv: str, limits: tuple[int, int]) -> None:
    judge(kv, Integers(limits), limits)


@pytest.mark.parametrize(
    "options",
    (
        {"window": 5},
        {"window": 100, "heads": 6, "head_dim": 80},
        {"softcap": 1.0},
        {"sinks": (-1e4, 0.5, 8.0, 1e4)},
        {"head_dim": 256},
    ),
    ids=str,
)
@pytest.mark.parametrize("limits", (COARSE, FINE))
@pytest.mark.parametrize("kv", ("int8", "k4v4"))
def test_it_knows_the_options(kv: str, limits: tuple[int, int], options: dict[str, Any]) -> None:
    judge(kv, Integers(limits), limits, **options)


@pytest.mark.parametrize(
    ("broken", "claimed"),
    (
        (Integers((127, 16383)), FINE),  # no second pass for the low byte of queries
        (Integers((32512, 255)), FINE),  # of weights
        (Integers((31, 255)), COARSE),  # fewer bits
        (Integers((127, 127)), COARSE),
        (Integers((32512, 8191)), FINE),
        (Integers(COARSE, uncentred=True), COARSE),
        (Integers(FINE, uncentred=True), FINE),
        (Integers(COARSE, to_integer=np.floor), COARSE),
        (Integers(FINE, to_integer=np.floor), FINE),
    ),
)
@pytest.mark.parametrize("kv", ("int8", "int4h+r64", "k4v4"))
def test_it_admits_nothing_else(kv: str, broken: Integers, claimed: tuple[int, int]) -> None:
    with pytest.raises(AssertionError):
        judge(kv, broken, claimed)
