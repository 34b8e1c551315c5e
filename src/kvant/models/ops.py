"""The small operations between a decoder's matrix products: what they are, in plain torch.

A row's result never depends on the rows beside it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional

__all__ = ["Ops", "TorchOps"]


class Ops(Protocol):
    """Tensors are [rows, ...] with a dense last dimension; results are dense."""

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        """``x / sqrt(mean(x^2) + eps) * weight``, of ``x [T, hidden]``, in its type."""
        ...

    def rope(self, x: Any, cos: Any, sin: Any) -> Any:
        """Rotate pairs (d, d + D/2) of ``x [T, H, D]`` by the angles of ``cos, sin [T, 1, D/2]``
        (float32, dense); the result is float32."""
        ...

    def silu_mul(self, gate_up: Any) -> Any:
        """``silu(gate) * up`` of ``[T, 2 * I]``, gate first; ``[T, I]`` in its type."""
        ...


class TorchOps:
    """See :class:`Ops`."""

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return functional.rms_norm(x, weight.shape, weight, eps)

    def rope(self, x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def silu_mul(self, gate_up: Any) -> Any:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up
