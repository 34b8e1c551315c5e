"""The native small operations against plain torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvant.kernels.cpu import CPUOps, available_isas
from kvant.models.ops import TorchOps
from kvant.models.rope import rope_tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=available_isas())
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CPUOps:
    monkeypatch.setenv("KVANT_ISA", str(request.param))
    return CPUOps(2)


def _close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """One rounding to the type, and a few of float32 before it."""
    step = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=step, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (3, 8), (37, 100), (200, 64)])
def test_rms_norm(ops: CPUOps, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(shape[0], 2 * shape[1], generator=generator).to(dtype)
    weight = torch.randn(shape[1], generator=generator).to(dtype)
    for x in (wide[:, : shape[1]], wide[:, ::2]):
        exact = TorchOps().rms_norm(x.double(), weight.double(), 1e-5)
        _close(ops.rms_norm(x, weight, 1e-5), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
def test_rope(ops: CPUOps, dtype: torch.dtype, head_dim: int) -> None:
    qkv = torch.randn(37, 5, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    frequencies = 10000.0 ** -torch.linspace(0, 1, head_dim // 2)
    tables = rope_tables(torch.arange(1000, 1037), frequencies, 1.0)
    x = qkv[:, 1:4]
    exact = TorchOps().rope(x.float(), *tables).double()
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = (table.double() for table in tables)
    exact = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    found = ops.rope(x, *tables)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1536), (3, 4), (37, 50)])
def test_silu_mul(ops: CPUOps, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows, width = shape
    x = 5 * torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(0))
    x[0, :4] = torch.tensor([-1e4, 1e4, -90.0, 0.0])
    x = x.to(dtype)
    _close(ops.silu_mul(x), TorchOps().silu_mul(x.double()), dtype)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(ops: CPUOps, poison: float) -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    clean: Any = ops.rms_norm(x, torch.ones(64), 1e-5)
    x[7, 3] = poison
    found = ops.rms_norm(x, torch.ones(64), 1e-5)
    others = torch.arange(40) != 7
    assert torch.equal(found[others], clean[others])
    assert found[7].isnan().any()


def test_rows_do_not_depend_on_their_number(ops: CPUOps) -> None:
    x = torch.randn(70, 2 * 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    for compute in (ops.silu_mul, lambda part: ops.rms_norm(part, torch.ones(192), 1e-5)):
        whole = compute(x)
        for start, end in ((0, 1), (5, 23), (69, 70)):
            assert torch.equal(compute(x[start:end]), whole[start:end])
