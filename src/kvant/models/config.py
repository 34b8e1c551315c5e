"""What distinguishes one decoder-only transformer from another, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvant.errors import ModelError
from kvant.formats import KVShape

__all__ = ["DecoderConfig", "RopeConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, and how it is stretched to longer contexts.

    ``kind`` is ``default``, ``linear``, ``dynamic``, ``llama3`` or ``yarn``; the other fields are
    those of Hugging Face's ``rope_scaling``. :mod:`kvant.models.rope` has the maths.

    Raises:
        ModelError: another kind.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    freq_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        kinds = ("default", "linear", "dynamic", "llama3", "yarn")
        if self.kind not in kinds:
            raise ModelError(
                f'rope scaling "{self.kind}" is not supported; kvant knows {", ".join(kinds)}'
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A Llama-shaped decoder: pre-norm, RoPE, grouped-query attention, gated MLP.

    ``windows[layer]`` is the sliding window of a layer in tokens, or None for full attention.

    Raises:
        ModelError: a value that no model can have.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: RopeConfig = field(default_factory=RopeConfig)
    windows: tuple[int | None, ...]
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ModelError(f"the model's config has {name}={value!r}, not a positive number")
        if not isinstance(self.norm_eps, float | int) or self.norm_eps <= 0:
            raise ModelError(f"the model's config has norm_eps={self.norm_eps!r}, not above 0")
        if len(self.windows) != self.num_layers:
            raise ModelError(
                f"the model's config names attention types for {len(self.windows)} of "
                f"{self.num_layers} layers"
            )
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ModelError(
                f"the model's config has {self.num_heads} heads for {self.num_kv_heads} KV heads "
                f"of {self.head_dim} dimensions; these must divide evenly and be even"
            )

    @property
    def kv_shape(self) -> KVShape:
        """Geometry of the KV cache."""
        return KVShape(
            num_layers=self.num_layers, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim
        )
