"""KV formats for people: a short name, an order, and what is stored, in words."""

from __future__ import annotations

from functools import cache
from pathlib import PurePath

from kvant.errors import ConfigError
from kvant.formats import PAGE_TOKENS, KVFormat, KVSpec

__all__ = ["describe", "is_16_bit", "is_by_layer", "label_of", "model_name", "order"]

_SIXTEEN = 16
_LABEL = 40  # characters


@cache
def _parse(kv_spec: str) -> KVSpec | None:
    """None for a spelling of another kvant, which had formats that this one lacks."""
    if kv_spec.lower().endswith(".json"):  # a file that may be another one now
        return None
    try:
        return KVSpec.parse(kv_spec)
    except ConfigError:
        return None


def label_of(kv_spec: str, bits: float | None = None) -> str:
    """The name of a format: a preset's where it is one; ``bits`` per element tell formats by
    layer from each other."""
    spec = _parse(kv_spec)
    if spec is not None and spec.layers:
        return "by layer" if bits is None else f"by layer, {bits:.2f} bits"
    label = kv_spec if spec is None else spec.label
    return label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…"


def is_16_bit(kv_spec: str) -> bool:
    """Whether keys and values are both plain numbers of 16 bits."""
    spec = _parse(kv_spec)
    if spec is None or spec.recent is not None or spec.layers:
        return False
    return spec.k.bits == spec.v.bits == _SIXTEEN


def is_by_layer(kv_spec: str) -> bool:
    """Whether some layers have formats of their own, as ``kvant eval tune`` chooses them."""
    spec = _parse(kv_spec)
    return spec is not None and bool(spec.layers)


def order(kv_spec: str, size: float) -> tuple[int, float, str]:
    """A sort key: plain formats of 16 and more bits, formats of one precision for all tokens,
    formats with finer groups, formats by layer; in each the larger ``size`` first."""
    spec = _parse(kv_spec)
    if spec is None:
        return 4, -size, kv_spec
    if spec.layers:
        return 3, -size, kv_spec
    if spec.recent is not None:
        return 2, -size, kv_spec
    return int(min(spec.k.bits, spec.v.bits) < _SIXTEEN), -size, kv_spec


def describe(kv_spec: str) -> str:
    """What is stored: ``keys 4 bits by channel, values 4 bits; first and latest ...``."""
    spec = _parse(kv_spec)
    if spec is None:
        return "not known to this version of kvant"
    words = f"keys {_side(spec.k)}, values {_side(spec.v)}"
    if spec.k == spec.v:
        words = f"keys and values {_side(spec.k)}"
    if spec.recent is not None:
        words += f"; {'first and ' if spec.sink else ''}latest {PAGE_TOKENS} tokens finer"
    return f"{words}; some layers differ" if spec.layers else words


def model_name(model: str) -> str:
    """A model for the eye: a hub's name as it is, of a path the last part."""
    path = PurePath(model)
    return path.name if path.is_absolute() or model.startswith((".", "~")) else model


def _side(fmt: KVFormat) -> str:
    way = " by channel" if fmt.by_page else " rotated" if fmt.rotated else ""
    return f"{fmt.bits} bits{way}"
