"""The decoder on a GPU: matrix products by cuBLAS, everything else by Triton's kernels.

What :mod:`kvant.models.decoder` computes, with rotary embedding and ``write`` in one kernel, and
addition with the norm that follows it in another. A step waits for the device nowhere; steps that
decode can be CUDA graphs (:mod:`kvant.models.graphs`). The residual stream has the model's dtype.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kvant.errors import ConfigError
from kvant.kernels.backend import Backend, Batch
from kvant.kernels.triton.backend import TritonBackend
from kvant.kernels.triton.fused import add_rms_norm, silu_mul
from kvant.kernels.triton.int4 import GROUPS, expand_int4, inner_tiles
from kvant.models.codes import Codes
from kvant.models.config import DecoderConfig
from kvant.models.graphs import ROWS, Capture, DecodeSteps
from kvant.models.logits import DeviceLogits
from kvant.models.ops import Norm, TorchOps
from kvant.models.rope import RopeTables, attention_factor, inverse_frequencies

if TYPE_CHECKING:
    from kvant.models.decoder import DecoderWeights

_log = logging.getLogger("kvant")

__all__ = ["GPUDecoder", "GPULinear", "GPUOps", "choose_dtype", "int4_factors", "int4_pairs"]

_BF16 = (8, 0)  # the least compute capability that has bfloat16
_FEW_ROWS = 64  # up to which codes are multiplied as they are

Product = Callable[[Tensor, torch.dtype], Tensor]
"""``x [T, in]`` times a weight, plus its bias: ``[T, out]`` of some dtype."""


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """What ``EngineConfig.dtype`` means on a device.

    Raises:
        ConfigError: the GPU has no bfloat16.
    """
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < _BF16
    if wanted == "bfloat16" and old:
        major, minor = torch.cuda.get_device_capability(device)
        raise ConfigError(
            f"dtype=bfloat16 needs a GPU of compute capability {_BF16[0]}.{_BF16[1]}, and "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}; take dtype=float16"
        )
    if wanted == "auto":
        return torch.float16 if old else torch.bfloat16
    found: torch.dtype = getattr(torch, wanted)
    return found


@dataclass(frozen=True, slots=True)
class _Floats:
    """A weight ``[out, in]`` and a bias ``[out]``; see :data:`Product`."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == x.dtype or x.device.type == "cpu":
            return functional.linear(x, self.weight, self.bias).to(dtype)
        out = torch.mm(x, self.weight.t(), out_dtype=dtype)  # not rounded in between
        return out if self.bias is None else out.add_(self.bias)


@dataclass(frozen=True, slots=True)
class _Int4:
    """A weight of 4 bits as torch's own product wants it; see :mod:`kvant.kernels.triton.int4`."""

    words: Tensor
    factors: Tensor
    group: int
    bias: Tensor | None

    @classmethod
    def pack(cls, weight: Codes, bias: Tensor | None, tiles: int) -> _Int4:
        """Of codes on the device."""
        words = torch.ops.aten._convert_weight_to_int4pack(int4_pairs(weight.codes), tiles)
        return cls(words, int4_factors(weight), weight.group, bias)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if len(x) > _FEW_ROWS:
            weight = expand_int4(self.words, self.factors, self.group)
            return functional.linear(x, weight, self.bias).to(dtype)
        out: Tensor = torch.ops.aten._weight_int4pack_mm(
            x.contiguous(), self.words, self.group, self.factors
        )
        return (out if self.bias is None else out.add_(self.bias)).to(dtype)


def int4_pairs(codes: Tensor) -> Tensor:
    """Codes ``[out, in]`` of 4 bits two by two, the first in the upper bits: uint8
    ``[out, in / 2]``."""
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def int4_factors(weight: Codes) -> Tensor:
    """bfloat16 ``[groups, out, 2]``: scale, and what the code 8 stands for."""
    scale, offset = weight.scale, weight.offset
    offset = torch.zeros_like(scale) if offset is None else offset
    return torch.stack((scale.t(), offset.t()), dim=2).bfloat16().contiguous()


