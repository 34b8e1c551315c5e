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
from kvant.loading.packed import Packing
from kvant.loading.tokenizer import Tokenizer
from kvant.models.codes import QUANTIZERS, Codes
from kvant.models.config import DecoderConfig
from kvant.models.decoder import DecoderWeights, LayerWeights
from kvant.models.ops import Linear, Norm, Ops

__all__ = ["Checkpoint", "Progress", "load_weights", "their_name"]

Progress = Callable[[int, int], None]
"""Called with layers loaded so far and in all."""


class Checkpoint(Protocol):
    """An opened model on disk."""

    config: DecoderConfig
    quantized: Packing | None
    """How linear layers are stored, if they are meant to be used as the codes that they are."""

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

    def codes(self, name: str, layer: int | None = None) -> Codes | None:
        """Our weight ``name`` as the codes that the checkpoint has of it, or None if it has none
        that :class:`Codes` can stand for. Raises ModelError as :meth:`tensor`."""
        ...


_READERS = 4  # layers read at a time; decoding them runs mostly outside of Python's lock


def their_name(names: Mapping[str, str], name: str, layer: int | None) -> str | None:
    """What a checkpoint calls our tensor ``name``, by its family's ``names``; None if nothing."""
    stem, _, kind = name.rpartition(".")
    pattern = names.get(stem)
    return pattern and f"{pattern.format(layer)}.{kind}"


