"""A decoder over a cache, from the same parts that an engine is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clock import on_gpu

from kvant.config import EngineConfig
from kvant.engine.load import OpenModel, cache_size
from kvant.kernels import KVMemory, make_backend, make_memory
from kvant.kernels.triton.pool import find_device
from kvant.models.decoder import DecoderWeights
from kvant.models.gpu import GPUDecoder
from kvant.models.graphs import CudaCapture


def _cuda_capture() -> CudaCapture | None:
    return CudaCapture() if on_gpu() else None


@dataclass
class Counted:
    """Captures decode steps, and counts them; without a GPU they stay as they are."""

    count: int = 0
    _capture: CudaCapture | None = field(default_factory=_cuda_capture)

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """See :data:`kvant.models.graphs.Capture`."""
        self.count += 1
        return self._capture(work) if self._capture else work


@dataclass(frozen=True)
class Started:
    """A decoder, what it computes attention with, and the pages of these."""

    decoder: GPUDecoder
    backend: Any
    memory: KVMemory
    capture: Counted


def start(opened: OpenModel, weights: DecoderWeights, config: EngineConfig) -> Started:
    """A decoder with the cache that ``config`` asks for; its ``kv`` is a KVSpec."""
    model, spec = opened.config, config.kv_spec(opened.config.architecture)
    size = cache_size(config, spec, model)
    pages = size.num_pages, size.num_recent
    memory = make_memory("triton", spec, model.kv_shape, *pages, config.max_prefill_token_num)
    capture = Counted()
    longest = min(model.max_positions, config.session_len or model.max_positions)
    decoder = GPUDecoder(model, weights, find_device(), longest=longest, capture=capture)
    return Started(decoder, make_backend("triton", memory), memory, capture)
