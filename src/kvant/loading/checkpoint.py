"""A checkpoint is a config, named tensors and a tokenizer, whatever files they come from.

The two kinds (:mod:`.safetensors`, :mod:`.gguf`) answer by our names (see
:mod:`kvant.models.families`); this module fuses what they give into the decoder's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from kvant.errors import ModelError
from kvant.loading.tokenizer import Tokenizer
from kvant.models.config import DecoderConfig
from kvant.models.decoder import DecoderWeights, LayerWeights, Linear

__all__ = ["Checkpoint", "Progress", "load_weights", "their_name"]

Progress = Callable[[int, int], None]
"""Called with layers loaded so far and in all."""


class Checkpoint(Protocol):
    """An opened model on disk."""

    config: DecoderConfig

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer, chat template included."""
        ...

    def has(self, name: str, layer: int | None = None) -> bool:
        """Whether the checkpoint has our tensor ``name`` (such as ``q.weight``)."""
        ...

    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """Read our tensor ``name``; weights are [out, in]. Raises ModelError if it is missing
        or damaged."""
        ...


_READERS = 4  # layers read at a time; decoding them runs mostly outside of Python's lock


def their_name(names: Mapping[str, str], name: str, layer: int | None) -> str | None:
    """What a checkpoint calls our tensor ``name``, by its family's ``names``; None if nothing."""
    stem, _, kind = name.rpartition(".")
    pattern = names.get(stem)
    return pattern and f"{pattern.format(layer)}.{kind}"


class _Reader:
    """Reads tensors of a checkpoint, converted and checked against the config's shapes."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype

    def tensor(self, name: str, layer: int | None, *shape: int) -> Tensor:
        found = self._checkpoint.tensor(name, layer)
        if tuple(found.shape) != shape:
            where = name if layer is None else f"{name} of layer {layer}"
            raise ModelError(
                f"tensor {where} has shape {list(found.shape)}, the config wants {list(shape)}; "
                "config and weights are not of the same model"
            )
        return found.to(self._dtype)

    def linear(
        self, names: list[tuple[str, int]], layer: int | None, inputs: int, *, bias: bool
    ) -> Linear:
        """One linear layer fused from several: ``names`` are (name, outputs) in row order."""
        weights = [self.tensor(f"{name}.weight", layer, out, inputs) for name, out in names]
        biases = [self.tensor(f"{name}.bias", layer, out) for name, out in names if bias]
        return Linear(_fuse(weights), _fuse(biases) if biases else None)


def _fuse(parts: list[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _ungroup(linear: Linear, config: DecoderConfig) -> Linear:
    """Reorder rows from (KV head: its queries, key, value) to all queries, keys, values."""
    share = config.num_heads // config.num_kv_heads

    def reorder(x: Tensor) -> Tensor:
        rows = x.view(config.num_kv_heads, share + 2, config.head_dim, -1)
        q, k, v = torch.split(rows, [share, 1, 1], dim=1)
        return torch.cat([part.reshape(-1, rows.shape[-1]) for part in (q, k, v)])

    bias = reorder(linear.bias).squeeze(-1) if linear.bias is not None else None
    return Linear(reorder(linear.weight), bias)


def _load_layer(reader: _Reader, checkpoint: Checkpoint, layer: int) -> LayerWeights:
    config = checkpoint.config
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    bias = config.qkv_bias
    if checkpoint.has("qkv_grouped.weight", layer):
        rows = q_rows + 2 * kv_rows
        qkv = _ungroup(reader.linear([("qkv_grouped", rows)], layer, hidden, bias=bias), config)
    else:
        parts = [("q", q_rows), ("k", kv_rows), ("v", kv_rows)]
        qkv = reader.linear(parts, layer, hidden, bias=bias)
    mlp_bias = config.mlp_bias
    return LayerWeights(
        attention_norm=reader.tensor("attention_norm.weight", layer, hidden),
        qkv=qkv,
        output=reader.linear([("output", hidden)], layer, q_rows, bias=config.output_bias),
        mlp_norm=reader.tensor("mlp_norm.weight", layer, hidden),
        gate_up=reader.linear([("gate", inner), ("up", inner)], layer, hidden, bias=mlp_bias),
        down=reader.linear([("down", hidden)], layer, inner, bias=mlp_bias),
    )


def load_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, progress: Progress | None = None
) -> DecoderWeights:
    """Read all weights of ``checkpoint`` as ``dtype``.

    Raises:
        ModelError: a tensor is missing, damaged or of another shape than the config says.
    """
    config = checkpoint.config
    reader = _Reader(checkpoint, dtype)
    embedding = reader.tensor("embedding.weight", None, config.vocab_size, config.hidden_size)
    layers = []
    with ThreadPoolExecutor(_READERS) as pool:
        for layer in pool.map(partial(_load_layer, reader, checkpoint), range(config.num_layers)):
            layers.append(layer)
            if progress:
                progress(len(layers), config.num_layers)
    head = embedding
    if not config.tie_embeddings:
        head = reader.tensor("head.weight", None, config.vocab_size, config.hidden_size)
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(layers),
        norm=reader.tensor("norm.weight", None, config.hidden_size),
        head=Linear(head),
    )
