"""Linear layers and rotary embedding on the CPU, in C++ (src/native/linear.hpp).

Weights are packed when a layer is made: whole, or as codes that are multiplied with rows rounded
to 8 bits with a scale for each group of inputs ("dynamic", as activations of W8A8 and in
llama.cpp's Q8 dot products). A row's result has the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvant.errors import ConfigError
from kvant.formats.hadamard import signs
from kvant.kernels import _native
from kvant.kernels.backend import Backend, Batch
from kvant.kernels.cpu import CPUBackend, address, chosen_isa, default_threads
from kvant.memory import Arena
from kvant.models.codes import Codes
from kvant.models.config import DecoderConfig
from kvant.models.ops import Norm

if TYPE_CHECKING:
    from kvant.models.decoder import LayerWeights

__all__ = ["CPULayers", "CPULinear", "CPUOps"]

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_CODES = {8: 3, 4: 4}
_BLOCK = 16  # outputs of a line
_WIDEST = 256  # inputs of a group: rows of x have a scale for each, and one for all loses much


class CPULinear:
    """See :class:`kvant.models.ops.Linear`. Of what it is made of nothing is kept but a packed
    copy.

    Args:
        weight: ``[out, in]``; float32, float16, bfloat16 or codes (in groups of a multiple of 8
            inputs, or one group).
        bias: ``[out]`` or None.
        gated: see :meth:`kvant.models.ops.Ops.linear`.
        threads: most threads that work on it.
        arena: where the packed weights go.
    """

    def __init__(
        self,
        weight: Tensor | Codes,
        bias: Tensor | None = None,
        *,
        gated: bool = False,
        threads: int,
        arena: Arena,
    ) -> None:
        outputs, inputs = weight.shape
        self._inputs, self._outputs = inputs, outputs // 2 if gated else outputs
        lay = partial(_lay, gated=gated)
        turns = None
        if isinstance(weight, Codes):
            weight = weight.regrouped(_WIDEST)
            kind, rotation = _CODES[weight.bits], weight.rotation
            assert rotation in (0, 8, 16, 32, 64), rotation
            turns = signs(inputs) if rotation else None
            groups, group_words = weight.scale.shape[1], _code_words(weight)
            packed, factors = _pack_codes(weight, lay)
        else:
            kind, rotation = _KINDS[weight.dtype], 0
            words = _pad(weight, 4 // weight.element_size()).view(torch.int32)
            groups, group_words = 1, words.shape[1]
            packed, factors = lay(words).permute(0, 3, 1, 2), None
        packed = packed.flatten(1)
        nbytes = packed.numel() * packed.element_size()
        try:
            lines = arena.take(nbytes).reshape(len(packed), -1)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"the system refuses {nbytes} bytes for weights ({error}); take a smaller model "
                "or weight_dtype"
            ) from None
        torch.from_numpy(lines).view(torch.int32).copy_(packed)
        laid = None if bias is None else lay(bias.float()).flatten().numpy().copy()
        self._memory = lines, factors, turns, laid  # the native layer has their addresses only
        self.native = _native.Linear(
            isa=chosen_isa(),
            kind=kind,
            gated=gated,
            offsets=isinstance(weight, Codes) and weight.offset is not None,
            inputs=inputs,
            outputs=self._outputs,
            groups=groups,
            group_words=group_words,
            rotation=rotation,
            signs=turns,
            lines=lines,
            factors=factors,
            bias=laid,
            threads=threads,
        )

    def __call__(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        add: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """In float32 or exact integers, rounded once."""
        rows = x.shape[0]
        out = x.new_empty((rows, self._outputs), dtype=dtype) if add is None else add
        assert (x.shape[1], x.stride(1)) == (self._inputs, 1), x.shape
        assert (out.shape[1], out.stride(1)) == (self._outputs, 1), out.shape
        assert len(out) == rows, out.shape
        weight, eps = 0, 0.0
        if norm is not None:
            assert norm.weight.dtype == torch.float32, norm.weight.dtype
            assert norm.weight.numel() == self._inputs, norm.weight.shape
            weight, eps = norm.weight.data_ptr(), norm.eps
        self.native.forward(address(x), address(out), rows, weight, eps, add is not None)
        return out


def _lay(x: Tensor, *, gated: bool) -> Tensor:
    """Rows ``[out, ...]`` as pairs of blocks ``[pairs, 2, 16, ...]``, padded with zeros."""
    halves = 2 if gated else 1
    x = x.view(halves, len(x) // halves, *x.shape[1:])
    missing = -x.shape[1] % (2 * _BLOCK // halves)
    if missing:
        x = torch.cat((x, x.new_zeros(halves, missing, *x.shape[2:])), 1)
    out = x.view(halves, -1, 2 // halves, _BLOCK, *x.shape[2:]).transpose(0, 1)
    return out.flatten(1, 2)


def _pad(x: Tensor, multiple: int) -> Tensor:
    """With zeros behind each row up to a multiple of elements; dense."""
    missing = -x.shape[-1] % multiple
    return torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()


def _code_words(weight: Codes) -> int:
    """Words of a group: of 4 codes, in pairs if they have 4 bits."""
    unit = 4 if weight.bits == 8 else 8
    assert weight.scale.shape[1] == 1 or weight.group % unit == 0, weight.group
    return -(-weight.group // unit) * unit // 4


def _pack_codes(
    weight: Codes, lay: Callable[[Tensor], Tensor]
) -> tuple[Tensor, NDArray[np.float32]]:
    """Lines ``[pairs, ...]`` and factors ``[32 pairs]``."""
    groups = weight.scale.shape[1]
    codes = _pad(_pad(weight.codes, weight.group * groups), 4 * _code_words(weight))
    words = codes.view(torch.int32).view(codes.shape[0], groups, -1)
    if weight.bits == 4:
        words = words[..., 0::2] | words[..., 1::2] << 4
    packed = lay(words).permute(0, 3, 4, 1, 2).flatten(2)  # [pairs, groups, words * 32]
    factor = _factors(weight)
    lines = [packed]
    for part in (weight.scale, weight.offset):
        if part is not None:
            halves = lay(part / factor).flatten(1, 2).transpose(1, 2).half()
            lines.append(halves.clone(memory_format=torch.contiguous_format).view(torch.int32))
    return torch.cat(lines, 2), lay(factor).flatten().numpy()


def _factors(weight: Codes) -> Tensor:
    """What scales and offsets of an output are divided by before they are rounded to float16: the
    scale itself if it is the only one, else a power of two. ``[out, 1]``."""
    factor = weight.scale.abs().amax(1, keepdim=True)
    if weight.scale.shape[1] > 1 or weight.offset is not None:
        if weight.offset is not None:
            offset = weight.offset.abs().amax(1, keepdim=True)
            factor = torch.maximum(factor * 2**weight.bits, offset)
        factor = torch.exp2(torch.log2(factor).floor())
    return factor.masked_fill(factor == 0, 1)


class CPUOps:
    """See :class:`kvant.models.ops.Ops`.

    Args:
        num_threads: default as for the backend.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self._threads = num_threads or default_threads()
        self._arena = Arena()
        self._rotary = _native.Rotary(isa=chosen_isa(), threads=self._threads)

    def place(self, x: Tensor) -> Tensor:
        """``x``."""
        return x

    def linear(
        self, weight: Tensor | Codes, bias: Tensor | None = None, *, gated: bool = False
    ) -> CPULinear:
        """See :meth:`kvant.models.ops.Ops.linear`."""
        return CPULinear(weight, bias, gated=gated, threads=self._threads, arena=self._arena)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """In float32."""
        out = cos.new_empty(x.shape)
        rows, heads, dim = x.shape
        tables = address(cos), address(sin)
        self._rotary.forward(address(x), *tables, address(out), rows, heads, dim)
        return out

    def fuse(self, layers: Sequence[LayerWeights], config: DecoderConfig) -> CPULayers:
        """See :meth:`kvant.models.ops.Ops.fuse`."""
        return CPULayers(layers, config, self._rotary, self._threads)


class CPULayers:
    """See :class:`kvant.models.ops.Layers`. The layers are of :class:`CPULinear`."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        config: DecoderConfig,
        rotary: _native.Rotary,
        threads: int,
    ) -> None:
        self._layers = layers  # the native blocks only have their addresses
        self._native = _native.Decoder(
            rotary,
            [_block(each, window) for each, window in zip(layers, config.windows, strict=True)],
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.head_dim**-0.5,
            threads,
        )

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, backend: Backend
    ) -> Tensor | None:
        """See :meth:`kvant.models.ops.Layers.__call__`."""
        if not isinstance(backend, CPUBackend):
            return None
        out: Tensor = backend.run(self._native, batch, x, cos, sin)
        return out


def _block(layer: LayerWeights, window: int | None) -> _native.Block:
    linears = {name: getattr(layer, name).native for name in ("qkv", "output", "gate_up", "down")}
    return _native.Block(
        **linears,
        attention_norm=layer.attention_norm.weight.data_ptr(),
        mlp_norm=layer.mlp_norm.weight.data_ptr(),
        eps=layer.mlp_norm.eps,
        window=window or 0,
    )
