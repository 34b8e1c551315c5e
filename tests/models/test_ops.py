"""Rotary embedding, native and in torch, against float64 (test_linear.py has linear layers)."""

from __future__ import annotations

import pytest
import torch

from kvant.kernels.cpu import available_isas
from kvant.models.cpu import CPUOps
from kvant.models.ops import Ops, TorchOps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["torch", *available_isas()])
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ops:
    if request.param == "torch":
        return TorchOps()
    monkeypatch.setenv("KVANT_ISA", str(request.param))
    return CPUOps(2)


def tables(rows: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of some angles."""
    positions = torch.arange(1000.0, 1000 + rows).view(-1, 1, 1)
    angles = positions * 10000.0 ** -torch.linspace(0, 1, head_dim // 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
def test_rope(ops: Ops, dtype: torch.dtype, head_dim: int) -> None:
    qkv = torch.randn(37, 5, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    x, (cos, sin) = qkv[:, 1:4], tables(37, head_dim)
    first, second = x.double().chunk(2, dim=-1)
    exact = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    found = ops.rope(x, cos, sin)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


def test_rows_are_rotated_alone(ops: Ops) -> None:
    """In any number, by one thread or two, whatever is in other rows."""
    x, (cos, sin) = (
        torch.randn(700, 5, 64, generator=torch.Generator().manual_seed(0)),
        tables(700, 64),
    )
    whole = ops.rope(x, cos, sin)
    for start, end in ((0, 1), (5, 23), (0, 16), (100, 700), (699, 700)):
        part = slice(start, end)
        assert torch.equal(ops.rope(x[part], cos[part], sin[part]), whole[part])
    x[7] = float("nan")
    found = ops.rope(x, cos, sin)
    assert found[7].isnan().all()
    others = torch.arange(700) != 7
    assert torch.equal(found[others], whole[others])
    assert len(ops.rope(x[:0], cos[:0], sin[:0])) == 0
