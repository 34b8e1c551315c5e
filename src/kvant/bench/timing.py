"""How long calls take, and what the machine could do at most."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "Call",
    "Ceilings",
    "Samples",
    "Times",
    "interleaved",
    "percent",
    "seconds",
]

Call = Callable[[], Any]
Samples = NDArray[np.float64]
"""A value for every repeat."""
Times = Mapping[str, Samples]
"""Seconds by the name of what was timed."""

_MIN_SAMPLE = 0.01
"""Seconds that a sample takes at least."""
_READ_BYTES = 2**28
"""Read for the ceiling of bandwidth: more than any cache holds."""
_SIDE = 2048
"""Of the square matrices that are multiplied for the ceilings of arithmetic."""


def seconds(call: Call, passes: int = 1) -> float:
    """How long a call takes, mean of ``passes``."""
    start = time.perf_counter()
    for _ in range(passes):
        call()
    return (time.perf_counter() - start) / passes


def interleaved(calls: Mapping[str, Call], repeats: int) -> dict[str, Samples]:
    """Seconds of each call, ``repeats`` samples taken in turns, after a warm-up."""
    passes = {name: math.ceil(_MIN_SAMPLE / seconds(call)) for name, call in calls.items()}
    samples = [
        [seconds(call, passes[name]) for name, call in calls.items()] for _ in range(repeats)
    ]
    return dict(zip(calls, np.array(samples).T, strict=True))


def percent(rates: Samples, ceiling: Samples) -> float:
    """The share of a ceiling that is reached: the median of ratios."""
    return round(100 * float(np.median(rates / ceiling)), 1)


class Ceilings:
    """What the machine could do at the moment: bytes read from memory per second, and operations
    (two for a product and its sum) per second by type of number.

    A shared machine changes from second to second, so its ceilings are timed in turns with what is
    compared with them: ``interleaved(calls | ceilings.calls, repeats)``.

    Args:
        threads: that read together.
        arithmetic: whether products are timed too.
    """

    def __init__(self, threads: int, *, arithmetic: bool = False) -> None:
        self._reading = _reading(threads)
        self._products = _products() if arithmetic else {}
        self.calls = self._reading | self._products

    def bandwidth(self, times: Times) -> Samples:
        """Bytes per second, in each repeat those of the fastest way to read."""
        best: Samples = np.min([times[way] for way in self._reading], axis=0)
        return _READ_BYTES / best

    def arithmetic(self, times: Times, numbers: str) -> Samples:
        """Operations per second of a product of large matrices of ``bfloat16`` or ``codes`` of 8
        bits."""
        return 2 * _SIDE**3 / times[f"product of {numbers}"]


def _reading(threads: int) -> dict[str, Call]:
    """All threads together read memory from start to end."""
    floats = torch.ones(_READ_BYTES // 4)
    parts = np.array_split(floats.numpy().view(np.int64), threads)
    pool = ThreadPoolExecutor(threads)
    return {
        "torch sum": floats.sum,
        "torch amax": floats.amax,
        "numpy sum": lambda: list(pool.map(np.sum, parts)),
        "numpy max": lambda: list(pool.map(np.max, parts)),
    }


def _products() -> dict[str, Call]:
    codes = torch.randint(-127, 128, (_SIDE, _SIDE), dtype=torch.int8)
    halves = torch.randn(_SIDE, _SIDE).bfloat16()
    return {
        "product of bfloat16": lambda: halves @ halves.T,
        "product of codes": lambda: torch._int_mm(codes, codes.T),
    }
