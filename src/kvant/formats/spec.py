"""The formats by name, and the spelling of a whole KV cache: :class:`KVSpec`.

    int8                     keys and values alike
    k=int8h,v=int4h          chosen apart; k8v4 and k8v4h are short for such pairs
    int4h+r64                the recent 64-token group in a finer format (int8h)
    int4h+r64:bf16           the same with the finer format named

``KVSpec.parse(text)`` and ``str(spec)`` are inverse, so the API, the CLI, result files and docs
share one spelling.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvant.errors import ConfigError, did_you_mean
from kvant.formats.affine import Affine
from kvant.formats.base import PAGE_TOKENS, KVFormat
from kvant.formats.plain import Plain

__all__ = ["FORMATS", "PRESETS", "QUANT_POLICIES", "KVShape", "KVSpec", "resolve_spec"]

FORMATS: dict[str, KVFormat] = {
    fmt.name: fmt
    for fmt in (
        Plain("f32"),
        Plain("f16"),
        Plain("bf16"),
        Affine("int8", bits=8, rotated=False),
        Affine("int4", bits=4, rotated=False),
        Affine("int8h", bits=8, rotated=True),
        Affine("int4h", bits=4, rotated=True),
    )
}

PRESETS = {"k8v4": "k=int8,v=int4", "k8v4h": "k=int8h,v=int4h"}

# The seed system's numbers. 0 is the 16-bit cache of the model's dtype (see resolve_spec).
QUANT_POLICIES: dict[int, str | None] = {0: None, 8: "int8", 4: "int4"}

_DEFAULT_RECENT = "int8h"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """The geometry of a model's KV cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def _format(name: str) -> KVFormat:
    try:
        return FORMATS[name]
    except KeyError:
        raise ConfigError(
            f'unknown KV format "{name}"{did_you_mean(name, [*FORMATS, *PRESETS])} '
            f"Formats: {', '.join(FORMATS)}; presets: {', '.join(PRESETS)}; "
            'apart: "k=int8h,v=int4h"; recent group: "+r64"'
        ) from None


def _pair(pair: str, text: str) -> tuple[KVFormat, KVFormat]:
    """The formats of K and V in the part of a spec before the plus."""
    pair = PRESETS.get(pair, pair)
    if "=" not in pair:
        return _format(pair), _format(pair)
    sides = dict(part.partition("=")[::2] for part in pair.split(","))
    if set(sides) != {"k", "v"} or pair.count(",") != 1:
        raise ConfigError(f'KV spec "{text}" must name K and V once each: "k=int8h,v=int4h"')
    return _format(sides["k"]), _format(sides["v"])


def _check_finer(spec: KVSpec) -> None:
    if spec.recent is None:
        return
    coarsest = min(spec.k.bits_per_element(128), spec.v.bits_per_element(128))
    if spec.recent.bits_per_element(128) <= coarsest:
        raise ConfigError(
            f'the recent group of KV spec "{spec}" is not finer than its other groups; '
            f'drop "+r{PAGE_TOKENS}" or name a finer format, as "+r{PAGE_TOKENS}:bf16"'
        )


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Formats of keys and values, and of the recent group if that is finer.

    With ``recent`` set, the group of 64 positions that a token falls in (position // 64,
    nothing else) is kept in that format until it is full, then encoded once into ``k`` and
    ``v``. A query sees its own group through ``recent`` and every earlier group through ``k``
    and ``v``, whatever was computed in which step.
    """

    k: KVFormat
    v: KVFormat
    recent: KVFormat | None = None

    @staticmethod
    def parse(text: str) -> KVSpec:
        """Read a spelling such as ``int4h``, ``k=int8h,v=int4h`` or ``int4h+r64:bf16``.

        Raises:
            ConfigError: the text names no format, naming the nearest one.
        """
        pair, plus, tail = text.replace(" ", "").lower().partition("+")
        recent = None
        if plus:
            size, colon, fine = tail.partition(":")
            if size != f"r{PAGE_TOKENS}" or (colon and not fine):
                raise ConfigError(
                    f'unknown recent group "+{tail}" in KV spec "{text}": groups are of '
                    f'{PAGE_TOKENS} tokens; write "{pair}+r{PAGE_TOKENS}" or '
                    f'"{pair}+r{PAGE_TOKENS}:bf16"'
                )
            recent = _format(fine or _DEFAULT_RECENT)
        spec = KVSpec(*_pair(pair, text), recent)
        _check_finer(spec)
        return spec

    def __str__(self) -> str:
        pair = self.k.name if self.k == self.v else f"k={self.k},v={self.v}"
        if self.recent is None:
            return pair
        fine = "" if self.recent.name == _DEFAULT_RECENT else f":{self.recent}"
        return f"{pair}+r{PAGE_TOKENS}{fine}"

    @property
    def fine(self) -> KVSpec:
        """The spec of a recent page; ``self`` when there is no recent part."""
        return KVSpec(self.recent, self.recent) if self.recent else self

    def head_page_bytes(self, head_dim: int) -> int:
        """Bytes of 64 tokens of K and V of one KV head in one layer."""
        return self.k.part_bytes(head_dim) + self.v.part_bytes(head_dim)

    def page_bytes(self, shape: KVShape) -> int:
        """Bytes of one page: 64 tokens, all layers and KV heads."""
        return shape.num_layers * shape.num_kv_heads * self.head_page_bytes(shape.head_dim)

    def bits_per_element(self, head_dim: int) -> float:
        """Effective bits per K or V element, metadata included, of full pages."""
        return 8 * self.head_page_bytes(head_dim) / (2 * PAGE_TOKENS * head_dim)

    def tokens_per_gib(self, shape: KVShape) -> int:
        """Tokens that the full pages of one GiB hold."""
        return 2**30 // self.page_bytes(shape) * PAGE_TOKENS

    def bytes_per_token(self, shape: KVShape) -> float:
        """Bytes that one more token of a long sequence costs."""
        return self.page_bytes(shape) / PAGE_TOKENS

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ConfigError if a format cannot store vectors of this size."""
        for fmt in (self.k, self.v, self.recent):
            if fmt is not None and head_dim % fmt.head_dim_multiple:
                raise ConfigError(
                    f"KV format {fmt} needs a head_dim that is a multiple of "
                    f"{fmt.head_dim_multiple}, this model has {head_dim}; use f32, f16 or bf16"
                )


def resolve_spec(
    kv: KVSpec | str | None, quant_policy: int | None, *, dtype: str = "bfloat16"
) -> KVSpec:
    """The spec that a user's ``kv`` and ``quant_policy`` options mean.

    Args:
        kv: a spec or its spelling.
        quant_policy: LMDeploy's number: 0 (16 bit), 8 (``int8``) or 4 (``int4``).
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
        return KVSpec.parse(kv)
    if kv is not None:
        raise ConfigError(
            f'kv={kv!r} must be a spelling such as "int8"; LMDeploy\'s numbers go to quant_policy'
        )
    try:
        name = QUANT_POLICIES[quant_policy or 0]
    except (KeyError, TypeError):
        raise ConfigError(
            f"quant_policy={quant_policy!r} is unknown; use 0 (16 bit), 8 (int8) or 4 (int4), "
            'or name a format with kv="int4h"'
        ) from None
    return KVSpec.parse(name or ("f16" if dtype == "float16" else "bf16"))
