"""The null backend: right shapes, no arithmetic. For tests and step-overhead benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvant.kernels.backend import Batch, KVMemory

__all__ = ["NullBackend"]


class NullBackend:
    """Writes nothing and answers each query with itself."""

    name = "null"

    def __init__(self, memory: KVMemory, num_threads: int | None = None) -> None:
        pass

    def write(self, layer: int, k: Any, v: Any, batch: Batch) -> None:
        """Do nothing."""

    def attend(
        self,
        layer: int,  # noqa: ARG002
        q: Any,
        batch: Batch,  # noqa: ARG002
        *,
        scale: float,  # noqa: ARG002
        window: int | None = None,  # noqa: ARG002
        softcap: float | None = None,  # noqa: ARG002
        sinks: NDArray[np.float32] | None = None,  # noqa: ARG002
    ) -> Any:
        """Return ``q``."""
        return q
