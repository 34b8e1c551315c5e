"""Means, standard errors and paired tests, against their definitions."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest

from kvant.eval.tasks.results import compare, mcnemar, score


def test_a_share_and_its_error() -> None:
    values = [1.0] * 30 + [0.0] * 70
    found = score("acc", values)
    assert found.value == pytest.approx(0.3)
    assert found.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_a_perplexity_and_its_error() -> None:
    rng = np.random.default_rng(0)
    nats = -rng.gamma(4.0, 0.5, size=4000)
    found = score("perplexity", list(nats))
    assert found.value == pytest.approx(math.exp(-nats.mean()))
    draws = [math.exp(-rng.choice(nats, nats.size).mean()) for _ in range(2000)]
    assert found.stderr == pytest.approx(np.std(draws), rel=0.06)


def test_a_single_question_has_no_error() -> None:
    assert math.isnan(score("acc", [1.0]).stderr)
    assert score("acc", [1.0]).as_json() == {"value": 1.0, "stderr": None}


@pytest.mark.parametrize("gained", range(6))
@pytest.mark.parametrize("lost", range(6))
def test_mcnemar_counts_all_splits(gained: int, lost: int) -> None:
    """Against an enumeration of what a fair coin can do."""
    count = gained + lost
    sides = [sum(coins) for coins in itertools.product((0, 1), repeat=count)]
    as_uneven = [abs(2 * side - count) >= abs(gained - lost) for side in sides]
    assert mcnemar(gained, lost) == pytest.approx(sum(as_uneven) / len(sides))


def test_mcnemar_of_many() -> None:
    assert mcnemar(5000, 5000) == 1.0
    assert mcnemar(4800, 5200) == pytest.approx(math.erfc(399 / 100 / math.sqrt(2)), rel=0.01)
    assert mcnemar(0, 3000) == 0.0


def _row(kv: str, outcomes: str, task: str = "t") -> dict[str, Any]:
    return {"kv_spec": kv, "kv": kv, "task": task, "outcomes": outcomes}


def test_formats_are_compared_item_by_item() -> None:
    rng = random.Random(2)
    base, other = ("".join(rng.choices("01", k=500)) for _ in range(2))
    found = compare([_row("bf16", base), _row("x", other), _row("bf16", "01", "u")])
    (pair,) = found
    deltas = np.array([int(a) - int(b) for a, b in zip(other, base, strict=True)])
    assert (pair.kv, pair.baseline, pair.task) == ("x", "bf16", "t")
    assert pair.difference == pytest.approx(deltas.mean())
    assert pair.stderr == pytest.approx(deltas.std(ddof=1) / math.sqrt(500), rel=1e-5)
    assert (pair.gained, pair.lost) == ((deltas == 1).sum(), (deltas == -1).sum())
    assert pair.p_value == mcnemar(pair.gained, pair.lost)


def test_equal_answers_differ_in_nothing() -> None:
    (pair,) = compare([_row("a", "0110"), _row("b", "0110")])
    assert (pair.difference, pair.stderr, pair.p_value) == (0, 0, 1)
