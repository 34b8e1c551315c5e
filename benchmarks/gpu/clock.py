"""Time on a GPU, by CUDA events; without one, for smoke runs under Triton's interpreter, by the
host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kvant.kernels.triton import pool
from kvant.kernels.triton.pool import find_device
from kvant.models.graphs import CudaCapture

Call = Callable[[], Any]

FLUSH_BYTES = 2**28
"""More than the L2 cache of any GPU (H200: 60 MB, B200: 126 MB)."""


def on_gpu() -> bool:
    """Whether kernels run on a GPU, not in the interpreter."""
    return find_device().type == "cuda"


def synchronize() -> None:
    """Wait for all work."""
    if on_gpu():
        torch.cuda.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no room: a case to leave out, not a failure."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "refuses a KV cache" in text


@dataclass
class Deadline:
    """When to stop: ``budget`` seconds from now."""

    budget: float
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.start + self.budget - time.monotonic()

    def passed(self, needed: float = 0.0) -> bool:
        """Whether less than ``needed`` seconds are left."""
        return self.left <= needed


def captured(work: Call) -> Call:
    """``work`` as a CUDA graph, so that its time is that of its kernels and not of launching them;
    as it is without a GPU."""
    if on_gpu():
        return CudaCapture()(work)
    work()
    return work


class Stopwatch:
    """Times calls in turns; each sample begins with a cold L2 cache."""

    def __init__(self, *, flush: bool = True) -> None:
        self._flush = None
        if flush and on_gpu():
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def interleaved(self, calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
        """Seconds of each call, ``repeats`` samples taken in turns, after a warm-up."""
        for call in calls.values():
            call()
        synchronize()
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                samples[name].append(self._seconds(call))
        return samples

    def _seconds(self, call: Call) -> float:
        if not on_gpu():
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        if self._flush is not None:
            self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def median_ratio(over: list[float], under: list[float]) -> float:
    """The median of ratios of samples that were taken together."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def free_memory() -> int:
    """Bytes that the device has to give; 64 MiB in a smoke run."""
    return pool.free_memory(find_device()) if on_gpu() else 2**26
