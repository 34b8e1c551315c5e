"""Small operations between linear layers, each in one pass over its rows.

A row is the work of one program, or of as many as its length alone decides, so its result does not
depend on the rows beside it. Arithmetic is float32, rounded once.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["add_rms_norm", "silu_mul"]

_BLOCK = 1024  # elements of a program of silu_mul


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm of the rows of ``x + residual``, and that sum.

    Args:
        x: ``[T, hidden]``, dense.
        residual: the same, or None for zeros; the sum is then ``x`` itself.
        weight: float32 ``[hidden]``.
        eps: see :class:`kvant.models.ops.Norm`.

    Returns:
        ``(normed, sum)``, both of ``x``'s type. The sum is rounded to it before it is normalized.
    """
    rows, hidden = x.shape
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    _add_rms_norm[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        normed,
        total,
        hidden,
        eps,
        ADD=residual is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return normed, total


@triton.jit
def _add_rms_norm(
    x, residual, weight, normed, total, hidden, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.arange(0, BLOCK)
    there = column < hidden
    at = tl.program_id(0).to(tl.int64) * hidden + column
    value = tl.load(x + at, there, 0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(residual + at, there, 0.0)).to(value.dtype)
        tl.store(total + at, value, there)
    value = value.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 0) / hidden + eps)
    scaled = value * factor * tl.load(weight + column, there, 0.0)
    tl.store(normed + at, scaled.to(normed.dtype.element_ty), there)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up [T, inner]`` of dense rows ``[T, 2 inner]``, the gates first."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, inner))
    _silu_mul[(rows, triton.cdiv(inner, _BLOCK))](gate_up, out, inner, BLOCK=_BLOCK, num_warps=4)
    return out


@triton.jit
def _silu_mul(gate_up, out, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < inner
    gate = tl.load(gate_up + row * 2 * inner + column, there, 0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * inner + column, there, 0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # never infinite
    gated = gate * (tl.where(gate < 0, small, 1.0) / (1.0 + small)) * up
    tl.store(out + row * inner + column, gated.to(out.dtype.element_ty), there)
