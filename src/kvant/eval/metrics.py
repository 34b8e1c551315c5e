"""How far one distribution, sequence or signal is from another. float64 throughout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Comparison", "block_error", "first_difference", "number", "sqnr_db"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_ROWS = 32  # positions compared at a time: temporaries of _ROWS * V * 8 bytes
_BLOCK = 256  # positions whose mean is one sample of the standard error


class Comparison:
    """Logits of a window against those of the baseline, position by position; a
    :class:`kvant.request.LogitsSink`.

    kld       float64 [ctx], nats: KL divergence KL(baseline || logits) of the next token
    same_top  bool [ctx]: whether both have the same most likely token; not if one is NaN
    nll       float64 [ctx - 1], nats: negative log-likelihood of the token that follows
    """

    def __init__(self, ids: Sequence[int], reference: F32) -> None:
        """``reference`` are the baseline's logits ``[ctx, V]`` of the window ``ids [ctx]``."""
        self._ids = np.asarray(ids)
        self._reference = reference
        self.kld: F64 = np.full(len(ids), np.nan)
        self.same_top = np.zeros(len(ids), np.bool_)
        self.nll: F64 = np.full(len(ids) - 1, np.nan)

    def __call__(self, start: int, logits: F32) -> None:
        """Take in the logits ``[n, V]`` of positions ``[start, start + n)``."""
        for first in range(0, len(logits), _ROWS):
            self._add(start + first, logits[first : first + _ROWS])

    def _add(self, start: int, logits: F32) -> None:
        rows = slice(start, start + len(logits))
        expected, found = _log_softmax(self._reference[rows]), _log_softmax(logits)
        p = np.exp(expected)
        with np.errstate(invalid="ignore"):  # infinite logits: 0 * (inf - inf)
            self.kld[rows] = (p * (expected - found)).sum(axis=-1, where=p != 0)
        same = expected.argmax(axis=-1) == found.argmax(axis=-1)
        self.same_top[rows] = same & ~np.isnan(self.kld[rows])
        following = self._ids[start + 1 : rows.stop + 1]
        self.nll[rows] = -found[np.arange(len(following)), following]


def _log_softmax(logits: F32) -> F64:
    with np.errstate(invalid="ignore"):
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        out: F64 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


def block_error(windows: Sequence[F64]) -> float:
    """Standard error of the mean of all values, from the spread of the means of blocks of about
    256 neighbours (neighbours depend on each other); NaN with fewer than two blocks."""
    blocks = [b for w in windows for b in np.array_split(w, max(1, len(w) // _BLOCK))]
    means = [float(block.mean()) for block in blocks]
    return float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first index at which two sequences differ (one may end there); None if equal."""
    pairs = enumerate(zip(one, other, strict=False))
    shorter, longer = sorted((len(one), len(other)))
    return next((i for i, (a, b) in pairs if a != b), None if shorter == longer else shorter)


def sqnr_db(signal: F64, noise: F64) -> F64:
    """Signal to quantization noise ratio of sums of squares, in dB; infinite without noise."""
    with np.errstate(divide="ignore", invalid="ignore"):
        out: F64 = 10 * np.log10(signal / noise)
    return out


def number(value: Any, digits: int = 6) -> float | None:
    """A figure for JSON, rounded to significant digits; None for NaN and infinity, which JSON
    does not have."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
