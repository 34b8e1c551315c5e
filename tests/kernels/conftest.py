"""Kernel tests run on every backend that this installation has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits

from kvant.kernels import BACKENDS


@pytest.fixture(params=[name for name in BACKENDS if name != "null"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that computes."""
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread() -> Iterator[None]:
    """The oracle's matrices are too small to share: on busy cores threads wait for each other
    ten times longer than they compute."""
    with threadpool_limits(1, user_api="blas"):
        yield
