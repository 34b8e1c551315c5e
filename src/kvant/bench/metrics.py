"""From time stamps to figures: the latencies of requests, their percentiles, memory."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvant.errors import ConfigError

__all__ = [
    "LATENCIES",
    "STATISTICS",
    "PeakMemory",
    "Timeline",
    "check_counts",
    "latencies",
    "median",
    "significant",
]

LATENCIES = ("ttft", "tpot", "itl", "e2e")
STATISTICS = ("mean", "median", "p90", "p95", "p99")


def check_counts(**counts: int | Iterable[int] | None) -> None:
    """Raise ConfigError if a count, or one of several, is below 1; None is none."""
    for name, value in counts.items():
        for each in (value,) if isinstance(value, int) else value or ():
            if each < 1:
                raise ConfigError(f"{name}={each} must be at least 1")


@dataclass(slots=True)
class Timeline:
    """When a request was submitted and when each of its tokens came, in seconds of one clock."""

    submitted: float
    arrivals: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.arrivals[0] - self.submitted

    @property
    def e2e(self) -> float:
        """Time to the last token."""
        return self.arrivals[-1] - self.submitted

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: one less than tokens."""
        return [
            later - sooner for sooner, later in zip(self.arrivals, self.arrivals[1:], strict=False)
        ]

    @property
    def tpot(self) -> list[float]:
        """Time per output token after the first: one value, none for a single token."""
        count = len(self.arrivals) - 1
        return [(self.arrivals[-1] - self.arrivals[0]) / count] if count else []


def latencies(timelines: Iterable[Timeline]) -> dict[str, float | None]:
    """``mean_ttft_ms``, ..., ``p99_e2e_ms``: every statistic of every latency over requests, of
    ``itl`` over tokens, in milliseconds; None where there is nothing to count."""
    lines = list(timelines)
    values = {
        "ttft": [line.ttft for line in lines],
        "tpot": [value for line in lines for value in line.tpot],
        "itl": [value for line in lines for value in line.itl],
        "e2e": [line.e2e for line in lines],
    }
    return {
        f"{statistic}_{name}_ms": value
        for name in LATENCIES
        for statistic, value in zip(STATISTICS, _statistics(values[name]), strict=True)
    }


def _statistics(seconds: Sequence[float]) -> list[float | None]:
    if not seconds:
        return [None] * len(STATISTICS)
    of = np.array(seconds) * 1e3
    return [float(of.mean()), *np.percentile(of, (50, 90, 95, 99)).tolist()]


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is there, in :func:`significant` digits; of counts one of them."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    counts = all(isinstance(value, int) for value in known)
    return significant((statistics.median_low if counts else statistics.median)(known))


def significant(value: float) -> float:
    """Five digits: what is measured here is not known better. Whole numbers stay."""
    return value if isinstance(value, int) else float(f"{value:.5g}")


class PeakMemory:
    """The most memory that the process holds from now on.

    Linux can be told to begin anew (5 to /proc/self/clear_refs); where it cannot, ``since`` is
    "start" and the figure that of the whole process.
    """

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.since = "run"
        except OSError:
            self.since = "start"

    def nbytes(self) -> int:
        """Resident bytes at their highest."""
        if self.since == "run":
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
