"""Formats for each layer that lose least for a budget of bits.

The KL divergence that quantization causes is, while it is small, close to a sum over layers and
sides (K and V), each term proportional to the power of its quantization noise. So each layer and
side is measured alone once, in its coarsest candidate with all others exact; the other candidates
follow from signal to noise ratios, which one run per candidate gives for all layers. Starting
from the coarsest formats, the change that saves most divergence per bit is made until the budget
is used up. At last the choice is measured as a whole, beside the best uniform preset. (Searching by
layer and side: KVTuner, arXiv 2502.04420; the noise model stands in for its search.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvant.errors import ConfigError
from kvant.eval.metrics import number
from kvant.eval.runner import CONTEXT, Runner
from kvant.formats import (
    K_CANDIDATES,
    PRESETS,
    V_CANDIDATES,
    KVFormat,
    KVShape,
    KVSpec,
    guarded,
)

__all__ = ["Policy", "Sensitivity", "check_tuning", "choose", "measure", "num_tokens", "tune"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Pair = tuple[KVFormat, KVFormat]

_SIDES = (K_CANDIDATES, V_CANDIDATES)  # from coarse to fine
_SHORTEST = 256  # tokens
_MOST_BITS = 16
_BROKEN = 1e6  # nats: what a format that gives NaN is taken to cost
_NOISE_RUNS = max(map(len, _SIDES))

Sensitivity = tuple[Mapping[KVFormat, F64], Mapping[KVFormat, F64]]
"""Estimated KL divergence, nats: of K and of V, by format ``[layers]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What tuning found. ``kv`` is the spec; ``kld`` is measured, ``expected_kld`` is the sum of
    the estimates. ``uniform_kv`` is the preset of most bits within the budget, if there is one,
    and ``uniform_kld`` what it cost on the same windows."""

    kv: str
    bits_per_element: float
    kld: float | None
    expected_kld: float | None
    uniform_kv: str | None = None
    uniform_bits_per_element: float | None = None
    uniform_kld: float | None = None


def num_tokens(shape: KVShape, windows: Sequence[Sequence[int]]) -> int:
    """Tokens that :func:`tune` computes at most."""
    return (3 + _NOISE_RUNS + 2 * shape.num_layers) * sum(map(len, windows))


def check_tuning(shape: KVShape, windows: Sequence[Sequence[int]], budget_bits: float) -> None:
    """Raise ConfigError if not even the coarsest formats fit the budget, or if a window has too
    few groups that are neither the first nor recent."""
    for ids in windows:
        if len(ids) < _SHORTEST:
            raise ConfigError(
                f"a window of {len(ids)} tokens is too short to tune on; give at least "
                f"{_SHORTEST} with ctx"
            )
    least = _bits(_assemble(_coarsest(shape)), shape)
    if not least <= budget_bits <= _MOST_BITS:
        raise ConfigError(
            f"a budget of {budget_bits} bits per element is out of range: give at least what the "
            f"coarsest formats take for this model, {least:.2f}, and at most {_MOST_BITS}"
        )


def tune(
    run: Runner, baseline: KVSpec, windows: Sequence[Sequence[int]], budget_bits: float
) -> Policy:
    """Choose formats for each layer.

    Args:
        run: runs the model.
        baseline: the exact format.
        windows: token ids of the texts to measure on.
        budget_bits: most bits per element, all bytes of a sequence of 4096 tokens.

    Raises:
        ConfigError: the budget or a window is too small.
    """
    shape = run.opened.config.kv_shape
    check_tuning(shape, windows, budget_bits)
    if baseline.recent is not None or baseline.layers:
        raise ConfigError(f'the baseline "{baseline}" must be one exact format for all, as f32')
    ends = np.cumsum([len(ids) for ids in windows])
    references = np.split(run.room(ends[-1]), ends[:-1])
    share = np.array([len(ids) for ids in windows]) / sum(map(len, windows))
    found = []
    for ids, reference in zip(windows, references, strict=True):
        run.reference(baseline, ids, reference)
        found.append(measure(run, baseline, ids, reference))
    sensitivity = tuple(
        {fmt: np.tensordot(share, [each[side][fmt] for each in found], 1) for fmt in formats}
        for side, formats in enumerate(_SIDES)
    )
    pairs, expected = choose((sensitivity[0], sensitivity[1]), shape, budget_bits)
    spec = _assemble(pairs)

    def cost(spec: KVSpec) -> float | None:
        each = zip(windows, references, strict=True)
        klds = [run.compare(spec, ids, reference)[0].kld.mean() for ids, reference in each]
        return number(np.dot(share, klds))

    policy = Policy(
        kv=str(spec),
        bits_per_element=_bits(spec, shape),
        kld=cost(spec),
        expected_kld=number(expected),
    )
    presets = [
        preset for preset in map(KVSpec.parse, PRESETS) if _bits(preset, shape) <= budget_bits
    ]
    if presets:
        uniform = max(presets, key=lambda preset: _bits(preset, shape))
        policy = replace(
            policy,
            uniform_kv=uniform.label,
            uniform_bits_per_element=_bits(uniform, shape),
            uniform_kld=cost(uniform),
        )
    return policy


def measure(run: Runner, exact: KVSpec, ids: Sequence[int], reference: F32) -> Sensitivity:
    """Estimate what each candidate costs in each layer, on one window whose exact logits are
    ``reference [ctx, V]``."""
    num_layers = run.opened.config.num_layers
    noise: list[dict[KVFormat, F64]] = [{}, {}]
    for index in range(_NOISE_RUNS):
        pair = [formats[min(index, len(formats) - 1)] for formats in _SIDES]
        sqnr_db = run.compare(guarded(pair[0], pair[1]), ids, reference)[1]
        for side, fmt in enumerate(pair):
            noise[side][fmt] = np.nan_to_num(10 ** (-sqnr_db[side] / 10))
    estimates: list[dict[KVFormat, F64]] = []
    for side, formats in enumerate(_SIDES):
        pair = [exact.k, exact.v]
        pair[side] = coarsest = formats[0]
        alone = np.empty(num_layers)
        for layer in range(num_layers):
            others = tuple((n, exact.k, exact.v) for n in range(num_layers) if n != layer)
            spec = guarded(pair[0], pair[1], others)
            kld = run.compare(spec, ids, reference)[0].kld.mean()
            alone[layer] = kld if np.isfinite(kld) else _BROKEN
        least = np.maximum(noise[side][coarsest], np.finfo(float).tiny)
        estimates.append({fmt: alone * noise[side][fmt] / least for fmt in formats})
    return estimates[0], estimates[1]


def choose(
    sensitivity: Sensitivity, shape: KVShape, budget_bits: float
) -> tuple[list[Pair], float]:
    """The formats of each layer within the budget, and the estimated KL divergence in nats."""
    pairs = _coarsest(shape)

    def cost(layer: int, side: int, fmt: KVFormat) -> float:
        return float(sensitivity[side][fmt][layer])

    def changes() -> list[tuple[float, int, Pair]]:
        """What each finer format of each layer saves per bit, best first."""
        out = []
        for layer, pair in enumerate(pairs):
            for side, formats in enumerate(_SIDES):
                for fmt in formats[formats.index(pair[side]) + 1 :]:
                    saved = cost(layer, side, pair[side]) - cost(layer, side, fmt)
                    bits = [each.bits_per_element(shape.head_dim) for each in (fmt, pair[side])]
                    finer = (fmt, pair[1]) if side == 0 else (pair[0], fmt)
                    out.append((saved / max(bits[0] - bits[1], 1e-9), layer, finer))
        return sorted(out, key=lambda each: -each[0])

    changed = True
    while changed:
        changed = False
        for _, layer, finer in changes():
            trial = [finer if n == layer else pair for n, pair in enumerate(pairs)]
            if _bits(_assemble(trial), shape) <= budget_bits:
                pairs, changed = trial, True
                break
    total = sum(cost(n, side, pair[side]) for n, pair in enumerate(pairs) for side in (0, 1))
    return pairs, total


def _coarsest(shape: KVShape) -> list[Pair]:
    return [(K_CANDIDATES[0], V_CANDIDATES[0])] * shape.num_layers


def _assemble(pairs: Sequence[Pair]) -> KVSpec:
    """The spec with these formats by layer: the most frequent pair, and the layers that differ."""
    (k, v), _ = Counter(pairs).most_common(1)[0]
    return guarded(k, v, tuple((n, *pair) for n, pair in enumerate(pairs) if pair != (k, v)))


def _bits(spec: KVSpec, shape: KVShape) -> float:
    return spec.bits_per_element(shape, CONTEXT)
