"""The formats by name, and the spelling of a whole KV cache: :class:`KVSpec`.

    int8                       keys and values alike
    k=int8h,v=int4h            chosen apart
    int4h+r64                  the recent 64-token group in finer formats (k=f16,v=int8h)
    int4h+r64:bf16             the same with the finer formats named
    int4h+s64r64               the first 64 tokens, the attention sinks, stay in it too
    k4v4                       a preset, short for k=int4c,v=int4m+s64r64
    k4v4;0,-1=int8h            the first and the last layer in another format
    policy.json                a file with such a spelling, as kvant eval tune writes it

``KVSpec.parse(text)`` and ``str(spec)`` are inverse, so the API, the CLI, result files and docs
share one spelling.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import cycle, groupby
from pathlib import Path

from kvant.errors import ConfigError, did_you_mean
from kvant.formats.affine import Affine
from kvant.formats.auto import choose_preset
from kvant.formats.base import PAGE_TOKENS, KVFormat
from kvant.formats.float8 import Float8
from kvant.formats.midpoint import Midpoint
from kvant.formats.plain import Plain

__all__ = [
    "ABOUT",
    "FORMATS",
    "K_CANDIDATES",
    "PRESETS",
    "QUANT_POLICIES",
    "V_CANDIDATES",
    "KVShape",
    "KVSpec",
    "LayerLayout",
    "guarded",
    "is_auto",
    "resolve_spec",
]

FORMATS: dict[str, KVFormat] = {
    fmt.name: fmt
    for fmt in (
        Plain("f32", bits=32),
        Plain("f16", bits=16),
        Plain("bf16", bits=16),
        Float8("fp8"),
        Affine("int8", bits=8),
        Affine("int4", bits=4),
        Affine("int8h", bits=8, rotated=True),
        Affine("int4h", bits=4, rotated=True),
        Affine("int8c", bits=8, by_page=True),
        Affine("int6c", bits=6, by_page=True),
        Affine("int5c", bits=5, by_page=True),
        Affine("int4c", bits=4, by_page=True),
        Affine("int3c", bits=3, by_page=True),
        Midpoint("int4m", bits=4),
        Midpoint("int3m", bits=3),
        Midpoint("int2m", bits=2),
    )
}

# What kvant eval tune chooses from, coarse to fine.
K_CANDIDATES = tuple(FORMATS[name] for name in ("int3c", "int4c", "int5c", "int6c", "int8c"))
V_CANDIDATES = tuple(FORMATS[name] for name in ("int2m", "int3m", "int4m", "int8h"))

Pair = tuple[KVFormat, KVFormat]

# From large to small; docs/formats.md has what each costs.
PRESETS = {
    "k8v8": "k=int8c,v=int8h+s64r64:f16",
    "k8v4": "k=int8c,v=int4m+s64r64",
    "k5v4": "k=int5c,v=int4m+s64r64",
    "k4v4": "k=int4c,v=int4m+s64r64",
    "k4v3": "k=int4c,v=int3m+s64r64",
    "k3v3": "k=int3c,v=int3m+s64r64",
}

# When to take it, in a line.
ABOUT = {
    "f32": "exact",
    "f16": "16-bit floats of 11 bits precision, up to 65504",
    "bf16": "16-bit floats of 8 bits precision (quant_policy 0)",
    "fp8": "8-bit floats (e4m3), a scale per token and head: coarser than int8 (quant_policy 16)",
    "int8": "a scale and a zero per token and head (quant_policy 8)",
    "int4": "the same with 4 bits, LMDeploy's int4: breaks models with large keys",
    "int8h": "int8 of Hadamard-rotated vectors",
    "int4h": "int4 of Hadamard-rotated vectors",
    "int8c": "keys only: a scale and a zero per channel and page",
    "int6c": "the same with 6 bits",
    "int5c": "the same with 5 bits",
    "int4c": "the same with 4 bits",
    "int3c": "the same with 3 bits",
    "int4m": "values: rotated, a scale per token, no zero",
    "int3m": "the same with 3 bits",
    "int2m": "the same with 2 bits",
    "k8v8": "nothing to notice: recent and first tokens in 16 bits",
    "k8v4": "8-bit keys, 4-bit values: for models whose keys are delicate",
    "k5v4": "the safe choice at a third of 16 bits, also with large key biases",
    "k4v4": "4 bits that stay accurate (quant_policy 4)",
    "k4v3": "a quarter of 16 bits",
    "k3v3": "the smallest, not for large key biases; kvant eval tune does better",
}

# The seed system's numbers. 0 is the 16-bit cache of the model's dtype (see resolve_spec).
QUANT_POLICIES: dict[int, str | None] = {0: None, 8: "int8", 4: "k4v4", 16: "fp8"}

# Keys in 16 bits: their errors weigh more, and large ones (Qwen2) break 8 bits.
_DEFAULT_RECENT = "k=f16,v=int8h"
_GROUP = f"r{PAGE_TOKENS}"
_SINK = f"s{PAGE_TOKENS}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """The geometry of a model's KV cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def _format(name: str) -> KVFormat:
    if name in PRESETS:
        raise ConfigError(
            f'"{name}" is a preset, which names a whole KV cache and no side, group or layer; '
            f"take parts of it: {PRESETS[name]}"
        )
    try:
        return FORMATS[name]
    except KeyError:
        raise ConfigError(
            f'unknown KV format "{name}"{did_you_mean(name, [*FORMATS, *PRESETS])} '
            f"Formats: {', '.join(FORMATS)}; presets: {', '.join(PRESETS)}; "
            f'apart: "k=int8h,v=int4h"; recent group: "+{_GROUP}"; by layer: ";0,-1=int8h"'
        ) from None


