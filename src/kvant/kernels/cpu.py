"""The CPU backend: codes multiplied as integers, in C++ (src/native; attend.hpp has the method).

Queries and attention weights are rounded to integers for it, to 16 and 14 bits where pages hold
codes of 5 bits and more, else to 8 and 8; formats of floats are computed in float32. A row's
result has the same bits in any chunk, batch or division among threads, but not on any processor:
the environment variable ``KVANT_ISA`` forces one of :func:`available_isas`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvant.errors import ConfigError, did_you_mean
from kvant.formats import KVFormat
from kvant.formats.affine import Affine
from kvant.formats.float8 import Float8
from kvant.formats.hadamard import signs
from kvant.formats.midpoint import Midpoint
from kvant.formats.plain import Plain
from kvant.formats.spec import LayerLayout
from kvant.kernels import _native
from kvant.kernels.backend import Batch, KVMemory

__all__ = [
    "CPUBackend",
    "address",
    "arithmetic",
    "available_isas",
    "check_cpu",
    "chosen_isa",
    "default_threads",
]

_MAX_HEAD_DIM = 256
_DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
_PLAIN = {"f32": 0, "f16": 1, "bf16": 2}
_FAMILIES: dict[type[KVFormat], int] = {Plain: 0, Affine: 1, Midpoint: 2, Float8: 3}


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this processor and build have kernels for, best last."""
    return tuple(_native.available_isas())


def chosen_isa() -> str:
    """The best instruction set, or the one that ``KVANT_ISA`` forces.

    Raises:
        ConfigError: it names one that is not there.
    """
    available = available_isas()
    forced = os.environ.get("KVANT_ISA")
    if not forced:
        return available[-1]
    if forced not in available:
        raise ConfigError(
            f'KVANT_ISA is "{forced}"{did_you_mean(forced, available)} Kernels that run on this '
            f"processor: {', '.join(available)}; unset it for the best"
        )
    return forced


def check_cpu(head_dim: int) -> None:
    """Whether the kernels can serve a model.

    Raises:
        ConfigError: head_dim is above 256 or no multiple of 8; KVANT_ISA cannot be met.
    """
    chosen_isa()
    if head_dim > _MAX_HEAD_DIM or head_dim % 8:
        raise ConfigError(
            f"the cpu backend has kernels for a head_dim that is a multiple of 8 up to "
            f'{_MAX_HEAD_DIM}, and the model has {head_dim}; take backend="reference"'
        )


def arithmetic(fmt: KVFormat) -> tuple[int, int]:
    """The largest integers to which queries are rounded if ``fmt`` holds keys, and attention
    weights if it holds values; (0, 0) means float32. (``wide`` in attend.hpp decides it.)"""
    if not isinstance(fmt, (Affine, Midpoint)):
        return 0, 0
    return (32512, 16383) if fmt.bits > 4 else (127, 255)


def default_threads() -> int:
    """``OMP_NUM_THREADS``, or the cores that this process may use, whichever is less."""
    cores = len(os.sched_getaffinity(0))
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return min(int(asked), cores) if asked.isdecimal() and int(asked) else cores


