"""Backends by name. All write the same page bytes; see :mod:`kvant.kernels.backend`."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

from kvant.cache.pool import BytePool, Pool
from kvant.errors import ConfigError, did_you_mean
from kvant.formats import KVShape, KVSpec
from kvant.kernels.backend import Backend, Batch, BatchSequence, KVMemory
from kvant.kernels.cpu import CPUBackend, check_cpu
from kvant.kernels.null import NullBackend
from kvant.kernels.reference import ReferenceBackend

_log = logging.getLogger("kvant")

__all__ = [
    "BACKENDS",
    "Backend",
    "Batch",
    "BatchSequence",
    "KVMemory",
    "check_backend",
    "make_backend",
    "make_memory",
]


class _Kind(NamedTuple):
    """How to make a backend, with so many threads, and the pools that it works on."""

    make: Callable[[KVMemory, int | None], Backend]
    pool: Callable[[int, int], Pool] = BytePool


def _triton(memory: KVMemory, num_threads: int | None) -> Backend:  # noqa: ARG001
    from kvant.kernels.triton.backend import TritonBackend

    return TritonBackend(memory)


def _triton_pool(num_pages: int, page_bytes: int) -> Pool:
    from kvant.kernels.triton.pool import allocate_pool

    return allocate_pool(num_pages, page_bytes)


BACKENDS: dict[str, _Kind] = {
    "cpu": _Kind(CPUBackend),
    "triton": _Kind(_triton, _triton_pool),
    "reference": _Kind(ReferenceBackend),
    "null": _Kind(NullBackend),
}


def _has_gpu() -> bool:
    """Whether the triton backend would work on a GPU. torch, which takes seconds to load, is asked
    only where there is a driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        return _check_triton() == "cuda"
    except ConfigError as error:
        _tell(f"the GPU is left alone: {error}")
        return False


@cache
def _tell(line: str) -> None:
    """Log a line, once."""
    _log.warning(line)


def _check_triton() -> str:
    """The kind of device that the triton backend would work on: cuda, or cpu if it is interpreted.

    Raises:
        ConfigError: there is none, or no Triton.
    """
    if find_spec("triton") is None:
        raise ConfigError(
            'backend="triton" needs the package triton, which is not installed; install '
            'kvant[gpu], or take backend="cpu"'
        )
    from kvant.kernels.triton.pool import check_capability, find_device

    device = find_device()
    check_capability(device)
    return device.type


def check_backend(name: str, head_dim: int | None = None) -> str:
    """The backend that ``name`` means; for ``auto`` triton where there is a GPU, else cpu. With a
    ``head_dim`` it must be able to serve a model of it.

    Raises:
        ConfigError: no such backend, or it cannot.
    """
    if name == "auto":
        name = "triton" if _has_gpu() else "cpu"
    if name not in BACKENDS:
        raise ConfigError(
            f'unknown backend "{name}"{did_you_mean(name, BACKENDS)} '
            f"Backends here: auto, {', '.join(BACKENDS)}"
        )
    if name == "cpu" and head_dim is not None:
        check_cpu(head_dim)
    if name == "triton":
        _check_triton()
    return name


def make_memory(
    name: str,
    spec: KVSpec,
    shape: KVShape,
    num_pages: int,
    num_recent: int,
    max_step_tokens: int,
) -> KVMemory:
    """:meth:`KVMemory.allocate` where the backend that :func:`check_backend` finds works.

    Raises:
        ConfigError: no such backend, or there is not so much memory.
    """
    pool = BACKENDS[check_backend(name)].pool
    return KVMemory.allocate(spec, shape, num_pages, num_recent, max_step_tokens, pool=pool)


def make_backend(name: str, memory: KVMemory, num_threads: int | None = None) -> Backend:
    """The backend that :func:`check_backend` finds, over ``memory``. ``num_threads`` None means
    ``OMP_NUM_THREADS`` or all cores.

    Raises:
        ConfigError: no such backend, or it cannot hold such a cache.
    """
    return BACKENDS[check_backend(name)].make(memory, num_threads)
