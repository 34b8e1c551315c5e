"""The triton backend: write and attend on an NVIDIA GPU.

Pages have the bytes of the reference. What a query sees of a token depends on positions only, as
everywhere in kvant, and a decode's result has the same bits in any batch; but a decode and a prompt
are computed by different kernels, which add in different orders, so results of another chunking
differ by the rounding of float32 sums.

Without a GPU it runs in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kvant.formats import PAGE_TOKENS
from kvant.kernels.backend import Batch, KVMemory
from kvant.kernels.triton.attend import attend_split
from kvant.kernels.triton.layout import Layer, Part, Store, padded
from kvant.kernels.triton.merge import ROWS, merge_rows, merge_splits
from kvant.kernels.triton.plan import DecodePlan, Decodes, Plan, Round, num_splits
from kvant.kernels.triton.prefill import attend_rows
from kvant.kernels.triton.rotation import rotate_rows
from kvant.kernels.triton.stage import stage_pages
from kvant.kernels.triton.write import fill_pages, rope_and_write, write_rows

__all__ = ["STAGE_BYTES", "TritonBackend"]

STAGE_BYTES = 256 << 20
"""Most memory for staged keys and values of 16 bits; longer contexts are staged in rounds."""

_TENSOR_CORES = (8, 0)
"""From here on there is bfloat16, and Triton has products on tensor cores. Before, a product is of
fused multiply-adds, whose operands leave no register free: tiles are small, and kernels are told to
take what registers there are."""


class _Options(NamedTuple):
    """Those of ``attend``; 0 and None where there is none."""

    scale: float
    window: int
    softcap: float
    sinks: Tensor | None


class _Formats(NamedTuple):
    """One layer in pages of one kind."""

    store: Store
    layer: Layer
    is_fine: bool


class TritonBackend:
    """The contract is :class:`kvant.kernels.backend.Backend`; :meth:`rope_write` and
    :meth:`attend_rows` are the two verbs for a decoder that is on the device itself.

    Arrays are tensors on the device, or numpy arrays and CPU tensors, which are taken there.

    Args:
        memory: pools on the device.
        capability: the compute capability that kernels are for, default the device's.
    """

    name = "triton"

    def __init__(self, memory: KVMemory, capability: tuple[int, int] | None = None) -> None:
        spec, shape = memory.spec, memory.shape
        self._spec, self._shape = spec, shape
        self._num_recent = memory.recent.num_pages
        base, recent, scratch = (
            _tensor(pool.pages) for pool in (memory.base, memory.recent, memory.scratch)
        )
        self.device: torch.device = base.device
        self._base = Store.open(spec, shape, base)
        self._recent = Store.open(spec.fine, shape, recent)
        self._scratch = Store.open(spec.fine, shape, scratch, one_layer=True)
        self._has_recent = spec.recent is not None
        self._is_old = (capability or _capability(self.device)) < _TENSOR_CORES
        self._batch: Batch | None = None
        self._plan: Plan | None = None

    def plan(self, batch: Batch) -> Plan:
        """The device arrays of a batch, made and sent once for all its layers."""
        if self._batch is not batch or self._plan is None:
            self._plan = Plan.make(batch, self._spec, self.device, self._room())
            self._batch = batch
        return self._plan

    def decode_plan(self, num_sequences: int, num_pages: int) -> DecodePlan:
        """Arrays that stay in place, for batches of up to ``num_sequences`` rows, each of another
        sequence with up to ``num_pages`` base pages."""
        return DecodePlan.empty(self._spec, self.device, num_sequences, num_pages)

    def write(self, layer: int, k: Any, v: Any, batch: Batch) -> None:
        """Encode new tokens; a group that becomes full is re-encoded from its fine page."""
        plan = self.plan(batch)
        keys, values = (_dense(self._here(x)) for x in (k, v))
        write_rows(
            keys, values, plan.positions, plan.row_pages, *self._targets(), self._num_recent, layer
        )
        self._fill(layer, plan)

    def rope_write(self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, plan: Plan) -> Tensor:
        """Rotate queries and keys of ``qkv [T, (H + 2 Hkv) * D]`` by their positions (``cos, sin``
        float32 ``[positions, D/2]``), and :meth:`write`; returns the queries, ``[T, H, D]``."""
        dim, kv_heads = self._shape.head_dim, self._shape.num_kv_heads
        heads = qkv.shape[1] // dim - 2 * kv_heads
        queries = qkv.new_empty((len(qkv), heads, dim))
        rope_and_write(
            qkv,
            heads,
            kv_heads,
            cos,
            sin,
            plan.positions,
            plan.row_pages,
            *self._targets(),
            self._num_recent,
            layer,
            queries,
        )
        self._fill(layer, plan)
        return queries

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
        """Splits for single rows, staged pages for the others."""
        out = self.attend_rows(
            layer,
            self._here(q),
            self.plan(batch),
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=None if sinks is None else self._here(sinks),
        )
        return out.cpu().numpy() if isinstance(q, np.ndarray) else out.to(q.device)

    def attend_rows(
        self,
        layer: int,
        q: Tensor,
        plan: Plan,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """:meth:`attend` for queries on the device, ``[T, H, D]``; ``sinks`` float32 ``[H]``."""
        q = q.contiguous()
        out = torch.empty_like(q)
        options = _Options(scale, window or 0, softcap or 0.0, sinks)
        base = _Formats(self._base, self._base.layers[layer], is_fine=False)
        fine = _Formats(self._recent, self._recent.layers[layer], is_fine=True)
        kinds = (base, fine) if self._has_recent else (base,)
        rotated: dict[bool, Tensor] = {False: q}
        if any(kind.layer.k.rotated for kind in kinds):
            rotated[True] = rotate_rows(q.view(-1, q.shape[-1]))
        if plan.decodes.rows.numel():
            self._attend_decodes(kinds, rotated, out, plan, options)
        if plan.prompt_rows.numel():
            self._attend_prompts(kinds, rotated, out, plan, options)
        return out

    def _attend_decodes(
        self,
        kinds: tuple[_Formats, ...],
        rotated: dict[bool, Tensor],
        out: Tensor,
        plan: Plan,
        options: _Options,
    ) -> None:
        decodes: Decodes = plan.decodes
        count, width = decodes.table.shape
        splits = num_splits(width)
        direct = self._is_direct(kinds, options) and splits == 1
        slots = splits + self._has_recent
        acc, ml = self._partials(0 if direct else count, slots, out)
        share = out.shape[1] // self._shape.num_kv_heads
        for formats in kinds:
            table = decodes.fine if formats.is_fine else decodes.table
            layer = formats.layer
            types = self._type(layer.k, out), self._type(layer.v, out)
            grid = (count, self._shape.num_kv_heads, 1 if formats.is_fine else splits)
            attend_split[grid](
                rotated[layer.k.rotated],
                out,
                acc,
                ml,
                decodes.rows,
                plan.positions,
                table,
                table.shape[1],
                formats.store.pages,
                formats.store.page_bytes,
                layer.offset,
                slots - 1 if formats.is_fine else 0,
                slots,
                options.scale,
                options.softcap,
                options.window,
                K=layer.k,
                V=layer.v,
                K_TYPE=types[0],
                V_TYPE=types[1],
                SHARE=share,
                M=max(16, 1 << (share - 1).bit_length()),
                NUM_SINK=int(self._spec.sink),
                RECENT=self._has_recent,
                FINE=formats.is_fine,
                SOFTCAP=options.softcap > 0,
                DIRECT=direct,
                num_warps=4,
                **self._resources(3, scalar=tl.float32 in types),
            )
        if not direct:
            args = self._merge(kinds, out, (acc, ml), decodes.rows, plan, options)
            merge_splits[count, out.shape[1]](**args, num_slots=slots, num_warps=4)

    def _attend_prompts(
        self,
        kinds: tuple[_Formats, ...],
        rotated: dict[bool, Tensor],
        out: Tensor,
        plan: Plan,
        options: _Options,
    ) -> None:
        direct = self._is_direct(kinds, options) and len(plan.rounds) == 1
        slots = 1 + self._has_recent
        acc, ml = self._partials(0 if direct else len(out), slots, out)
        for part in plan.rounds:
            formats = kinds[part.is_fine]
            staged = self._stage(formats, part, out, options)
            self._attend_round(formats, part, rotated, out, (acc, ml), staged, options, direct)
        if not direct:
            rows, heads = plan.prompt_rows, out.shape[1]
            args = self._merge(kinds, out, (acc, ml), rows, plan, options)
            grid = (-(-len(rows) * heads // ROWS),)
            merge_rows[grid](**args, num_rows=len(rows), heads=heads, R=ROWS, num_warps=4)

    def _stage(
        self, formats: _Formats, part: Round, out: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor]:
        """K and V of a round, ``[Hkv, slots, 64, P]``."""
        k, v = formats.layer.k, formats.layer.v
        types = self._type(k, out), self._type(v, out)
        heads, slots = self._shape.num_kv_heads, len(part.stage)
        shape = heads, slots, 64, k.padded_dim
        keys, values = (out.new_empty(shape, dtype=_TORCH[type_]) for type_ in types)
        stage_pages[slots, heads](
            keys,
            values,
            part.stage,
            formats.store.pages,
            formats.store.page_bytes,
            formats.layer.offset,
            self._scratch.pages,
            self._scratch.page_bytes,
            self._num_recent,
            options.window,
            K=k,
            V=v,
            K_TYPE=types[0],
            V_TYPE=types[1],
            FINE=formats.is_fine,
            num_warps=4,
        )
        return keys, values

    def _attend_round(
        self,
        formats: _Formats,
        part: Round,
        rotated: dict[bool, Tensor],
        out: Tensor,
        partials: tuple[Tensor, Tensor],
        staged: tuple[Tensor, Tensor],
        options: _Options,
        direct: bool,
    ) -> None:
        share = out.shape[1] // self._shape.num_kv_heads
        scalar = any(x.dtype == torch.float32 for x in staged)
        size = self._tile(share, scalar=scalar)
        step = max(1, min(64, size // share))
        grid = len(part.entries), -(-64 // step), self._shape.num_kv_heads
        attend_rows[grid](
            rotated[formats.layer.k.rotated],
            out,
            *partials,
            part.entries,
            *staged,
            staged[0].shape[1],
            int(formats.is_fine),
            1 + self._has_recent,
            options.scale,
            options.softcap,
            options.window,
            D=self._shape.head_dim,
            P=padded(self._shape.head_dim),
            SHARE=share,
            M=size,
            STEP=step,
            SOFTCAP=options.softcap > 0,
            WINDOW=options.window > 0,
            DIRECT=direct,
            num_warps=8 if size >= 64 else 4,
            **self._resources(2, scalar=scalar),
        )

    def _merge(
        self,
        kinds: tuple[_Formats, ...],
        out: Tensor,
        partials: tuple[Tensor, Tensor],
        rows: Tensor,
        plan: Plan,
        options: _Options,
    ) -> dict[str, Any]:
        """The arguments that both merging kernels have."""
        acc, ml = partials
        return {
            "out_ptr": out,
            "acc_ptr": acc,
            "ml_ptr": ml,
            "rows_ptr": rows,
            "positions_ptr": plan.positions,
            "sinks_ptr": ml if options.sinks is None else options.sinks,
            "window": options.window,
            "D": self._shape.head_dim,
            "P": padded(self._shape.head_dim),
            "NUM_SINK": int(self._spec.sink),
            "RECENT": self._has_recent,
            "UNROTATE": kinds[0].layer.v.rotated,
            "UNROTATE_FINE": kinds[-1].layer.v.rotated,
            "SINKS": options.sinks is not None,
        }

    def _partials(self, rows: int, slots: int, out: Tensor) -> tuple[Tensor, Tensor]:
        heads = out.shape[1]
        shape = rows, heads, slots, padded(self._shape.head_dim)
        acc = out.new_empty(shape, dtype=torch.float32)
        return acc, out.new_empty((rows, heads, slots, 2), dtype=torch.float32)

    def _is_direct(self, kinds: tuple[_Formats, ...], options: _Options) -> bool:
        """Whether one kernel's result is the whole one."""
        return not (self._has_recent or kinds[0].layer.v.rotated or options.sinks is not None)

    def _type(self, part: Part, out: Tensor) -> tl.dtype:
        """What a part is multiplied as."""
        if out.dtype == torch.float32 or part.dtype == "f32":
            return tl.float32
        if part.dtype == "bf16":
            return tl.float32 if self._is_old else tl.bfloat16
        return tl.float16

    def _tile(self, share: int, *, scalar: bool) -> int:
        """Rows of a tile, positions times query heads of a KV head: as many as registers hold."""
        needed = max(16, 1 << (share - 1).bit_length())
        if self._is_old or scalar:
            return needed
        if self._shape.head_dim > 128:
            return max(needed, 32)
        return max(needed, 64 if share == 1 else 128)

    def _resources(self, stages: int, *, scalar: bool) -> dict[str, int]:
        """How far ahead a loop loads, and registers. Old GPUs have no copies that run beside it,
        and products that are ``scalar``, of float32, leave no room for them; both need registers
        that the assembler would keep for more blocks."""
        if self._is_old or scalar:
            return {"num_stages": 1, "maxnreg": 255}
        return {"num_stages": stages}

    def _targets(self) -> tuple[Store, Store | None]:
        """Where new tokens go."""
        return (self._recent, self._scratch) if self._has_recent else (self._base, None)

    def _fill(self, layer: int, plan: Plan) -> None:
        if len(plan.fills):
            args = plan.fills, self._recent, self._scratch, self._base, self._num_recent, layer
            fill_pages(*args)

    def _room(self) -> int:
        """Pages that may be staged at a time, as 16-bit numbers; twice the memory as float32."""
        page = 2 * self._shape.num_kv_heads * PAGE_TOKENS * padded(self._shape.head_dim) * 2
        return max(1, STAGE_BYTES // page)

    def _here(self, x: Any) -> Tensor:
        return (torch.from_numpy(x) if isinstance(x, np.ndarray) else x).to(self.device)


_TORCH = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _TENSOR_CORES


def _dense(x: Tensor) -> Tensor:
    """``x [T, H, D]``, or a copy whose rows are dense."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _tensor(pages: Any) -> Tensor:
    return torch.from_numpy(pages) if isinstance(pages, np.ndarray) else pages
