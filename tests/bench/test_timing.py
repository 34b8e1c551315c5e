from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import kvant.bench.timing as module
from kvant.bench.timing import Ceilings, interleaved, percent


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MIN_SAMPLE", 1e-12)
    order: list[str] = []
    times = interleaved({name: partial(order.append, name) for name in "ab"}, 3)
    assert order == ["a", "b"] * 4  # once to warm up
    assert [len(times[name]) for name in "ab"] == [3, 3]


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READ_BYTES", 2**16)
    monkeypatch.setattr(module, "_SIDE", 32)
    ceilings = Ceilings(2, arithmetic=True)
    for call in ceilings.calls.values():
        call()
    assert len(Ceilings(1).calls) == 4 and len(ceilings.calls) == 6
    times = {name: np.array([4.0, 2.0]) for name in ceilings.calls}
    times["numpy max"] = np.array([1.0, 8.0])  # the fastest way in one of two repeats
    times["product of codes"] = np.array([0.5, 1.0])
    assert ceilings.bandwidth(times).tolist() == [2**16, 2**15]
    assert ceilings.arithmetic(times, "codes").tolist() == [4 * 32**3, 2 * 32**3]


def test_shares_are_medians_of_ratios() -> None:
    assert percent(np.array([1.0, 5.0, 90.0]), np.array([10.0, 10.0, 100.0])) == 50
