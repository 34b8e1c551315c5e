"""KV formats for people: a short name, a size, an order, and what is stored, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, count
from pathlib import PurePath

from kvant.errors import ConfigError
from kvant.formats import PAGE_TOKENS, KVFormat, KVSpec
from kvant.report.stored import Fidelity, FidelityRow, Latency, Source, TaskRow, Tasks, Throughput

__all__ = [
    "Formats",
    "describe",
    "formats_of",
    "is_16_bit",
    "is_by_layer",
    "label_of",
    "measured_rows",
    "model_name",
    "once",
    "order",
]

_SIXTEEN = 16
_LABEL = 40  # characters
_CONTEXT = 4096  # tokens over which kvant spreads finer groups in figures of bits


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of a report, as one model has them.

    labels    a name for each spelling; no two have the same
    elements  the numbers that keys and values of a token have in all layers, if known
    """

    labels: dict[str, str] = field(default_factory=dict)
    elements: float | None = None

    def label(self, kv_spec: str) -> str:
        """The name of a format."""
        return self.labels.get(kv_spec) or label_of(kv_spec)

    def size(self, bits: float) -> float:
        """Of a token, for a format of so many bits per element: see ``unit``."""
        return bits if self.elements is None else bits * self.elements / 8

    @property
    def unit(self) -> str:
        """What sizes are in."""
        return "bytes/token" if self.elements is not None else "bits/number"

    @property
    def axis(self) -> str:
        """What sizes are in, and of how long a sequence."""
        unit = "bytes per token" if self.elements is not None else "bits per number"
        return f"{unit} in sequences of {_CONTEXT:,} tokens"

    @property
    def note(self) -> str:
        """How long the sequences are that sizes are of."""
        return (
            f"Sizes and tokens are those in sequences of {_CONTEXT:,} tokens; short ones gain "
            f"less: some formats keep {2 * PAGE_TOKENS} tokens finer."
        )


def measured_rows(sources: Iterable[Source]) -> list[FidelityRow | TaskRow]:
    """The rows of all results about accuracy."""
    stored = (source.stored for source in sources)
    return [row for each in stored if isinstance(each, Fidelity | Tasks) for row in each.results]


def formats_of(sources: Sequence[Source], model: str) -> Formats:
    """Names for all formats of these files, sizes for ``model``. Files do not tell how many
    numbers a token has; of formats without finer groups bits and bytes do."""
    rows = measured_rows(sources)
    bits: dict[str, float | None] = {row.kv_spec: row.bits_per_element for row in rows}
    for source in sources:
        if isinstance(source.stored, Latency | Throughput):
            for row in source.stored.results:
                bits.setdefault(row.kv_spec, None)
    unique = once(" ({})")
    mine = measured_rows(each for each in sources if getattr(each.stored, "model", "") == model)
    plain = [row for row in mine if _is_even(row.kv_spec)]
    return Formats(
        labels={spec: unique(label_of(spec, bits[spec])) for spec in bits},
        elements=8 * plain[-1].bytes_per_token / plain[-1].bits_per_element if plain else None,
    )


def once(pattern: str) -> Callable[[str], str]:
    """Makes names that are there once, with a number where one was there before."""
    taken: set[str] = set()

    def unique(name: str) -> str:
        numbers = (name + pattern.format(number) for number in count(2))
        chosen = next(each for each in chain([name], numbers) if each not in taken)
        taken.add(chosen)
        return chosen

    return unique


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


def _is_even(kv_spec: str) -> bool:
    """Whether each token takes the same bytes, however long the sequence is."""
    spec = _parse(kv_spec)
    return spec is not None and spec.recent is None and not spec.layers


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
