"""Rotary position embedding and its long-context variants.

The angle of pair i at position t is ``t * inv_freq[i]``: a function of the position alone, for
every variant, because cached keys keep the rotation that they were written with. "Dynamic NTK"
grows its base with the current length, which would make a key's rotation depend on when it was
computed; here its base is that of the engine's longest context, for all positions (up to the
model's trained length the two are the same).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvant.models.config import RopeConfig

__all__ = ["RopeTables", "attention_factor", "inverse_frequencies"]


def _base_frequencies(theta: float, head_dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _dynamic(rope: RopeConfig, head_dim: int, trained: int, longest: int) -> Tensor:
    if longest <= trained:
        return _base_frequencies(rope.theta, head_dim)
    grown = rope.factor * longest / trained - (rope.factor - 1)
    return _base_frequencies(rope.theta * grown ** (head_dim / (head_dim - 2)), head_dim)


def _llama3(rope: RopeConfig, head_dim: int, trained: int) -> Tensor:
    """Llama 3.1: low frequencies are divided by the factor, high ones kept, a ramp between."""
    inv_freq = _base_frequencies(rope.theta, head_dim)
    turns = trained * inv_freq / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / rope.factor)


def _yarn(rope: RopeConfig, head_dim: int, trained: int) -> Tensor:
    """YaRN (arXiv 2309.00071): interpolate slow dimensions, keep fast ones."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    inv_freq = _base_frequencies(rope.theta, head_dim)
    return inv_freq * keep + inv_freq / rope.factor * (1 - keep)


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, *, max_positions: int, longest: int
) -> Tensor:
    """Angle per position of each pair of dimensions, float32 ``[head_dim / 2]``.

    Args:
        rope: the model's embedding.
        head_dim: dimensions of a head.
        max_positions: the model's context length, the trained one unless ``rope`` names another.
        longest: the longest context that the engine will serve.
    """
    trained = rope.original_max_positions or max_positions
    if rope.kind == "default":
        inv_freq = _base_frequencies(rope.theta, head_dim)
    elif rope.kind == "linear":
        inv_freq = _base_frequencies(rope.theta, head_dim) / rope.factor
    elif rope.kind == "dynamic":
        inv_freq = _dynamic(rope, head_dim, trained, longest)
    elif rope.kind == "llama3":
        inv_freq = _llama3(rope, head_dim, trained)
    else:
        inv_freq = _yarn(rope, head_dim, trained)
    if rope.freq_factors:
        inv_freq = inv_freq / torch.tensor(rope.freq_factors, dtype=torch.float32)
    return inv_freq


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1 but for YaRN, which sharpens attention."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


class RopeTables:
    """cos and sin by position, each computed once.

    Args:
        inv_freq: ``[D / 2]``.
        factor: see :func:`attention_factor`.
    """

    def __init__(self, inv_freq: Tensor, factor: float) -> None:
        self._inv_freq, self._factor = inv_freq, factor
        self._cos = self._sin = np.empty((0, 1, len(inv_freq)), np.float32)

    def at(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """cos and sin ``[T, 1, D / 2]`` at ``positions [T]``."""
        needed = int(positions.max()) + 1 if len(positions) else 0
        if needed > len(self._cos):
            every = torch.arange(max(needed, 2 * len(self._cos)))
            angles = (every.float()[:, None] * self._inv_freq)[:, None]
            self._cos = (angles.cos() * self._factor).numpy()
            self._sin = (angles.sin() * self._factor).numpy()
        return torch.from_numpy(self._cos[positions]), torch.from_numpy(self._sin[positions])
