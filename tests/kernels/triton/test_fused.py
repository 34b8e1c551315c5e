"""Small operations between linear layers against float64, and that rows stay alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from kvant.kernels.triton.fused import add_rms_norm, silu_mul
from kvant.kernels.triton.pool import find_device

DEVICE = find_device()
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = tuple(ROUNDING)


def bound(dtype: torch.dtype) -> float:
    """Of the relative error: of float32 arithmetic, a few of its own steps, rounded once."""
    return ROUNDING[dtype] + 16 * ROUNDING[torch.float32]


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 100, 576])
def test_norm_of_a_sum(dtype: torch.dtype, hidden: int) -> None:
    x, residual = (values(3, hidden, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = values(hidden, dtype=torch.float32, seed=2)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    exact_sum = x.double() + residual.double()
    torch.testing.assert_close(total.double(), exact_sum, rtol=ROUNDING[dtype], atol=0)
    exact = functional.rms_norm(total.double(), (hidden,), weight.double(), 1e-5)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed.double(), exact, rtol=bound(dtype), atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_alone(dtype: torch.dtype) -> None:
    x, weight = values(2, 96, dtype=dtype), values(96, dtype=torch.float32)
    normed, total = add_rms_norm(x, None, weight, 1e-6)
    assert total is x
    with_zeros, same = add_rms_norm(x, torch.zeros_like(x), weight, 1e-6)
    assert torch.equal(normed, with_zeros) and torch.equal(same, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [96, 1100])
def test_silu_mul(dtype: torch.dtype, inner: int) -> None:
    rows = values(3, 2 * inner, dtype=dtype) * 4
    gate, up = rows.double().chunk(2, dim=1)
    found = silu_mul(rows)
    assert (found.dtype, found.shape) == (dtype, (3, inner))
    exact = functional.silu(gate) * up
    torch.testing.assert_close(found.double(), exact, rtol=bound(dtype), atol=1e-7)


def test_silu_of_large_gates() -> None:
    """exp of what is left of a float's range is infinite, and no NaN comes of it."""
    rows = torch.tensor([[-6e4, -200.0, 200.0, 6e4, 1, 1, 1, 1]], device=DEVICE)
    assert silu_mul(rows).tolist() == [[0, 0, 200, 6e4]]


def test_rows_are_alone() -> None:
    """In any number, whatever is in other rows."""
    x, residual = (values(9, 100, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    weight = values(100, dtype=torch.float32)
    x[4] = float("nan")
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    gated = silu_mul(x)
    for part in (slice(0, 1), slice(2, 4), slice(5, 9)):
        some = add_rms_norm(x[part], residual[part], weight, 1e-5)
        assert torch.equal(some[0], normed[part]) and torch.equal(some[1], total[part])
        assert torch.equal(silu_mul(x[part]), gated[part])
    assert normed[4].isnan().all() and normed[5:].isfinite().all()


def test_no_rows() -> None:
    none = torch.empty(0, 64, device=DEVICE)
    assert add_rms_norm(none, none, torch.ones(64, device=DEVICE), 1e-5)[0].shape == (0, 64)
    assert silu_mul(none).shape == (0, 32)