class CPUBackend:
    """The contract is :class:`kvant.kernels.backend.Backend`.

    Raises:
        ConfigError: head_dim is above 256 or no multiple of 8; KVANT_ISA cannot be met.
    """

    name = "cpu"

    def __init__(self, memory: KVMemory, num_threads: int | None = None) -> None:
        spec, shape = memory.spec, memory.shape
        check_cpu(shape.head_dim)
        self.isa = chosen_isa()
        self._memory = memory  # the kernels only have its addresses
        pairs = zip(spec.layout(shape), spec.fine.layout(shape), strict=True)
        self._native = _native.Backend(
            isa=self.isa,
            base=_native.Pool(memory.base.pages),
            recent=_native.Pool(memory.recent.pages),
            scratch=_native.Pool(memory.scratch.pages),
            num_recent=memory.recent.num_pages,
            has_recent=spec.recent is not None,
            num_sink=int(spec.sink),
            kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            signs=signs(shape.head_dim).tolist(),
            layers=[tuple(_layer(each, shape.head_dim) for each in pair) for pair in pairs],
            threads=num_threads or default_threads(),
        )
        self._batch: Batch | None = None
        self._plan = _native.Plan()
        self._rows = 0  # of the batch

    def write(self, layer: int, k: Any, v: Any, batch: Batch) -> None:
        """Encode new tokens; a group that becomes full is re-encoded from its fine page."""
        keys, values = _dense(k), _dense(v)
        shape = self._memory.shape
        plan = self._plan_of(batch)
        self._check(layer, shape.num_kv_heads, keys, values)
        self._native.write(plan, layer, address(keys), address(values))

    def attend(
        self,
        layer: int,
        q: Any,
        batch: Batch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: NDArray[np.float32] | None = None,
    ) -> Any:
        """Attention by tiles of a 64-group and splits of eight pages."""
        queries = _dense(q)
        heads = queries.shape[1]
        plan = self._plan_of(batch)
        self._check(layer, heads, queries)
        assert heads % self._memory.shape.num_kv_heads == 0, heads
        assert sinks is None or sinks.shape == (heads,), sinks
        out = _empty_like(queries)
        self._native.attend(
            plan,
            layer,
            address(queries),
            address(out),
            heads,
            scale,
            window or 0,
            softcap or 0.0,
            sinks,
        )
        return out if isinstance(out, np.ndarray) else out.to(q.dtype)

    def run(self, decoder: _native.Decoder, batch: Batch, x: Any, cos: Any, sin: Any) -> Any:
        """``write`` and ``attend`` of all layers, with what ``decoder`` has around them.

        Args:
            decoder: made for a model of this cache's shape.
            batch: the rows.
            x: dense ``[T, hidden]``, which is used up.
            cos, sin: float32 ``[T, 1, D/2]``.

        Returns:
            ``[R, hidden]``, the results of ``batch.logit_rows``.
        """
        plan = self._plan_of(batch)
        rows = batch.logit_rows
        assert x.shape[0] == cos.shape[0] == sin.shape[0] >= self._rows, x.shape
        assert all(each.is_contiguous() for each in (x, cos, sin))
        assert len(rows) == 0 or (rows[-1] < len(x) and (rows[1:] > rows[:-1]).all()), rows
        out = x.new_empty((len(rows), x.shape[1]))
        tables = address(cos), address(sin)
        decoder.forward(self._native, plan, address(x), *tables, x.shape[0], rows, address(out))
        return out

    def _check(self, layer: int, heads: int, *tensors: Any) -> None:
        """The kernels believe what they are told."""
        shape = self._memory.shape
        assert 0 <= layer < shape.num_layers, layer
        for x in tensors:
            assert tuple(x.shape[1:]) == (heads, shape.head_dim), x.shape
            assert x.shape[0] >= self._rows, x.shape

    def _plan_of(self, batch: Batch) -> _native.Plan:
        """The native form of a batch, made once for all its layers."""
        if self._batch is not batch:
            plan = _native.Plan()
            for seq in batch.sequences:
                plan.add(seq.row, seq.start, seq.end, seq.pages, seq.fine_pages)
            self._batch, self._plan = batch, plan
            self._rows = max((s.row + s.end - s.start for s in batch.sequences), default=0)
        return self._plan


def _layer(layer: LayerLayout, head_dim: int) -> _native.Layer:
    return _native.Layer(layer.offset, _part(layer.k, head_dim), _part(layer.v, head_dim))


def _part(fmt: KVFormat, head_dim: int) -> _native.Part:
    """A format at a head_dim, with the offsets of its planes."""
    offsets, at = {}, 0
    for plane in fmt.planes(head_dim):
        offsets[plane.name] = at
        at += plane.nbytes
    codes = [(int(name[5:]), at) for name, at in offsets.items() if name.startswith("codes")]
    widths, places = zip(*([*codes, (0, 0), (0, 0)])[:2], strict=True)
    return _native.Part(
        family=_FAMILIES[type(fmt)],
        dtype=_PLAIN.get(fmt.name, 0),
        bits=fmt.bits,
        rotated=fmt.rotated,
        by_page=fmt.by_page,
        nbytes=at,
        scale=offsets.get("scale", 0),
        zero=offsets.get("zero", 0),
        codes=places,
        widths=widths,
    )


def _dense(x: Any) -> Any:
    """``x``, or a copy whose last dimension is dense and whose type the kernels know."""
    if isinstance(x, np.ndarray):
        x = x.astype(np.float32, copy=False)
        return x if x.strides[-1] == x.itemsize else np.ascontiguousarray(x)
    x = x if str(x.dtype)[6:] in _DTYPES else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def address(x: Any) -> tuple[int, int, int, int]:
    """Where ``x [T, heads, D]``, or one of fewer dimensions, is: address, type and the strides of
    the first two in elements (that of a last dimension is 1)."""
    if isinstance(x, np.ndarray):
        size = x.itemsize
        return x.ctypes.data, 0, x.strides[0] // size, x.strides[1] // size
    return x.data_ptr(), _DTYPES[str(x.dtype)[6:]], x.stride(0), x.stride(min(1, x.dim() - 1))


def _empty_like(x: Any) -> Any:
    """Memory for outputs, dense."""
    return np.empty(x.shape, x.dtype) if isinstance(x, np.ndarray) else x.new_empty(x.shape)
