"""Kernel tests run on every backend that this installation has; triton has tests of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits

from kvant.kernels import BACKENDS
from kvant.kernels.cpu import available_isas

ONES = [name for name in BACKENDS if name not in ("null", "cpu", "triton")]
ISAS = [f"cpu-{isa}" for isa in available_isas()]


@pytest.fixture(params=[*ONES, *ISAS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend that computes; the native one with each instruction set in turn."""
    name, _, isa = str(request.param).partition("-")
    if isa:
        monkeypatch.setenv("KVANT_ISA", isa)
    return name


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread() -> Iterator[None]:
    """The oracle's matrices are too small to share: on busy cores threads wait for each other
    ten times longer than they compute."""
    with threadpool_limits(1, user_api="blas"):
        yield
