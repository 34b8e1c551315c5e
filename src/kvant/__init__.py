"""kvant: LLM inference with an online-quantized paged KV cache.

    from kvant import pipeline, EngineConfig, GenerationConfig

    pipe = pipeline("smollm2-135m", EngineConfig(kv="int4h"))
    print(pipe("What is a KV cache?").text)

Names are resolved on first use, so that ``import kvant`` is fast and loads no torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvant.api import Pipeline, Response, Session, pipeline
    from kvant.config import EngineConfig, GenerationConfig
    from kvant.errors import ConfigError, EngineDeadError, KvantError, ModelError, RequestError
    from kvant.formats import KVSpec

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "EngineConfig",
    "EngineDeadError",
    "GenerationConfig",
    "KVSpec",
    "KvantError",
    "ModelError",
    "Pipeline",
    "RequestError",
    "Response",
    "Session",
    "__version__",
    "pipeline",
]

_HOME = {
    "ConfigError": "kvant.errors",
    "EngineConfig": "kvant.config",
    "EngineDeadError": "kvant.errors",
    "GenerationConfig": "kvant.config",
    "KVSpec": "kvant.formats",
    "KvantError": "kvant.errors",
    "ModelError": "kvant.errors",
    "Pipeline": "kvant.api",
    "RequestError": "kvant.errors",
    "Response": "kvant.api",
    "Session": "kvant.api",
    "pipeline": "kvant.api",
}

# Threads of torch's OpenMP that spin while they wait take the cores from everything else: on two
# busy cores a step took 5 to 10 times longer (docs/log.md). Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# But the next piece of work often comes microseconds later: for about 40 of them (2000 turns) a
# thread waits for it before it sleeps.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvant' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
