"""The decoder: one forward pass over a batch of rows, for the whole Llama-shaped family.

It owns weights and nothing else. Keys and values go to the backend, which attends to what it
encoded; rows of prompts and of decodes are the same to it.

A row's result should not depend on how many rows are computed with it, and with torch's CPU
libraries it does not, but for small batches: below some number of rows they sum in another order
(docs/log.md has the measurements). So small batches are padded to that number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kvant.kernels.backend import Backend, Batch
from kvant.models.config import DecoderConfig
from kvant.models.ops import Ops, TorchOps
from kvant.models.rope import attention_factor, inverse_frequencies, rope_tables

# Rows from which F.linear gives each row the same bits, whatever the number of rows.
_MIN_ROWS = {torch.float32: 12, torch.bfloat16: 2, torch.float16: 1}

__all__ = ["Decoder", "DecoderWeights", "LayerWeights", "Linear"]


@dataclass(frozen=True, slots=True)
class Linear:
    """``x @ weight.T + bias``; weight ``[out, in]``."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One block. ``qkv`` is [(H + 2 Hkv) * D, hidden], queries first; ``gate_up`` is
    [2 * intermediate, hidden], gate first."""

    attention_norm: Tensor
    qkv: Linear
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """``embedding`` and ``head`` are [vocabulary, hidden]; they may be the same tensor."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Linear


class Decoder:
    """A model ready to run.

    Args:
        config: its shape.
        weights: its parameters, all of one dtype, which is also that of activations.
        longest: the longest context that will be asked of it, in tokens.
        ops: who computes the small operations; torch unless told otherwise.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        *,
        longest: int,
        ops: Ops | None = None,
    ) -> None:
        self.config = config
        self._ops = ops or TorchOps()
        self.weights = weights
        self._scale = config.head_dim**-0.5
        self._inv_freq = inverse_frequencies(
            config.rope, config.head_dim, max_positions=config.max_positions, longest=longest
        )
        self._rope_factor = attention_factor(config.rope)

    @torch.inference_mode()
    def forward(self, batch: Batch, backend: Backend) -> NDArray[np.float32]:
        """Run all rows of ``batch``; logits of ``batch.logit_rows``, float32 ``[R, V]``."""
        x = F.embedding(torch.from_numpy(batch.tokens), self.weights.embedding)
        rows, logit_rows = x.shape[0], torch.from_numpy(batch.logit_rows)
        x = self._padded(x)
        cos, sin = rope_tables(torch.from_numpy(batch.positions), self._inv_freq, self._rope_factor)
        last = self.config.num_layers - 1
        for index, layer in enumerate(self.weights.layers):
            qkv = layer.qkv(self._norm(x, layer.attention_norm))[:rows]
            attended = self._attention(index, qkv, cos, sin, batch, backend)
            if index == last:  # the other rows have no further use
                x, attended = self._padded(x[logit_rows]), attended[logit_rows]
            x = x + layer.output(self._padded(attended))
            gate_up = layer.gate_up(self._norm(x, layer.mlp_norm))
            x = x + layer.down(self._ops.silu_mul(gate_up))
        logits = self.weights.head(self._norm(x, self.weights.norm))[: len(logit_rows)]
        out: NDArray[np.float32] = logits.float().numpy()
        return out

    def _attention(
        self, index: int, qkv: Tensor, cos: Tensor, sin: Tensor, batch: Batch, backend: Backend
    ) -> Tensor:
        """Attention of one layer from its fused projections ``[T, (H + 2 Hkv) * D]``."""
        config = self.config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        by_head = qkv.view(-1, heads + 2 * kv_heads, dim)
        q, k, v = torch.split(by_head, [heads, kv_heads, kv_heads], dim=1)
        backend.write(index, self._ops.rope(k, cos, sin), v, batch)
        out: Tensor = backend.attend(
            index,
            self._ops.rope(q, cos, sin),
            batch,
            scale=self._scale,
            window=config.windows[index],
        )
        return out.to(qkv.dtype).reshape(-1, heads * dim)

    def _padded(self, x: Tensor) -> Tensor:
        """``x [n, ...]`` with rows of zeros up to the number from which results are stable."""
        missing = _MIN_ROWS[x.dtype] - x.shape[0]
        return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = self._ops.rms_norm(x, weight, self.config.norm_eps)
        return out
