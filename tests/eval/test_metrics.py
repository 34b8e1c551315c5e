from __future__ import annotations

import math

import numpy as np
import pytest

from kvant.eval.metrics import Comparison, block_error, first_difference, number, sqnr_db

CTX, VOCAB = 70, 33
IDS = np.random.default_rng(0).integers(0, VOCAB, CTX).tolist()


def logits(seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((CTX, VOCAB)) * 9).astype(np.float32)


def softmax(row: np.ndarray) -> list[float]:
    exps = [math.exp(x) for x in row.tolist()]
    return [x / math.fsum(exps) for x in exps]


@pytest.mark.parametrize("chunk", (1, 17, 32, CTX))
def test_against_plain_python(chunk: int) -> None:
    base, other = logits(1), logits(2)
    other[::3] = base[::3] + np.float32(0.01) * other[::3]
    found = Comparison(IDS, base)
    for start in range(0, CTX, chunk):
        found(start, other[start : start + chunk])
    for t in range(CTX):
        p, q = softmax(base[t]), softmax(other[t])
        kld = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found.kld[t] == pytest.approx(kld, rel=1e-9, abs=1e-14)
        assert found.same_top[t] == (p.index(max(p)) == q.index(max(q)))
        if t + 1 < CTX:
            assert found.nll[t] == pytest.approx(-math.log(q[IDS[t + 1]]), rel=1e-12)
    assert 0 < found.same_top.sum() < CTX


def test_the_baseline_against_itself_is_exactly_nothing() -> None:
    found = Comparison(IDS, logits(1))
    found(0, logits(1))
    assert not found.kld.any() and found.same_top.all()


def test_a_shift_of_all_logits_changes_nothing() -> None:
    base = np.round(logits(1))
    found = Comparison(IDS, base)
    found(0, base + np.float32(8))
    assert not found.kld.any() and found.same_top.all()


def test_impossible_tokens_and_logits_that_are_not_finite() -> None:
    base, other = logits(1), logits(2)
    base[:, 3] = other[:, 3] = -np.inf
    other[5, 7] = np.nan
    found = Comparison(IDS, base)
    found(0, other)
    assert np.isfinite(np.delete(found.kld, 5)).all() and np.isnan(found.kld[5])
    other[6, 8] = -np.inf  # the format rules out what the baseline does not
    found(0, other)
    assert found.kld[6] == np.inf


def test_a_position_that_never_came_is_no_number() -> None:
    found = Comparison(IDS, logits(1))
    found(0, logits(1)[:-1])
    assert np.isnan(found.kld[-1]) and not np.isnan(found.kld[:-1]).any()


def test_standard_error() -> None:
    rng = np.random.default_rng(4)
    means = rng.standard_normal(40)
    windows = [np.repeat(means[:20], 256), np.repeat(means[20:], 256)]
    assert block_error(windows) == pytest.approx(means.std(ddof=1) / 40**0.5)
    # Of independent values it is the usual one.
    values = rng.standard_normal(256 * 400)
    assert block_error([values]) == pytest.approx(1 / len(values) ** 0.5, rel=0.15)
    assert math.isnan(block_error([values[:300]]))
    assert block_error([values[:100], values[100:200]]) > 0


@pytest.mark.parametrize(
    ("one", "other", "index"),
    (
        ([1, 2, 3], [1, 2, 3], None),
        ([], [], None),
        ([1, 2, 3], [0, 2, 3], 0),
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1], [1, 5, 6], 1),
        ([1, 2], [2], 0),
    ),
)
def test_where_sequences_part(one: list[int], other: list[int], index: int | None) -> None:
    assert first_difference(one, other) == index == first_difference(other, one)


def test_signal_to_noise() -> None:
    found = sqnr_db(np.array([100.0, 1.0, 5.0, 0.0]), np.array([1.0, 100.0, 0.0, 0.0]))
    assert found[:3].tolist() == [20.0, -20.0, np.inf] and np.isnan(found[3])


def test_numbers_that_json_has() -> None:
    assert [number(x) for x in (math.nan, math.inf, -math.inf)] == [None] * 3
    assert number(np.float64(1.23456789e-7)) == 1.23457e-7
    assert number(0) == 0 and number(21.4567, 4) == 21.46