def _pair(pair: str, text: str) -> Pair:
    """The formats of K and V in ``int8`` or ``k=int8h,v=int4h``."""
    if "=" not in pair:
        return _format(pair), _format(pair)
    sides = dict(part.partition("=")[::2] for part in pair.split(","))
    if set(sides) != {"k", "v"} or pair.count(",") != 1:
        raise ConfigError(f'KV spec "{text}" must name K and V once each: "k=int8h,v=int4h"')
    return _format(sides["k"]), _format(sides["v"])


def _fine_groups(tail: str, text: str) -> tuple[bool, Pair]:
    """Sink and finer formats in ``r64``, ``s64r64`` or ``r64:bf16``."""
    groups, colon, fine = tail.partition(":")
    if groups not in (_GROUP, _SINK + _GROUP) or (colon and not fine):
        raise ConfigError(
            f'unknown finer groups "+{tail}" in KV spec "{text}": groups are of {PAGE_TOKENS} '
            f'tokens; write "+{_GROUP}" for the recent one, "+{_SINK}{_GROUP}" for the first one '
            f'too, "+{_GROUP}:bf16" to name their formats'
        )
    return groups != _GROUP, _pair(fine or _DEFAULT_RECENT, text)


def _layers(part: str, text: str) -> list[tuple[int, KVFormat, KVFormat]]:
    """Overrides in ``0,1,-1=int8h``."""
    numbers, _, pair = part.partition("=")
    try:
        layers = [int(number) for number in numbers.split(",")]
        if not pair:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f'layers ";{part}" in KV spec "{text}" must be numbers and a format; write '
            '";0,1,-1=int8h", negative ones count from the last layer'
        ) from None
    return [(layer, *_pair(pair, text)) for layer in layers]


def _finer(fmt: KVFormat, recent: KVFormat) -> KVFormat:
    """The format of the fine pages of a side that is ``fmt`` otherwise."""
    return fmt if not fmt.by_page and fmt.bits > recent.bits else recent


