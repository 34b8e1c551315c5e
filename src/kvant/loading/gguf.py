"""A GGUF file: metadata, tokenizer and block-quantized weights.

Blocks of 4 and 8 bits (Q4_0, Q4_1, Q4_K, Q8_0: ggml-common.h and ggml-quants.c of llama.cpp) can
be used as the codes that they are. The gguf package decodes these and all others to floats; Q5 and
Q6 types too, which as codes of 8 bits would take more room than in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import Q4_K, dequantize
from numpy.typing import NDArray
from torch import Tensor

from kvant.errors import ModelError
from kvant.loading.checkpoint import their_name
from kvant.loading.packed import Packing
from kvant.loading.tokenizer import Tokenizer
from kvant.models.codes import Codes
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
        self.quantized: Packing | None = None
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
        return self._in_order(name)(tensor)

    def codes(self, name: str, layer: int | None = None) -> Codes | None:
        """The codes of 4 or 8 bits of our weight ``name``; None if its type has no such codes."""
        found = self._tensor_of(name, layer)
        if found.tensor_type not in _BLOCKS:
            return None
        bits, decode = _BLOCKS[found.tensor_type]
        size = GGML_QUANT_SIZES[found.tensor_type][1]
        codes, scale, offset = decode(np.asarray(found.data).reshape(len(found.data), -1, size))
        group = codes.shape[-1]
        parts = Codes(
            codes=_rows(codes, np.uint8),
            scale=_rows(scale, np.float32),
            offset=None if offset is None else _rows(offset, np.float32),
            bits=bits,
            group=group,
        )
        return parts.rows(self._in_order(name))

    def _in_order(self, name: str) -> Callable[[Tensor], Tensor]:
        """What puts rows of our tensor ``name`` where they belong."""
        stem = name.partition(".")[0]
        if stem in ("q", "k") and _PERMUTED[self._architecture]:
            heads = self.config.num_heads if stem == "q" else self.config.num_kv_heads
            return partial(_unpermute, heads=heads)
        return lambda rows: rows


def _unpermute(x: Tensor, heads: int) -> Tensor:
    """Rows (head, pair, half) back to (head, half, pair): RoPE pairs are (d, d + D/2) here."""
    rows = x.view(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
    return rows.transpose(1, 2).reshape(x.shape)


# Blocks [out, blocks, bytes] -> codes [out, ..., group], scales [out, ...] and offsets.
_Bytes: TypeAlias = NDArray[np.uint8]
_Parts: TypeAlias = tuple[_Bytes, NDArray[np.float32], NDArray[np.float32] | None]


def _rows(x: NDArray[Any], dtype: type[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype).reshape(len(x), -1))


def _half(x: _Bytes) -> NDArray[np.float32]:
    """Numbers of two bytes."""
    return np.ascontiguousarray(x).view(np.float16).astype(np.float32)


def _nibbles(x: _Bytes) -> _Bytes:
    """All low ones, then all high ones."""
    return np.concatenate((x & 15, x >> 4), axis=-1)


def _q4_0(x: _Bytes) -> _Parts:
    return _nibbles(x[..., 2:]), _half(x[..., :2]), None


def _q4_1(x: _Bytes) -> _Parts:
    scale, low = _half(x[..., :2]), _half(x[..., 2:4])
    return _nibbles(x[..., 4:]), scale, low + 8 * scale


def _q4_k(x: _Bytes) -> _Parts:
    """Eight groups of 32 with scales and minima of 6 bits; two groups share bytes."""
    scales, lows = Q4_K.get_scale_min(np.ascontiguousarray(x[..., 4:16]).reshape(-1, 12))
    scale = _half(x[..., :2]) * scales.reshape(*x.shape[:2], 8)
    low = _half(x[..., 2:4]) * lows.reshape(*x.shape[:2], 8)
    codes = _nibbles(x[..., 16:].reshape(*x.shape[:2], 4, 32)).reshape(*x.shape[:2], 8, 32)
    return codes, scale, 8 * scale - low


def _q8_0(x: _Bytes) -> _Parts:
    return x[..., 2:] ^ np.uint8(128), _half(x[..., :2]), None


_Type = GGMLQuantizationType
_BLOCKS: dict[_Type, tuple[int, Callable[[_Bytes], _Parts]]] = {
    _Type.Q4_0: (4, _q4_0),
    _Type.Q4_1: (4, _q4_1),
    _Type.Q4_K: (4, _q4_k),
    _Type.Q8_0: (8, _q8_0),
}
"""Bits and decoder of the types that are codes."""
