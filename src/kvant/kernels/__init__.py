"""Backends by name. All write the same page bytes; see :mod:`kvant.kernels.backend`."""

from __future__ import annotations

from collections.abc import Callable

from kvant.errors import ConfigError, did_you_mean
from kvant.kernels.backend import Backend, Batch, BatchSequence, KVMemory
from kvant.kernels.cpu import CPUBackend, check_cpu
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

# In order of preference: "auto" takes the first. The number is that of threads.
BACKENDS: dict[str, Callable[[KVMemory, int | None], Backend]] = {
    "cpu": CPUBackend,
    "reference": ReferenceBackend,
    "null": NullBackend,
}


def check_backend(name: str, head_dim: int | None = None) -> str:
    """The backend that ``name`` means; for ``auto`` the first, which is the fastest. With a
    ``head_dim`` it must be able to serve a model of it.

    Raises:
        ConfigError: no such backend, or it cannot.
    """
    if name == "auto":
        name = next(iter(BACKENDS))
    if name not in BACKENDS:
        raise ConfigError(
            f'unknown backend "{name}"{did_you_mean(name, BACKENDS)} '
            f"Backends here: auto, {', '.join(BACKENDS)}"
        )
    if name == "cpu" and head_dim is not None:
        check_cpu(head_dim)
    return name


def make_backend(name: str, memory: KVMemory, num_threads: int | None = None) -> Backend:
    """The backend that :func:`check_backend` finds, over ``memory``. ``num_threads`` None means
    ``OMP_NUM_THREADS`` or all cores.

    Raises:
        ConfigError: no such backend, or it cannot hold such a cache.
    """
    return BACKENDS[check_backend(name)](memory, num_threads)
