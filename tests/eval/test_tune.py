"""Tuning: the best formats for a budget, by estimates that are what a format costs alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvant.config import EngineConfig
from kvant.engine.load import open_model
from kvant.errors import ConfigError
from kvant.eval.runner import CONTEXT, Runner
from kvant.eval.tune import Sensitivity, choose, measure, num_tokens, tune
from kvant.formats import K_CANDIDATES, V_CANDIDATES, KVShape, KVSpec, guarded

SHAPE = KVShape(num_layers=2, num_kv_heads=1, head_dim=64)
EXACT = KVSpec.parse("f32")


def _sensitivity(weights: np.ndarray, layers: int) -> Sensitivity:  # type: ignore[type-arg]
    """Four times less for each bit more, times a weight for each side and layer."""

    def side(index: int) -> dict:  # type: ignore[type-arg]
        candidates = (K_CANDIDATES, V_CANDIDATES)[index]
        return {fmt: weights[index] * 4.0**-fmt.bits for fmt in candidates}  # type: ignore[attr-defined]

    assert weights.shape == (2, layers)
    return side(0), side(1)


def _bits(pairs: list[tuple]) -> float:  # type: ignore[type-arg]
    layers = tuple((n, *pair) for n, pair in enumerate(pairs))
    return guarded(*pairs[0], layers).bits_per_element(SHAPE, CONTEXT)


@pytest.mark.parametrize("budget", (3.3, 4.0, 4.7, 5.5, 6.5, 9.0))
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_close_to_the_best_of_all(seed: int, budget: float) -> None:
    """Against every combination of two layers: never over the budget, and where the steps do not
    fit exactly, no worse than the best that half a bit less could buy."""
    weights = np.exp(np.random.default_rng(seed).normal(0, 2, (2, 2)))
    sensitivity = _sensitivity(weights, 2)
    pairs, expected = choose(sensitivity, SHAPE, budget)
    assert _bits(pairs) <= budget
    each = list(itertools.product(K_CANDIDATES, V_CANDIDATES))
    all_costs = [
        (
            sum(sensitivity[0][k][n] + sensitivity[1][v][n] for n, (k, v) in enumerate(combined)),
            _bits(list(combined)),
        )
        for combined in itertools.product(each, each)
    ]
    cost = sum(sensitivity[0][k][n] + sensitivity[1][v][n] for n, (k, v) in enumerate(pairs))
    assert expected == pytest.approx(cost)
    best = min(cost for cost, bits in all_costs if bits <= budget)
    tighter = [cost for cost, bits in all_costs if bits <= budget - 0.5]
    assert best * (1 - 1e-9) <= expected <= min([*tighter, np.inf]) * (1 + 1e-9)


def test_bits_go_where_they_pay() -> None:
    pairs, _ = choose(_sensitivity(np.array([[100.0, 1.0], [1.0, 1.0]]), 2), SHAPE, 4.5)
    bits = lambda fmt: fmt.bits_per_element(64)  # noqa: E731
    assert bits(pairs[0][0]) > bits(pairs[1][0])


@pytest.fixture
def runner(tiny: str) -> Runner:
    config = EngineConfig(kv="f32", dtype="float32")
    opened = open_model(tiny, config)
    return Runner(opened, opened.weights(config), config, lambda _: None)


def test_estimates_are_what_a_format_costs_alone(runner: Runner) -> None:
    """The coarsest candidate is measured, the others scale with their noise: within a factor of
    two of measuring them too, four bits further down."""
    ids = [int(n) for n in np.random.default_rng(0).integers(0, 200, 512)]
    reference = runner.room(len(ids))
    runner.reference(EXACT, ids, reference)
    found = measure(runner, EXACT, ids, reference)
    layers = runner.opened.config.num_layers
    for side, fmt in ((0, K_CANDIDATES[1]), (1, V_CANDIDATES[1])):
        for layer in range(layers):
            pair = [EXACT.k, EXACT.v]
            pair[side] = fmt
            others = tuple((n, EXACT.k, EXACT.v) for n in range(layers) if n != layer)
            spec = guarded(pair[0], pair[1], others)
            measured = runner.compare(spec, ids, reference)[0].kld.mean()
            assert found[side][fmt][layer] == pytest.approx(measured, rel=0.6)


def test_a_policy_is_a_spec_within_its_budget_that_keeps_its_promise(runner: Runner) -> None:
    ids = [int(n) for n in np.random.default_rng(1).integers(0, 200, 512)]
    ticks: list[int] = []
    counted = Runner(runner.opened, runner.weights, runner.config, ticks.append)
    policy = tune(counted, EXACT, [ids], 5.5)
    shape = runner.opened.config.kv_shape
    spec = KVSpec.parse(policy.kv)
    assert policy.bits_per_element == spec.bits_per_element(shape, CONTEXT) <= 5.5
    assert policy.kld is not None and policy.expected_kld is not None
    assert policy.expected_kld / 4 < policy.kld < 4 * policy.expected_kld
    assert sum(ticks) <= num_tokens(shape, [ids])


@pytest.mark.parametrize(("budget", "length"), ((2.0, 512), (float("nan"), 512), (5.0, 255)))
def test_what_cannot_be_tuned_is_refused(runner: Runner, budget: float, length: int) -> None:
    with pytest.raises(ConfigError, match=r"out of range|too short"):
        tune(runner, EXACT, [[1] * length], budget)
