"""A GGUF file: metadata, tokenizer and block-quantized weights, decoded by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from kvant.errors import ModelError
from kvant.loading.checkpoint import their_name
from kvant.loading.tokenizer import Tokenizer
from kvant.models.config import DecoderConfig, RopeConfig

__all__ = ["GGUFCheckpoint"]

# Whether llama.cpp's converter permuted q and k rows to interleave the pairs that RoPE rotates.
_PERMUTED = {"llama": True, "internlm2": True, "qwen2": False}

_NAMES = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "blk.{}.attn_norm",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "output": "blk.{}.attn_output",
    "mlp_norm": "blk.{}.ffn_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
}


class _Reader(GGUFReader):
    """A reader that slices a plain array: slicing a numpy.memmap, as the package does for each of
    150,000 strings of a vocabulary, takes more than twice as long."""

    @property
    def data(self) -> Any:
        """The file's bytes."""
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        self._data = np.asarray(value)


def _open(path: Path) -> GGUFReader:
    try:
        return _Reader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path} is not a complete GGUF file ({reason}); download it again"
        ) from None


class GGUFCheckpoint:
    """See :class:`kvant.loading.checkpoint.Checkpoint`.

    Raises:
        ModelError: the file is damaged or cut short, or of an unsupported architecture.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        reader = _open(path)
        self._fields = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._architecture = str(self._fields.get("general.architecture"))
        if self._architecture not in _PERMUTED:
            raise ModelError(
                f'GGUF architecture "{self._architecture}" is not supported; '
                f"kvant runs {', '.join(_PERMUTED)}"
            )
        self.config = self._read_config()

    def _field(self, key: str, default: Any = None) -> Any:
        value = self._fields.get(f"{self._architecture}.{key}", default)
        if value is None:
            raise ModelError(
                f'{self._path} has no metadata "{self._architecture}.{key}"; '
                "convert the model again"
            )
        return value

    def _read_config(self) -> DecoderConfig:
        heads, hidden = self._field("attention.head_count"), self._field("embedding_length")
        layers = self._field("block_count")
        window = self._fields.get(f"{self._architecture}.attention.sliding_window") or None
        return DecoderConfig(
            architecture=self._architecture,
            vocab_size=int(self._tensor_of("embedding.weight", None).shape[1]),
            hidden_size=hidden,
            intermediate_size=self._field("feed_forward_length"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=self._field("attention.head_count_kv", heads),
            head_dim=self._field("attention.key_length", hidden // heads),
            max_positions=self._field("context_length"),
            norm_eps=self._field("attention.layer_norm_rms_epsilon"),
            rope=self._read_rope(),
            windows=(window,) * layers,
            tie_embeddings=not self.has("head.weight"),
            qkv_bias=self.has("q.bias", 0),
            output_bias=self.has("output.bias", 0),
            mlp_bias=self.has("gate.bias", 0),
        )

    def _read_rope(self) -> RopeConfig:
        kind = self._field("rope.scaling.type", "none")
        factors = self._tensors.get("rope_freqs.weight")
        return RopeConfig(
            theta=self._field("rope.freq_base", 10000.0),
            kind="default" if kind == "none" else kind,
            factor=self._field("rope.scaling.factor", 1.0),
            original_max_positions=self._fields.get(
                f"{self._architecture}.rope.scaling.original_context_length"
            ),
            freq_factors=tuple(np.asarray(factors.data).ravel().tolist()) if factors else None,
        )

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer from the file's metadata."""
        return Tokenizer.from_gguf(self._fields)

    def has(self, name: str, layer: int | None = None) -> bool:
        """Whether the file has our tensor ``name``."""
        return their_name(_NAMES, name, layer) in self._tensors

    def _tensor_of(self, name: str, layer: int | None) -> Any:
        theirs = their_name(_NAMES, name, layer)
        if theirs not in self._tensors:
            raise ModelError(f'tensor "{theirs}" is missing in {self._path}; download it again')
        return self._tensors[theirs]

    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """Read and decode our tensor ``name`` as float32."""
        found = self._tensor_of(name, layer)
        try:
            values = dequantize(found.data, found.tensor_type)
        except NotImplementedError:
            raise ModelError(
                f'tensor "{found.name}" has type {found.tensor_type.name}, which the gguf '
                "package cannot decode; use another quantization of this model"
            ) from None
        tensor = torch.from_numpy(np.array(values, np.float32, order="C"))
        stem = name.partition(".")[0]
        if stem in ("q", "k") and _PERMUTED[self._architecture]:
            heads = self.config.num_heads if stem == "q" else self.config.num_kv_heads
            tensor = _unpermute(tensor, heads)
        return tensor


def _unpermute(x: Tensor, heads: int) -> Tensor:
    """Rows (head, pair, half) back to (head, half, pair): RoPE pairs are (d, d + D/2) here."""
    rows = x.view(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
    return rows.transpose(1, 2).reshape(x.shape)
