"""The decoder: one forward pass over a batch of rows, for the whole Llama-shaped family.

It owns weights and nothing else. Keys and values go to the backend, which attends to what it
encoded; rows of prompts and of decodes are the same to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvant.kernels.backend import Backend, Batch
from kvant.models.config import DecoderConfig
from kvant.models.logits import HostLogits
from kvant.models.ops import Linear, Norm, Ops
from kvant.models.rope import RopeTables, attention_factor, inverse_frequencies

__all__ = ["Decoder", "DecoderWeights", "LayerWeights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One block. ``qkv`` makes (H + 2 Hkv) * D outputs, queries first; ``gate_up`` is gated."""

    attention_norm: Norm
    qkv: Linear
    output: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """``embedding`` is [vocabulary, hidden]; its type is that of activations."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Norm
    head: Linear


class Decoder:
    """A model ready to run.

    Args:
        config: its shape.
        weights: its parameters.
        ops: who rotates.
        longest: the longest context that will be asked of it, in tokens.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        ops: Ops,
        *,
        longest: int,
    ) -> None:
        self.config = config
        self._ops = ops
        self._fused = ops.fuse(weights.layers, config)
        self.weights = weights
        self._scale = config.head_dim**-0.5
        inv_freq = inverse_frequencies(
            config.rope, config.head_dim, max_positions=config.max_positions, longest=longest
        )
        self._tables = RopeTables(inv_freq, attention_factor(config.rope))

    @torch.inference_mode()
    def forward(self, batch: Batch, backend: Backend) -> HostLogits:
        """Run all rows of ``batch``; logits of ``batch.logit_rows``, float32 ``[R, V]``."""
        x = F.embedding(torch.from_numpy(batch.tokens), self.weights.embedding)
        cos, sin = self._tables.at(batch.positions)
        out = self._fused(x, cos, sin, batch, backend) if self._fused else None
        if out is None:
            out = self._run(x, cos, sin, batch, backend)
        logits = self.weights.head(out, norm=self.weights.norm, dtype=torch.float32)
        return HostLogits(logits.numpy())

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, backend: Backend) -> Tensor:
        """All blocks; the rows of ``x`` whose logits are wanted."""
        logit_rows = torch.from_numpy(batch.logit_rows)
        last = self.config.num_layers - 1
        for index, layer in enumerate(self.weights.layers):
            qkv = layer.qkv(x, norm=layer.attention_norm)
            attended = self._attention(index, qkv, cos, sin, batch, backend)
            if index == last:  # the other rows have no further use
                x, attended = x[logit_rows], attended[logit_rows]
            x = layer.output(attended, add=x)
            x = layer.down(layer.gate_up(x, norm=layer.mlp_norm), add=x)
        return x

    def _attention(
        self, index: int, qkv: Tensor, cos: Tensor, sin: Tensor, batch: Batch, backend: Backend
    ) -> Tensor:
        """Attention of one layer from its fused projections ``[T, (H + 2 Hkv) * D]``."""
        config = self.config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        by_head = qkv.view(-1, heads + 2 * kv_heads, config.head_dim)
        rotated = self._ops.rope(by_head[:, :-kv_heads], cos, sin)  # queries and keys
        backend.write(index, rotated[:, heads:], by_head[:, -kv_heads:], batch)
        out: Tensor = backend.attend(
            index,
            rotated[:, :heads],
            batch,
            scale=self._scale,
            window=config.windows[index],
        )
        return out.flatten(1)
