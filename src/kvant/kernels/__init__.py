"""Backends by name. All write the same page bytes; see :mod:`kvant.kernels.backend`."""

from __future__ import annotations

from collections.abc import Callable

from kvant.errors import ConfigError, did_you_mean
from kvant.kernels.backend import Backend, Batch, BatchSequence, KVMemory
from kvant.kernels.null import NullBackend
from kvant.kernels.reference import ReferenceBackend

__all__ = [
    "BACKENDS",
    "Backend",
    "Batch",
    "BatchSequence",
    "KVMemory",
    "check_backend",
    "make_backend",
]

# In order of preference: "auto" takes the first.
BACKENDS: dict[str, Callable[[KVMemory], Backend]] = {
    "reference": ReferenceBackend,
    "null": NullBackend,
}


def check_backend(name: str) -> str:
    """The backend that ``name`` means; for ``auto`` the first, which is the fastest.

    Raises:
        ConfigError: no such backend.
    """
    if name == "auto":
        return next(iter(BACKENDS))
    if name not in BACKENDS:
        raise ConfigError(
            f'unknown backend "{name}"{did_you_mean(name, BACKENDS)} '
            f"Backends here: auto, {', '.join(BACKENDS)}"
        )
    return name


def make_backend(name: str, memory: KVMemory) -> Backend:
    """The backend that :func:`check_backend` finds, over ``memory``."""
    return BACKENDS[check_backend(name)](memory)
