"""KV formats: mathematics, byte maps and sizes. Imports nothing else of kvant but errors."""

from kvant.formats.base import PAGE_TOKENS, KVFormat, PartView
from kvant.formats.spec import (
    ABOUT,
    FORMATS,
    K_CANDIDATES,
    PRESETS,
    QUANT_POLICIES,
    V_CANDIDATES,
    KVShape,
    KVSpec,
    guarded,
    is_auto,
    resolve_spec,
)

__all__ = [
    "ABOUT",
    "FORMATS",
    "K_CANDIDATES",
    "PAGE_TOKENS",
    "PRESETS",
    "QUANT_POLICIES",
    "V_CANDIDATES",
    "KVFormat",
    "KVShape",
    "KVSpec",
    "PartView",
    "guarded",
    "is_auto",
    "resolve_spec",
]