def _read_policy(path: str) -> str:
    try:
        text = json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))["kv"]
    except OSError as error:
        raise ConfigError(f"it cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: "~nobody" has no home
        text = None
    if not isinstance(text, str) or text.strip().lower().endswith(".json"):
        raise ConfigError(
            'it must be a JSON object whose "kv" is a KV spec; kvant eval tune writes one'
        )
    return text


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """The formats of one layer, and its bytes ``[offset, offset + nbytes)`` in a page."""

    k: KVFormat
    v: KVFormat
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Formats of keys and values; of groups that are kept finer; of layers that differ.

    With ``recent`` (K, V) set, the group of 64 positions that a token falls in (position // 64,
    nothing else) is kept in these formats until it is full, then encoded once into ``k`` and
    ``v``. A query sees its own group through ``recent`` and every earlier group through ``k``
    and ``v``, whatever was computed in which step. With ``sink`` the first group stays in
    ``recent`` for good.

    ``layers`` are (layer, k, v); a negative layer counts from the last one, the last of several
    for a layer holds. Where such a format is finer than ``recent`` it is used in its place.

    Raises:
        ConfigError: ``recent`` is not finer than ``k`` or ``v``, or missing where a format by
            page or ``sink`` needs it.
    """

    k: KVFormat
    v: KVFormat
    recent: Pair | None = None
    sink: bool = False
    layers: tuple[tuple[int, KVFormat, KVFormat], ...] = ()

    def __post_init__(self) -> None:
        if self.recent is None:
            by_page = [fmt for fmt in self._all_formats() if fmt.by_page]
            if by_page or self.sink:
                raise ConfigError(
                    f"KV format {by_page[0]} encodes 64 tokens at once and needs a recent group: "
                    f'add "+{_SINK}{_GROUP}"'
                    if by_page
                    else "a sink group needs a recent group too"
                )
            return
        for fmt in self.recent:
            if fmt.by_page:
                raise ConfigError(
                    f"KV format {fmt} encodes 64 tokens at once and cannot hold a recent group; "
                    f'name another, as "+{_GROUP}:int8h"'
                )
        pairs = zip(self._all_formats(), cycle(self.recent), strict=False)
        if not any(fmt.by_page or fine.bits > fmt.bits for fmt, fine in pairs):
            raise ConfigError(
                f'the recent group of KV spec "{self}" is not finer than its other groups; '
                f'drop "+{_GROUP}" or name a finer format, as "+{_GROUP}:bf16"'
            )
        for fmt, fine in zip(self._all_formats(), cycle(self.recent), strict=False):
            if fmt.by_page and fine.bits < fmt.bits:
                raise ConfigError(
                    f"KV format {fmt} is encoded from the recent group, and that would be coarser "
                    f'({fine}); name a finer one, as "+{_GROUP}:f16"'
                )

    def _all_formats(self) -> list[KVFormat]:
        """K, V, then K, V of each override."""
        return [self.k, self.v, *(fmt for _, *pair in self.layers for fmt in pair)]

    @staticmethod
    def parse(text: str) -> KVSpec:
        """Read a spelling such as ``int4h``, ``k=int8h,v=int4h`` or ``k4v4;0,-1=int8h``, or a
        file that holds one.

        Raises:
            ConfigError: the text names no format, naming the nearest one.
        """
        if text.strip().lower().endswith(".json"):
            file = text.strip()
            try:
                return KVSpec.parse(_read_policy(file))
            except ConfigError as error:
                raise ConfigError(f'KV policy file "{file}": {error}') from None
        whole, *overrides = "".join(text.split()).lower().split(";")
        name, plus, tail = whole.partition("+")
        pair, preset_plus, preset_tail = PRESETS.get(name, name).partition("+")
        if not plus:
            plus, tail = preset_plus, preset_tail
        elif ":" not in tail:  # other groups of a preset, in its finer formats
            tail += "".join(preset_tail.partition(":")[1:])
        sink, recent = _fine_groups(tail, text) if plus else (False, None)
        layers = tuple(layer for part in overrides for layer in _layers(part, text))
        return KVSpec(*_pair(pair, text), recent, sink, layers)

    def __str__(self) -> str:
        pair = _spell_pair(self.k, self.v)
        if self.recent is not None:
            fine = _spell_pair(*self.recent)
            pair += f"+{_SINK if self.sink else ''}{_GROUP}"
            pair += "" if fine == _DEFAULT_RECENT else f":{fine}"
        runs = groupby(self.layers, key=lambda layer: _spell_pair(*layer[1:]))
        overrides = (f"{','.join(str(n) for n, *_ in run)}={pair}" for pair, run in runs)
        return ";".join((pair, *overrides))

    @property
    def label(self) -> str:
        """A shorter spelling, by the name of the preset where it is one."""
        whole, *layers = str(self).split(";")
        names = {spelling: name for name, spelling in PRESETS.items()}
        return ";".join((names.get(whole, whole), *layers))

    @property
    def fine(self) -> KVSpec:
        """The spec of a recent page; ``self`` when there is no recent part."""
        if self.recent is None:
            return self
        fine_k, fine_v = self.recent
        return KVSpec(
            _finer(self.k, fine_k),
            _finer(self.v, fine_v),
            layers=tuple((n, _finer(k, fine_k), _finer(v, fine_v)) for n, k, v in self.layers),
        )

    def layout(self, shape: KVShape) -> tuple[LayerLayout, ...]:
        """Where each layer is in a page: one after another, and in each the head pages."""
        pairs = [(self.k, self.v)] * shape.num_layers
        for layer, k, v in self.layers:
            pairs[layer] = k, v
        out, offset = [], 0
        for k, v in pairs:
            part = k.part_bytes(shape.head_dim) + v.part_bytes(shape.head_dim)
            out.append(LayerLayout(k, v, offset, shape.num_kv_heads * part))
            offset += out[-1].nbytes
        return tuple(out)

    def page_bytes(self, shape: KVShape) -> int:
        """Bytes of one page: 64 tokens, all layers and KV heads."""
        return sum(layer.nbytes for layer in self.layout(shape))

    def bits_per_element(self, shape: KVShape, tokens: int | None = None) -> float:
        """Effective bits per K or V element, metadata included, of full pages; with ``tokens``
        of all bytes that a sequence of so many tokens holds, its finer groups included, while
        its recent group is about to become full."""
        elements = 2 * PAGE_TOKENS * shape.num_layers * shape.num_kv_heads * shape.head_dim
        full = 8 * self.page_bytes(shape) / elements
        if tokens is None or self.recent is None:
            return full
        groups = -(-tokens // PAGE_TOKENS)
        fine = min(1 + self.sink, groups)
        return full + (8 * self.fine.page_bytes(shape) / elements - full) * fine / groups

    def tokens_per_gib(self, shape: KVShape) -> int:
        """Tokens that the full pages of one GiB hold."""
        return 2**30 // self.page_bytes(shape) * PAGE_TOKENS

    def bytes_per_token(self, shape: KVShape) -> float:
        """Bytes that one more token of a long sequence costs."""
        return self.page_bytes(shape) / PAGE_TOKENS

    def check(self, shape: KVShape) -> None:
        """Raise ConfigError if a format cannot store vectors of this size, or a layer that is
        named does not exist."""
        for fmt in (*self._all_formats(), *(self.recent or ())):
            if shape.head_dim % fmt.head_dim_multiple:
                raise ConfigError(
                    f"KV format {fmt} needs a head_dim that is a multiple of "
                    f"{fmt.head_dim_multiple}, this model has {shape.head_dim}; use f32, f16 or "
                    "bf16"
                )
        for layer, _, _ in self.layers:
            if not -shape.num_layers <= layer < shape.num_layers:
                raise ConfigError(
                    f'KV spec "{self}" names layer {layer}, this model has {shape.num_layers}: '
                    f"0 to {shape.num_layers - 1}, or -1 for the last"
                )


def guarded(
    k: KVFormat, v: KVFormat, layers: tuple[tuple[int, KVFormat, KVFormat], ...] = ()
) -> KVSpec:
    """The spec of these formats with the first and the recent group in the default finer ones."""
    return KVSpec(k, v, _pair(_DEFAULT_RECENT, _DEFAULT_RECENT), sink=True, layers=layers)


def _spell_pair(k: KVFormat, v: KVFormat) -> str:
    return k.name if k == v else f"k={k},v={v}"


def is_auto(kv: KVSpec | str | None) -> bool:
    """Whether the format is left to kvant."""
    return isinstance(kv, str) and kv.strip().lower() == "auto"


def resolve_spec(
    kv: KVSpec | str | None,
    quant_policy: int | None,
    *,
    dtype: str = "bfloat16",
    architecture: str = "unknown",
) -> KVSpec:
    """The spec that a user's ``kv`` and ``quant_policy`` options mean.

    Args:
        kv: a spec or its spelling; ``auto`` for the smallest preset that is known to be good for
            the architecture (:mod:`kvant.formats.auto`).
        quant_policy: LMDeploy's number: 0 (16 bit), 8 (``int8``), 16 (``fp8``) or 4 (``k4v4``, 4
            bits that are safe; LMDeploy's own arithmetic is ``int4``).
        architecture: the model's, for ``auto``.
        dtype: the model's; the 16-bit cache of a float16 model is float16, else bfloat16.

    Raises:
        ConfigError: both are given, or one is unknown.
    """
    if kv is not None and quant_policy is not None:
        raise ConfigError(
            f"both kv={str(kv)!r} and quant_policy={quant_policy} are given; use one of them"
        )
    if isinstance(kv, KVSpec):
        return kv
    if isinstance(kv, str):
        return KVSpec.parse(choose_preset(architecture).preset if is_auto(kv) else kv)
    if kv is not None:
        raise ConfigError(
            f'kv={kv!r} must be a spelling such as "int8"; LMDeploy\'s numbers go to quant_policy'
        )
    try:
        name = QUANT_POLICIES[quant_policy or 0]
    except (KeyError, TypeError):
        raise ConfigError(
            f"quant_policy={quant_policy!r} is unknown; use 0 (16 bit), 8 (int8), 16 (fp8) or "
            '4 (k4v4), or name a format with kv="k5v4"'
        ) from None
    return KVSpec.parse(name or ("f16" if dtype == "float16" else "bf16"))