class GPULinear:
    """See :class:`kvant.models.ops.Linear`."""

    def __init__(self, product: Product, *, gated: bool = False) -> None:
        self._product, self._gated = product, gated

    def __call__(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        add: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See :meth:`kvant.models.ops.Linear.__call__`."""
        dtype = dtype or x.dtype
        if norm is not None:
            x, _ = add_rms_norm(x, None, norm.weight, norm.eps)
        out = self._product(x, dtype)
        out = silu_mul(out) if self._gated else out
        return out if add is None else add.add_(out)


class GPUOps(TorchOps):
    """See :class:`kvant.models.ops.Ops`. Codes of 4 bits stay codes where torch multiplies by them:
    in bfloat16, from compute capability 8.0 on. Others are expanded to ``dtype``.

    Args:
        device: where weights go.
        dtype: of weights and activations.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.device = device
        self._has_int4 = (
            device.type == "cuda"
            and dtype == torch.bfloat16
            and torch.cuda.get_device_capability(device) >= _BF16
        )
        self._told: set[int] = set()  # bits of codes that were expanded
        self._lock = threading.Lock()  # layers are made by several threads

    def linear(
        self, weight: Tensor | Codes, bias: Tensor | None = None, *, gated: bool = False
    ) -> GPULinear:
        """See :meth:`kvant.models.ops.Ops.linear`."""
        bias = None if bias is None else self.place(bias)
        return GPULinear(self._product(weight, bias), gated=gated)

    def _product(self, weight: Tensor | Codes, bias: Tensor | None) -> Product:
        if isinstance(weight, Tensor):
            return _Floats(self.place(weight), bias)
        weight = weight.regrouped(GROUPS[-1])
        tiles = inner_tiles(weight.shape[1])
        if self._has_int4 and tiles and _suits(weight):
            return _Int4.pack(weight.rows(self.place), bias, tiles)
        self._tell(weight.bits)
        return _Floats(self.place(weight.dequantize().to(self._dtype)), bias)

    def _tell(self, bits: int) -> None:
        """Log, once for codes of so many bits, that they are expanded."""
        with self._lock:
            if bits in self._told:
                return
            self._told.add(bits)
        _log.warning(
            "weights of %d bits%s are expanded to %s and take %d bytes each: a GPU multiplies by "
            "codes of 4 bits only, in groups of %d to %d, with dtype=bfloat16, from compute "
            "capability 8.0 on; where memory is short take weight_dtype=int4 there, or a smaller "
            "model",
            bits,
            " (with weight_dtype=int4 those of the head)" if bits == 8 else "",
            str(self._dtype).removeprefix("torch."),
            self._dtype.itemsize,
            GROUPS[0],
            GROUPS[-1],
        )

    def place(self, x: Tensor) -> Tensor:
        """``x`` on the device."""
        return x.to(self.device)


def _suits(weight: Codes) -> bool:
    """Whether torch's int4 product takes such codes."""
    outputs, inputs = weight.shape
    whole = outputs % 8 == 0 and inputs % weight.group == 0
    return weight.bits == 4 and not weight.rotation and weight.group in GROUPS and whole


Attention = Callable[[int, Tensor], Tensor]
"""Attention ``[T, H * D]`` of a layer from its fused projections ``[T, (H + 2 Hkv) * D]``."""


class GPUDecoder:
    """A model ready to run; what :class:`kvant.models.decoder.Decoder` is, on a GPU.

    Args:
        config: its shape.
        weights: its parameters, made with :class:`GPUOps`.
        device: where they are.
        longest: the longest context that will be asked of it, in tokens.
        capture: makes decode steps fast to repeat; None if each is to run kernel by kernel.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        device: torch.device,
        *,
        longest: int,
        capture: Capture | None = None,
    ) -> None:
        self.config, self.weights = config, weights
        self._device, self._capture = device, capture
        self._scale = config.head_dim**-0.5
        inv_freq = inverse_frequencies(
            config.rope, config.head_dim, max_positions=config.max_positions, longest=longest
        )
        tables = RopeTables(inv_freq, attention_factor(config.rope)).at(np.arange(longest))
        self._cos, self._sin = (table.squeeze(1).to(device) for table in tables)
        self._steps: tuple[TritonBackend, DecodeSteps] | None = None

    @torch.inference_mode()
    def forward(self, batch: Batch, backend: Backend) -> DeviceLogits:
        """Run all rows of ``batch``; logits of ``batch.logit_rows``, float32 ``[R, V]``."""
        hidden = self._hidden(batch, backend)
        if len(hidden):
            return DeviceLogits(self.weights.head(hidden, dtype=torch.float32))
        return DeviceLogits(hidden.new_empty((0, self.config.vocab_size), dtype=torch.float32))

    def _hidden(self, batch: Batch, backend: Backend) -> Tensor:
        """Of the wanted rows, what the head takes: ``[R, hidden]``."""
        if not isinstance(backend, TritonBackend):  # such as a probe around it
            tokens, rows = self._send(batch.tokens), self._send(batch.logit_rows)
            return self._run(tokens, rows, self._plain(batch, backend))
        if self._capture is not None:
            found = self._decode_steps(backend, self._capture).run(batch)
            if found is not None:
                return found
        return self._compute(backend, backend.plan(batch))

    def _decode_steps(self, backend: TritonBackend, capture: Capture) -> DecodeSteps:
        if self._steps is None or self._steps[0] is not backend:
            embedding = self.weights.embedding
            room = embedding.new_empty((ROWS[-1], embedding.shape[1]))
            compute: Callable[[Any], Tensor] = lambda plan: self._compute(backend, plan)  # noqa: E731
            self._steps = backend, DecodeSteps(backend, compute, room, capture)
        return self._steps[1]

    def _compute(self, backend: TritonBackend, plan: Any) -> Tensor:
        """:meth:`_hidden` of a plan on the device."""
        config = self.config

        def attention(index: int, qkv: Tensor) -> Tensor:
            q = backend.rope_write(index, qkv, self._cos, self._sin, plan)
            window = config.windows[index]
            out: Tensor = backend.attend_rows(index, q, plan, scale=self._scale, window=window)
            return out.flatten(1)

        return self._run(plan.tokens, plan.logit_rows, attention)

    def _plain(self, batch: Batch, backend: Backend) -> Attention:
        """Attention by the two verbs that every backend has."""
        config, heads, rope = self.config, self.config.num_heads, TorchOps().rope
        positions = self._send(batch.positions)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]

        def attention(index: int, qkv: Tensor) -> Tensor:
            by_head = qkv.view(len(qkv), -1, config.head_dim)
            rotated = rope(by_head[:, : -config.num_kv_heads], cos, sin)
            values = by_head[:, -config.num_kv_heads :]
            backend.write(index, rotated[:, heads:], values, batch)
            queries = rotated[:, :heads].to(qkv.dtype)
            window = config.windows[index]
            out: Tensor = backend.attend(index, queries, batch, scale=self._scale, window=window)
            return out.flatten(1)

        return attention

    def _send(self, x: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(x).to(self._device)

    def _run(self, tokens: Tensor, logit_rows: Tensor, attention: Attention) -> Tensor:
        """All blocks and the last norm, of which only ``logit_rows`` are wanted."""
        layers = self.weights.layers
        x = functional.embedding(tokens, self.weights.embedding)
        normed, x = add_rms_norm(x, None, *layers[0].attention_norm)
        for index, (layer, norm) in enumerate(zip(layers, _next_norms(self.weights), strict=True)):
            attended = attention(index, layer.qkv(normed))
            if index == len(layers) - 1 and len(logit_rows) < len(x):
                if not len(logit_rows):
                    return x[:0]
                x, attended = x.index_select(0, logit_rows), attended.index_select(0, logit_rows)
            normed, x = add_rms_norm(layer.output(attended), x, *layer.mlp_norm)
            normed, x = add_rms_norm(layer.down(layer.gate_up(normed)), x, *norm)
        return normed


def _next_norms(weights: DecoderWeights) -> Sequence[Norm]:
    """The norm that follows each block."""
    return [*(layer.attention_norm for layer in weights.layers[1:]), weights.norm]
