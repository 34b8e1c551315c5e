"""KV formats: mathematics, byte maps and sizes. Imports nothing else of kvant but errors."""

from kvant.formats.base import PAGE_TOKENS, KVFormat, PartView
from kvant.formats.spec import (
    FORMATS,
    PRESETS,
    QUANT_POLICIES,
    KVShape,
    KVSpec,
    resolve_spec,
)

__all__ = [
    "FORMATS",
    "PAGE_TOKENS",
    "PRESETS",
    "QUANT_POLICIES",
    "KVFormat",
    "KVShape",
    "KVSpec",
    "PartView",
    "resolve_spec",
]
