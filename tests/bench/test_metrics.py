from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvant.bench.metrics import PeakMemory, Timeline, check_counts, latencies, median, significant
from kvant.errors import ConfigError


def some_timelines() -> list[Timeline]:
    rng = np.random.default_rng(0)
    made = []
    for count in (1, 2, 9, 30, 31):
        start = rng.uniform(0, 5)
        made.append(Timeline(start, (start + rng.uniform(0.01, 1, count).cumsum()).tolist()))
    return made


def test_statistics_are_numpys() -> None:
    lines = some_timelines()
    ms = {
        "ttft": [1e3 * (line.arrivals[0] - line.submitted) for line in lines],
        "e2e": [1e3 * (line.arrivals[-1] - line.submitted) for line in lines],
        "itl": np.concatenate([1e3 * np.diff(line.arrivals) for line in lines]),
        "tpot": [1e3 * np.diff(line.arrivals).mean() for line in lines if len(line.arrivals) > 1],
    }
    found = latencies(lines)
    assert len(found) == 20
    for name, values in ms.items():
        assert found[f"mean_{name}_ms"] == pytest.approx(np.mean(values))
        assert found[f"median_{name}_ms"] == pytest.approx(np.median(values))
        for percent in (90, 95, 99):
            expected = np.percentile(values, percent)
            assert found[f"p{percent}_{name}_ms"] == pytest.approx(expected)


def test_a_single_token_has_no_second() -> None:
    found = latencies([Timeline(1.0, [1.5])])
    assert found["median_ttft_ms"] == found["p99_e2e_ms"] == 500
    assert found["mean_tpot_ms"] is found["p99_itl_ms"] is None


def test_medians() -> None:
    assert median([3, 1, 2]) == 2 and median([1, 2]) == 1  # of counts one of them
    assert median([1.0, 2.0]) == 1.5 and median([None, 3.0]) == 3 and median([None]) is None
    assert significant(123456) == 123456 and significant(1.23456789) == 1.2346


def test_counts() -> None:
    check_counts(a=1, b=(1, 2), c=None)
    with pytest.raises(ConfigError, match="b=0 must be at least 1"):
        check_counts(b=(3, 0))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_the_peak_of_memory_begins_anew() -> None:
    many = np.ones(2**27, np.uint8)
    first = PeakMemory().nbytes()
    del many
    second = PeakMemory()
    assert second.since == "run" and second.nbytes() < first - 2**26


def test_where_the_peak_cannot_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    peak = PeakMemory()
    assert peak.since == "start" and peak.nbytes() > 2**20
