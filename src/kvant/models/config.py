"""What distinguishes one decoder-only transformer from another, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvant.formats import KVShape

__all__ = ["DecoderConfig", "RopeConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, and how it is stretched to longer contexts.

    ``kind`` is ``default``, ``linear``, ``dynamic``, ``llama3`` or ``yarn``; the other fields are
    those of Hugging Face's ``rope_scaling``. :mod:`kvant.models.rope` has the maths.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A Llama-shaped decoder: pre-norm, RoPE, grouped-query attention, gated MLP.

    ``windows[layer]`` is the sliding window of a layer in tokens, or None for full attention.
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

    @property
    def kv_shape(self) -> KVShape:
        """Geometry of the KV cache."""
        return KVShape(
            num_layers=self.num_layers, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim
        )
