"""What a decoder is made of besides attention, linear layers and rotary embedding: the contract,
and in plain torch.

A row's result never depends on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kvant.kernels.backend import Backend, Batch
from kvant.models.codes import Codes
from kvant.models.config import DecoderConfig

if TYPE_CHECKING:
    from kvant.models.decoder import LayerWeights

__all__ = ["Layers", "Linear", "Norm", "Ops", "TorchLinear", "TorchOps"]

# Rows from which F.linear gives each row the same bits, whatever the number of rows; with fewer
# torch's CPU libraries sum in another order (docs/log.md has the measurements).
_MIN_ROWS = {torch.float32: 12, torch.bfloat16: 2, torch.float16: 1}


class Norm(NamedTuple):
    """``x / sqrt(mean(x^2) + eps) * weight``; weight float32 ``[hidden]``."""

    weight: Tensor
    eps: float


class Linear(Protocol):
    """A linear layer with what stands directly before and after it."""

    def __call__(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        add: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``norm(x) @ weight.T + bias``, gated if the layer is, of ``x [T, in]``; ``[T, out]``.

        Args:
            x: rows with a dense last dimension.
            norm: RMS norm of the rows, if any.
            add: ``[T, out]``, to which the result is added in place; it is returned.
            dtype: of the result, default that of ``x``.
        """
        ...


class Layers(Protocol):
    """All blocks of a decoder as one operation."""

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, backend: Backend
    ) -> Tensor | None:
        """What :meth:`kvant.models.decoder.Decoder.forward` does between the embedding and the
        head, with the same result; ``x [T, hidden]`` is used up. None if ``backend`` is not one
        that it knows."""
        ...


class Ops(Protocol):
    """Makes linear layers, and rotates."""

    def place(self, x: Tensor) -> Tensor:
        """``x``, a parameter that is none of a linear layer, where it is computed with."""
        ...

    def linear(
        self, weight: Tensor | Codes, bias: Tensor | None = None, *, gated: bool = False
    ) -> Linear:
        """A layer of ``weight [out, in]`` and ``bias [out]``. If it is ``gated`` the first half of
        outputs are gates of the second: the result is ``silu(gate) * up [T, out / 2]``."""
        ...

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate pairs (d, d + D/2) of ``x [T, H, D]``, dense in its last dimension, by the angles
        of ``cos, sin [T, 1, D/2]`` (float32, dense); the result is float32 and dense."""
        ...

    def fuse(self, layers: Sequence[LayerWeights], config: DecoderConfig) -> Layers | None:
        """All blocks as one operation, if there is one; ``layers`` are made of linear layers from
        here."""
        ...


class TorchLinear:
    """See :class:`Linear`; computed in the weight's type."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> None:
        self.weight, self.bias, self.gated = weight, bias, gated

    def __call__(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        add: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See :meth:`Linear.__call__`."""
        rows, dtype = x.shape[0], dtype or x.dtype
        x = x.to(self.weight.dtype)
        if norm is not None:
            x = functional.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)
        missing = _MIN_ROWS[x.dtype] - rows
        x = functional.pad(x, (0, 0, 0, missing)) if missing > 0 else x
        out = functional.linear(x, self.weight, self.bias)[:rows]
        if self.gated:
            gate, up = out.chunk(2, dim=-1)
            out = functional.silu(gate) * up
        return out.to(dtype) if add is None else add.add_(out)


class TorchOps:
    """See :class:`Ops`. Codes are expanded to ``dtype``."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype

    def place(self, x: Tensor) -> Tensor:
        """``x``."""
        return x

    def linear(
        self, weight: Tensor | Codes, bias: Tensor | None = None, *, gated: bool = False
    ) -> Linear:
        """See :meth:`Ops.linear`."""
        if isinstance(weight, Codes):
            weight = weight.dequantize().to(self._dtype)
        return TorchLinear(weight, bias, gated=gated)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See :meth:`Ops.rope`."""
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def fuse(self, layers: Sequence[LayerWeights], config: DecoderConfig) -> None:
        """None: torch has no such operation."""
