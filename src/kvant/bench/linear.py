"""How fast linear layers are, by the kind of their weights: torch's and kvant's, beside what the
machine can read and multiply.

With few rows a layer is as fast as its weights are read, with many as fast as products are made;
the ceilings of both are measured in turns with the layers. Weights are cold: calls go through
copies of a layer until ``cold`` bytes have passed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kvant.bench.metrics import significant
from kvant.bench.throughput import Row, Tick
from kvant.bench.timing import Ceilings, interleaved, percent
from kvant.errors import ConfigError, did_you_mean
from kvant.models.codes import QUANTIZERS, Codes
from kvant.models.config import DecoderConfig
from kvant.models.cpu import CPUOps

__all__ = ["Kind", "Shape", "choose_kinds", "kinds", "measure_linear", "model_shapes"]

Weight = Tensor | Codes

_DISTINCT = 512
"""Rows of a weight that are encoded; the others are copies, as values do not change speed."""


class Shape(NamedTuple):
    """A layer of ``[out, in]`` weights."""

    outputs: int
    inputs: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``4096x14336``.

        Raises:
            ConfigError: it is no such shape.
        """
        try:
            found = cls(*map(int, text.lower().split("x")))
        except (TypeError, ValueError):
            found = cls(0, 0)
        if min(found) < 8 or found.inputs % 8:
            raise ConfigError(
                f'shape "{text}" must be OUTxIN with inputs a multiple of 8, as 4096x14336'
            )
        return found

    def __str__(self) -> str:
        return f"{self.outputs}x{self.inputs}"


class Kind(NamedTuple):
    """A way to hold weights and to multiply with them.

    Attributes:
        encode: from float32 weights ``[out, in]``.
        layer: from what encode made to a layer of rows ``[T, in]`` in bfloat16.
        numbers: what it multiplies, as :meth:`Ceilings.arithmetic` names it.
    """

    encode: Callable[[Tensor], Weight]
    layer: Callable[[Weight], Callable[[Tensor], Tensor]]
    numbers: str


def kinds(threads: int) -> dict[str, Kind]:
    """All kinds by name; the first is the baseline. ``torch codes`` are products of 8-bit codes and
    nothing else: no scales."""
    ops = CPUOps(threads)
    found = {
        "torch bfloat16": Kind(Tensor.bfloat16, _torch_layer, "bfloat16"),
        "torch codes": Kind(Tensor.char, _torch_codes, "codes"),
        "kvant bfloat16": Kind(Tensor.bfloat16, ops.linear, "bfloat16"),
    }
    quantized = {
        f"kvant {name}": Kind(quantize, ops.linear, "codes")
        for name, quantize in QUANTIZERS.items()
    }
    return found | quantized


def choose_kinds(names: Sequence[str], threads: int) -> dict[str, Kind]:
    """Some of :func:`kinds`, in the order of ``names``; all of them if there are none.

    Raises:
        ConfigError: there is no such kind.
    """
    known = kinds(threads)
    for name in names:
        if name not in known:
            raise ConfigError(
                f'no kind of weights "{name}"{did_you_mean(name, known)} Kinds: {", ".join(known)}'
            )
    return {name: known[name] for name in names or known}


def model_shapes(config: DecoderConfig) -> list[Shape]:
    """The linear layers of a decoder, as they are fused; each shape once."""
    attended = config.num_heads * config.head_dim
    qkv = attended + 2 * config.num_kv_heads * config.head_dim
    layers = (
        Shape(qkv, config.hidden_size),
        Shape(config.hidden_size, attended),
        Shape(2 * config.intermediate_size, config.hidden_size),
        Shape(config.hidden_size, config.intermediate_size),
        Shape(config.vocab_size, config.hidden_size),
    )
    return list(dict.fromkeys(layers))


@torch.inference_mode()
def measure_linear(
    chosen: dict[str, Kind],
    shape: Shape,
    rows: Sequence[int],
    ceilings: Ceilings,
    *,
    repeats: int,
    cold: int,
    tick: Tick,
) -> list[Row]:
    """A row for every number of rows and every kind; kinds and ceilings take turns, figures are
    medians."""
    torch.manual_seed(0)
    weight = torch.randn(min(shape.outputs, _DISTINCT), shape.inputs)
    weights = {name: _repeated(kind.encode(weight), shape) for name, kind in chosen.items()}
    layers = {name: _copies(kind, weights[name], cold) for name, kind in chosen.items()}
    found: list[Row] = []
    for count in rows:
        x = torch.randn(count, shape.inputs).bfloat16()
        calls = {name: partial(layer, x) for name, layer in layers.items()}
        times = interleaved(calls | ceilings.calls, repeats)
        bandwidth, operations = ceilings.bandwidth(times), 2 * count * math.prod(shape)
        for name, kind in chosen.items():
            took, nbytes = times[name], _nbytes(weights[name])
            peak = ceilings.arithmetic(times, kind.numbers)
            row = {
                "shape": str(shape),
                "rows": count,
                "kind": name,
                "seconds": significant(statistics.median(took)),
                "operations_per_second": round(operations / statistics.median(took)),
                "bytes": nbytes,
                "bytes_per_second": round(nbytes / statistics.median(took)),
                "speed_of_first": significant(statistics.median(times[next(iter(chosen))] / took)),
                "bandwidth": round(statistics.median(bandwidth)),
                "percent_of_bandwidth": percent(nbytes / took, bandwidth),
                "arithmetic": round(statistics.median(peak)),
                "percent_of_arithmetic": percent(operations / took, peak),
            }
            found.append(row)
        tick(1)
    return found


def _torch_layer(weight: Weight) -> Callable[[Tensor], Tensor]:
    assert isinstance(weight, Tensor)
    own = weight.clone()
    return lambda x: functional.linear(x, own)


def _torch_codes(weight: Weight) -> Callable[[Tensor], Tensor]:
    assert isinstance(weight, Tensor)
    own = weight.clone().T
    return lambda x: torch._int_mm(x.char(), own)


def _repeated(weight: Weight, shape: Shape) -> Weight:
    """With rows repeated until there are all."""

    def fill(x: Tensor) -> Tensor:
        return x.repeat(-(-shape.outputs // len(x)), 1)[: shape.outputs].contiguous()

    return weight.rows(fill) if isinstance(weight, Codes) else fill(weight)


def _nbytes(weight: Weight) -> int:
    """Of the weights as they are read: codes without gaps, scales and offsets in 16 bits."""
    if isinstance(weight, Tensor):
        return weight.nbytes
    scales = weight.scale.numel() + (0 if weight.offset is None else weight.offset.numel())
    return weight.codes.numel() * weight.bits // 8 + 2 * scales


def _copies(kind: Kind, weight: Weight, cold: int) -> Callable[[Tensor], Tensor]:
    """A layer, each time another copy of it."""
    count = max(1, math.ceil(cold / _nbytes(weight)))
    source = cycle([kind.layer(weight) for _ in range(count)])
    return lambda x: next(source)(x)
