"""Linear layers that a Hugging Face checkpoint stores as codes: AWQ, GPTQ, compressed-tensors.

A weight is ``scale * (code - zero)`` with a scale and a zero for each output and group of inputs.
Codes and zeros are packed into int32 words, first one in the lowest bits. The methods differ in
names, in what a row of a tensor is and in the order within a word:

    awq     qweight [in, out/8], qzeros [groups, out/8], scales [groups, out]; codes of a word are
            outputs 0, 2, 4, 6, 1, 3, 5, 7 (AutoAWQ's version "gemm", WQLinear_GEMM)
    gptq    qweight [in*bits/32, out], qzeros [groups, out*bits/32], scales [groups, out] and
            g_idx [in], the group of each input; words of zeros are stored less one in each code,
            but for checkpoint_format "gptq_v2" (GPTQModel, convert_gptq_v1_to_v2_format)
    compressed-tensors
            weight_packed [out, in*bits/32], weight_scale [out, groups] and, if it has them,
            weight_zero_point [out*bits/32, groups] and weight_g_idx [in] ("pack-quantized"); or
            weight [out, in] of signed bytes and weight_scale [out, 1] ("int-quantized")

Which layers are stored so, their names tell: biases, norms and embeddings are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvant.errors import ModelError
from kvant.models.codes import Codes

__all__ = ["Packing", "Read", "find_packing"]

Read = Callable[[str], Tensor | None]
"""A tensor of a layer by the last part of its name, None if there is none."""

_KNOWN = (
    "kvant reads awq (gemm, 4 bits), gptq (4, 8) and compressed-tensors (pack-quantized 4, 8 and "
    "int-quantized 8), in groups of a multiple of 8; take another quantization of this model"
)


@dataclass(frozen=True, slots=True)
class Packing:
    """How the linear layers of a checkpoint are stored.

    Attributes:
        kind: ``awq``, ``gptq``, ``gptq_v2``, ``pack-quantized`` or ``int-quantized``.
        bits: of a code, 4 or 8.
        group: inputs that share a scale, None for all.
        act_order: whether inputs are said to be in another order (``desc_act``): such layers
            are expanded.
    """

    kind: str
    bits: int
    group: int | None
    act_order: bool = False

    @property
    def mark(self) -> str:
        """The last part of a name that only layers stored so have."""
        marks = {"pack-quantized": "weight_packed", "int-quantized": "weight_scale"}
        return marks.get(self.kind, "qweight")

    def order(self, read: Read) -> Tensor | None:
        """The order of inputs in which groups lie side by side, ``[in]``; None if they do already.
        Layers of GPTQ with act-order (``desc_act``) have them scattered."""
        groups = self._groups(read)
        if groups is None or bool((groups[1:] >= groups[:-1]).all()):
            return None
        return torch.argsort(groups, stable=True)

    def _groups(self, read: Read) -> Tensor | None:
        """The group of each input."""
        return read("weight_g_idx" if self.kind == "pack-quantized" else "g_idx")

    def codes(self, read: Read) -> Codes:
        """A layer, its inputs in the order of :meth:`order`.

        Raises:
            ValueError: a part is missing or does not fit the others.
        """
        codes, zeros, scale = _UNPACKERS[self.kind](read, self.bits)
        outputs, inputs = codes.shape
        group = min(self.group or inputs, inputs)
        groups = -(-inputs // group)
        for part in (zeros, scale):
            if part is not None and part.shape != (outputs, groups):
                raise ValueError(
                    f"has {list(part.shape)} scales or zeros, {outputs} outputs and {inputs} "
                    f"inputs in groups of {group} want {[outputs, groups]}"
                )
        found, side_by_side = self._groups(read), torch.arange(inputs) // group
        if found is not None and not torch.equal(found.sort().values.long(), side_by_side):
            raise ValueError(f"has a g_idx that does not put {group} of {inputs} in each group")
        if (order := self.order(read)) is not None:
            codes = codes[:, order]
        scale, offset, middle = scale.float().contiguous(), None, 2 ** (self.bits - 1)
        if zeros is not None and bool((zeros != middle).any()):
            offset = scale * (middle - zeros.float())
        return Codes(codes.contiguous(), scale, offset, self.bits, group)

    def dequantize(self, read: Read) -> Tensor:
        """A layer as float32 ``[out, in]``; errors as in :meth:`codes`."""
        weight, order = self.codes(read).dequantize(), self.order(read)
        return weight if order is None else weight[:, torch.argsort(order)]


def _need(read: Read, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """A matrix, transposed."""
    found = read(name)
    if found is None:
        raise ValueError(f"has no {name}")
    if found.ndim != 2 or dtype not in (None, found.dtype):
        kind = "matrix" if dtype is None else f"matrix of {dtype}"
        raise ValueError(f"has {name} {list(found.shape)} of {found.dtype}, not a {kind}")
    return found.T


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Codes of words along the last dimension, as bytes."""
    found = words.contiguous().view(torch.uint8)
    return found if bits == 8 else torch.stack((found & 15, found >> 4), -1).flatten(-2)