class _Reader:
    """Reads tensors of a checkpoint, converted and checked against the config's shapes."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, weight_dtype: str, ops: Ops
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._weight_dtype = weight_dtype
        self._ops = ops

    def tensor(self, name: str, layer: int | None, *shape: int) -> Tensor:
        return self._ops.place(self._read(name, layer, shape).to(self._dtype))

    def norm(self, name: str, layer: int | None) -> Norm:
        config = self._checkpoint.config
        weight = self.tensor(f"{name}.weight", layer, config.hidden_size)
        return Norm(weight.float(), config.norm_eps)

    def linear(
        self,
        names: list[tuple[str, int]],
        layer: int | None,
        inputs: int,
        *,
        bias: bool = False,
        gated: bool = False,
        change: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> Linear:
        """One linear layer fused from several: ``names`` are (name, outputs) in row order;
        ``change`` puts the rows of all into another order."""
        weight = self._weight([(f"{name}.weight", out) for name, out in names], layer, inputs)
        weight = weight.rows(change) if isinstance(weight, Codes) else change(weight)
        biases = [self.tensor(f"{name}.bias", layer, out) for name, out in names if bias]
        return self._ops.linear(weight, change(_fuse(biases)) if biases else None, gated=gated)

    def head(self, embedding: Tensor) -> Linear:
        """The layer that makes logits. Tied to the embedding it is the same tensor, unless it has
        codes."""
        config = self._checkpoint.config
        codes = self._weight_dtype != "auto" or self._checkpoint.quantized
        if config.tie_embeddings and not codes:
            return self._ops.linear(embedding)
        name = "embedding" if config.tie_embeddings else "head"
        return self.linear([(name, config.vocab_size)], None, config.hidden_size)

    def _weight(
        self, names: list[tuple[str, int]], layer: int | None, inputs: int, *, keep: bool = True
    ) -> Tensor | Codes:
        """Parts that are to be fused must be of one kind: if they are not, none keeps the codes
        that the checkpoint has of it."""
        parts = [self._part(name, layer, (out, inputs), keep) for name, out in names]
        codes = [part for part in parts if isinstance(part, Codes)]
        floats = [part for part in parts if isinstance(part, Tensor)]
        if not codes:
            return _fuse(floats)
        if not floats and (fused := Codes.concat(codes)):
            return fused
        return self._weight(names, layer, inputs, keep=False)

    def _part(
        self, name: str, layer: int | None, shape: tuple[int, int], keep: bool
    ) -> Tensor | Codes:
        wanted = self._weight_dtype
        if wanted == "int4" and layer is None:
            wanted = "int8"  # the head decides between close tokens: 4 bits would cost too much
        codes = None
        if keep and (wanted != "auto" or self._checkpoint.quantized):
            codes = self._checkpoint.codes(name, layer)
        if codes is not None and wanted in ("auto", f"int{codes.bits}"):
            self._check(name, layer, codes.shape, shape)
        else:
            weight = self._read(name, layer, shape)
            if wanted not in QUANTIZERS:
                return weight.to(self._dtype)
            codes = QUANTIZERS[wanted](weight)  # not of a rounded weight
        if not codes.finite():
            raise ModelError(
                f"tensor {_where(name, layer)} has values that are not finite; "
                "download the model again"
            )
        return codes

    def _read(self, name: str, layer: int | None, shape: tuple[int, ...]) -> Tensor:
        found = self._checkpoint.tensor(name, layer)
        self._check(name, layer, tuple(found.shape), shape)
        return found

    @staticmethod
    def _check(
        name: str, layer: int | None, found: tuple[int, ...], wanted: tuple[int, ...]
    ) -> None:
        if found != wanted:
            raise ModelError(
                f"tensor {_where(name, layer)} has shape {list(found)}, "
                f"the config wants {list(wanted)}; config and weights are not of the same model"
            )


def _where(name: str, layer: int | None) -> str:
    return name if layer is None else f"{name} of layer {layer}"


def _fuse(parts: list[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _ungroup(x: Tensor, config: DecoderConfig) -> Tensor:
    """Rows from (KV head: its queries, key, value) to all queries, keys, values."""
    share = config.num_heads // config.num_kv_heads
    rows = x.view(config.num_kv_heads, share + 2, config.head_dim, *x.shape[1:])
    return torch.cat([part.flatten(0, 2) for part in torch.split(rows, [share, 1, 1], dim=1)])


def _load_layer(reader: _Reader, checkpoint: Checkpoint, layer: int) -> LayerWeights:
    config = checkpoint.config
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    bias = config.qkv_bias
    if checkpoint.has("qkv_grouped.weight", layer):
        parts = [("qkv_grouped", q_rows + 2 * kv_rows)]
        ungroup = partial(_ungroup, config=config)
        qkv = reader.linear(parts, layer, hidden, bias=bias, change=ungroup)
    else:
        parts = [("q", q_rows), ("k", kv_rows), ("v", kv_rows)]
        qkv = reader.linear(parts, layer, hidden, bias=bias)
    mlp_bias = config.mlp_bias
    gate_up = [("gate", inner), ("up", inner)]
    return LayerWeights(
        attention_norm=reader.norm("attention_norm", layer),
        qkv=qkv,
        output=reader.linear([("output", hidden)], layer, q_rows, bias=config.output_bias),
        mlp_norm=reader.norm("mlp_norm", layer),
        gate_up=reader.linear(gate_up, layer, hidden, bias=mlp_bias, gated=True),
        down=reader.linear([("down", hidden)], layer, inner, bias=mlp_bias),
    )


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    weight_dtype: str,
    ops: Ops,
    progress: Progress | None = None,
) -> DecoderWeights:
    """Read all weights of ``checkpoint``.

    Args:
        checkpoint: where they are.
        dtype: of activations and of weights that are no codes.
        weight_dtype: see :class:`kvant.config.EngineConfig`.
        ops: makes the linear layers.
        progress: told of the layers.

    Raises:
        ModelError: a tensor is missing, damaged or of another shape than the config says.
    """
    config = checkpoint.config
    reader = _Reader(checkpoint, dtype, weight_dtype, ops)
    embedding = reader.tensor("embedding.weight", None, config.vocab_size, config.hidden_size)
    layers = []
    with ThreadPoolExecutor(_READERS) as pool:
        for layer in pool.map(partial(_load_layer, reader, checkpoint), range(config.num_layers)):
            layers.append(layer)
            if progress:
                progress(len(layers), config.num_layers)
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(layers),
        norm=reader.norm("norm", None),
        head=reader.head(embedding),
    )