_Parts = tuple[Tensor, Tensor | None, Tensor]  # codes [out, in], zeros and scales [out, groups]


def _awq(read: Read, bits: int) -> _Parts:
    def unpack(name: str) -> Tensor:
        words = _unpack(_need(read, name, torch.int32).T, bits)
        return words.view(len(words), -1, 2, 4).transpose(2, 3).flatten(1).T

    return unpack("qweight"), unpack("qzeros"), _need(read, "scales")


def _gptq(read: Read, bits: int, *, missing: int = 1) -> _Parts:
    words = _need(read, "qzeros", torch.int32).T + missing * _ONES[bits]  # carries as intended
    codes = _unpack(_need(read, "qweight", torch.int32), bits)
    return codes, _unpack(words, bits).T, _need(read, "scales")


def _pack_quantized(read: Read, bits: int) -> _Parts:
    codes = _unpack(_need(read, "weight_packed", torch.int32).T, bits)
    scale, zeros = _need(read, "weight_scale").T, None
    if read("weight_zero_point") is not None:
        zeros = _unpack(_need(read, "weight_zero_point", torch.int32), bits).T[: len(codes)]
    return codes, zeros, scale


def _int_quantized(read: Read, bits: int) -> _Parts:
    if bits != 8 or read("weight_zero_point") is not None:
        raise ValueError("has weights of int-quantized that are not symmetric with 8 bits")
    codes = _need(read, "weight", torch.int8).T.contiguous().view(torch.uint8) ^ 128
    return codes, None, _need(read, "weight_scale").T


_ONES = {4: 0x11111111, 8: 0x01010101}
_UNPACKERS: dict[str, Callable[[Read, int], _Parts]] = {
    "awq": _awq,
    "gptq": _gptq,
    "gptq_v2": partial(_gptq, missing=0),
    "pack-quantized": _pack_quantized,
    "int-quantized": _int_quantized,
}


def find_packing(config: Mapping[str, Any]) -> Packing | None:
    """What ``quantization_config`` of a config.json says; None if there is none.

    Raises:
        ModelError: a method or a kind of one that kvant cannot read.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    try:
        if found.get("config_groups") == {}:  # only its KV cache is to be quantized
            return None
        kind, bits, group = _describe(found)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ModelError(f"quantization_config is not understood ({error}); {_KNOWN}") from None
    if kind not in _UNPACKERS or bits not in ((4,) if kind == "awq" else (4, 8)):
        raise ModelError(f'quantization "{kind}" with {bits} bits is not supported; {_KNOWN}')
    if group is not None and (type(group) is not int or group < 8 or group % 8):
        raise ModelError(f"quantization in groups of {group!r} inputs is not supported; {_KNOWN}")
    return Packing(kind, bits, group, act_order=bool(found.get("desc_act")))


def _describe(found: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """Kind, bits and group of a quantization_config; other kinds than of ``_UNPACKERS`` are
    named as the config names them."""
    method = str(found.get("quant_method"))
    if method == "compressed-tensors":
        return _describe_compressed(found)
    bits, group = found.get("bits"), found.get("group_size")
    if method == "awq":
        version = found.get("version") or found.get("format") or "gemm"
        if found.get("backend") == "llm-awq":
            version = "llm-awq"
        kind = "awq" if str(version).lower() == "gemm" else f"awq {version}"
    elif method == "gptq":
        layout = found.get("checkpoint_format") or found.get("format") or "gptq"
        kind = str(layout) if str(layout) in ("gptq", "gptq_v2") else f"gptq {layout}"
        if found.get("is_marlin_format"):
            kind = "gptq marlin"
    else:
        kind = method
    return kind, bits, None if group == -1 else group


def _describe_compressed(found: Mapping[str, Any]) -> tuple[str, Any, Any]:
    kinds = {
        (
            str(part.get("format") or found.get("format")),
            str(part["weights"].get("type")),
            part["weights"].get("num_bits"),
            part["weights"].get("group_size"),
            str(part["weights"].get("strategy")),
        )
        for part in found.get("config_groups", {}).values()
    }
    if len(kinds) != 1:
        raise ValueError("its config_groups are not of one kind")
    ((kind, number, bits, group, strategy),) = kinds
    if number != "int" or strategy not in ("group", "channel"):
        kind = f"{kind} {number} {strategy}"
    return kind, bits, group if strategy == "group" else None
