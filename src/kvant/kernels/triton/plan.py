"""What the kernels of a step need to know of its batch: arrays of int32 on the device, sent in one
copy and used by all layers.

Rows are of two kinds. *Decodes* are sequences with one row: their context is cut into splits that
work at the same time (attend.py). *Prompts* have more: their keys and values are staged first, a
round of pages at a time (stage.py, prefill.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvant.formats import PAGE_TOKENS, KVSpec
from kvant.kernels.backend import Batch, BatchSequence

__all__ = ["MAX_SPLITS", "SPLIT_PAGES", "DecodePlan", "Decodes", "Plan", "Round", "num_splits"]

SPLIT_PAGES = 4
"""The least pages of a split."""
MAX_SPLITS = 64
"""The most splits of a context; longer ones have longer splits."""

Int32 = NDArray[np.int32]


def num_splits(num_pages: int) -> int:
    """The most splits that a context of up to so many base pages is cut into."""
    return max(1, min(MAX_SPLITS, -(-num_pages // SPLIT_PAGES)))


class Decodes(NamedTuple):
    """Sequences with one row. A number of -1 is none.

    rows   ``[S]``, the row of each
    table  ``[S, W]``, base pages by group
    fine   ``[S, 2]``, pages of the finer formats: that of the sink, that of its own group
    """

    rows: Tensor
    table: Tensor
    fine: Tensor


class Round(NamedTuple):
    """Pages that are staged together, and who attends to them.

    is_fine  whether they are of the finer formats
    stage    ``[n, 3]``: the page of each slot, its group, the first position that asks for it
    entries  ``[m, 8]``: for the rows of a sequence in one group, (row - position, first position,
             end, group, slot - group, first and end of the groups of keys, whether nothing was
             attended to before)
    """

    is_fine: bool
    stage: Tensor
    entries: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """A step on the device. Arrays are int32; T rows.

    tokens, positions  ``[T]``
    row_pages          ``[T]``, where each row's token is written: a base page, or with a recent
                       part a page of the finer formats (from num_recent on of scratch)
    fills              ``[F, 2]``: finer pages that are full, and the base pages for them
    logit_rows         ``[R]``
    prompt_rows        ``[.]``, rows of prompts
    buffer             all of them
    """

    buffer: Tensor
    tokens: Tensor
    positions: Tensor
    row_pages: Tensor
    fills: Tensor
    logit_rows: Tensor
    prompt_rows: Tensor
    decodes: Decodes
    rounds: tuple[Round, ...]

    @classmethod
    def make(cls, batch: Batch, spec: KVSpec, device: torch.device, room: int) -> Plan:
        """The plan of a batch; at most ``room`` pages are staged at a time."""
        decodes = [seq for seq in batch.sequences if seq.end - seq.start == 1]
        prompts = [seq for seq in batch.sequences if seq.end - seq.start > 1]
        sink, recent = int(spec.sink), spec.recent is not None
        rounds = list(_rounds(prompts, sink=sink, recent=recent, room=room))
        arrays = [
            batch.tokens,
            batch.positions,
            _row_pages(batch.sequences, recent=recent),
            _fills(batch.sequences, sink=sink) if recent else np.empty((0, 2)),
            batch.logit_rows,
            _concat([np.arange(s.row, s.row + s.end - s.start) for s in prompts]),
            *_decode_arrays(decodes, max((len(s.pages) for s in decodes), default=0), sink=sink),
            *(array for _, *pair in rounds for array in pair),
        ]
        sent = _send([np.ascontiguousarray(x, np.int32) for x in arrays], device)
        pairs = zip(sent[10::2], sent[11::2], strict=True)
        staged = tuple(Round(r[0], *pair) for r, pair in zip(rounds, pairs, strict=True))
        return cls(**_named(sent), rounds=staged)


@dataclass(frozen=True, slots=True)
class DecodePlan(Plan):
    """A plan whose arrays stay where they are, for CUDA graphs: of up to ``size`` sequences with
    one row and up to ``width`` base pages each. Row ``i`` is sequence ``i``; what is missing is
    -1, and nothing is written or attended to for it."""

    spec: KVSpec

    @classmethod
    def empty(cls, spec: KVSpec, device: torch.device, size: int, width: int) -> DecodePlan:
        """For batches of nobody yet."""
        sent = _send(_static_arrays((), size, width, spec), device)
        return cls(**_named(sent), rounds=(), spec=spec)

    def load(self, batch: Batch) -> None:
        """Take a batch, of one row for each sequence."""
        assert all(seq.row == row for row, seq in enumerate(batch.sequences)), "rows out of order"
        size, width = self.decodes.table.shape
        arrays = _static_arrays(batch.sequences, size, width, self.spec)
        arrays[0][: len(batch.tokens)] = batch.tokens
        arrays[1][: len(batch.positions)] = batch.positions
        self.buffer.copy_(_pinned(arrays, self.buffer.device), non_blocking=True)


_NAMES = (
    "buffer",
    "tokens",
    "positions",
    "row_pages",
    "fills",
    "logit_rows",
    "prompt_rows",
)


def _named(sent: list[Tensor]) -> dict[str, Any]:
    """The fields of a plan but its rounds."""
    fields: dict[str, Any] = dict(zip(_NAMES, sent, strict=False))
    return fields | {"decodes": Decodes(*sent[len(_NAMES) : len(_NAMES) + 3])}


def _static_arrays(
    sequences: Sequence[BatchSequence], size: int, width: int, spec: KVSpec
) -> list[Int32]:
    sink, recent = int(spec.sink), spec.recent is not None
    count = len(sequences)
    rows, table, fine = _decode_arrays(sequences, width, sink=sink)
    pages = np.full(size, -1, np.int32)
    pages[:count] = _row_pages(sequences, recent=recent)
    fills = np.full((size if recent else 0, 2), -1, np.int32)
    if recent and len(found := _fills(sequences, sink=sink)):
        fills[: len(found)] = found
    missing = ((0, size - count),)
    return [
        np.zeros(size, np.int32),
        np.zeros(size, np.int32),
        pages,
        fills,
        np.arange(size, dtype=np.int32),
        np.empty(0, np.int32),
        np.pad(rows, missing, constant_values=-1),
        np.pad(table, (*missing, (0, 0)), constant_values=-1),
        np.pad(fine, (*missing, (0, 0)), constant_values=-1),
    ]


def _concat(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _row_pages(sequences: Sequence[BatchSequence], *, recent: bool) -> NDArray[Any]:
    """Where each row's token is written."""

    def of(seq: BatchSequence) -> NDArray[np.int64]:
        groups = np.arange(seq.start, seq.end) // PAGE_TOKENS
        if recent:
            return seq.fine_pages[groups - seq.start // PAGE_TOKENS]
        return seq.pages[groups]

    return _concat([of(seq) for seq in sequences])


def _fills(sequences: Sequence[BatchSequence], *, sink: int) -> NDArray[Any]:
    """The groups that a step fills: finer page, base page."""
    found = [
        (seq.fine_pages[group - seq.start // PAGE_TOKENS], seq.pages[group])
        for seq in sequences
        for group in range(max(seq.start // PAGE_TOKENS, sink), seq.end // PAGE_TOKENS)
    ]
    return np.array(found, np.int32).reshape(-1, 2)


def _decode_arrays(
    sequences: Sequence[BatchSequence], width: int, *, sink: int
) -> tuple[Int32, Int32, Int32]:
    rows = np.array([seq.row for seq in sequences], np.int32)
    table = np.full((len(sequences), width), -1, np.int32)
    fine = np.full((len(sequences), 2), -1, np.int32)
    for i, seq in enumerate(sequences):
        table[i, : len(seq.pages)] = seq.pages
        if len(seq.fine_pages):
            fine[i, 1] = seq.fine_pages[0]
            if sink and seq.start >= PAGE_TOKENS:
                fine[i, 0] = seq.pages[0]
    return rows, table, fine


class _Keys(NamedTuple):
    """Pages of consecutive groups from ``first`` on, for the rows of a sequence in the groups
    ``[group, group_end)``; ``again`` if they attended to others in the same formats before."""

    seq: BatchSequence
    pages: NDArray[np.int64]
    first: int
    group: int
    group_end: int
    again: bool


_HostRound = tuple[bool, Int32, Int32]


def _rounds(
    prompts: list[BatchSequence], *, sink: int, recent: bool, room: int
) -> Iterator[_HostRound]:
    """First earlier groups in base pages, as many rounds as they need; then each group's own
    page, then the sink."""
    for part in _parts(prompts, sink=sink, recent=recent, room=room):
        yield _round(part, is_fine=False, recent=recent)
    if not recent:
        return
    own, first = [], []
    for seq in prompts:
        start, end = seq.start // PAGE_TOKENS, -(-seq.end // PAGE_TOKENS)
        for group in range(start, end):
            page = seq.fine_pages[group - start : group - start + 1]
            own.append(_Keys(seq, page, group, group, group + 1, again=False))
        if sink and end > 1:
            first.append(_Keys(seq, seq.pages[:1], 0, max(start, 1), end, again=True))
    for part in (own, first):
        if part:
            yield _round(part, is_fine=True, recent=recent)


def _parts(
    prompts: list[BatchSequence], *, sink: int, recent: bool, room: int
) -> Iterator[list[_Keys]]:
    """Base pages of all prompts in parts of at most ``room``."""
    part: list[_Keys] = []
    left = room
    for seq in prompts:
        group, group_end = seq.start // PAGE_TOKENS, -(-seq.end // PAGE_TOKENS)
        at, end = sink, group_end - recent
        while at < end:
            if not left:
                yield part
                part, left = [], room
            count = min(left, end - at)
            # rows of groups before these keys have no use for them
            first = max(group, at + recent)
            keys = _Keys(seq, seq.pages[at : at + count], at, first, group_end, again=at > sink)
            part.append(keys)
            left -= count
            at += count
    if part:
        yield part


def _round(part: list[_Keys], *, is_fine: bool, recent: bool) -> _HostRound:
    stage: list[tuple[int, ...]] = []
    entries: list[tuple[int, ...]] = []
    for keys in part:
        seq, shift = keys.seq, len(stage) - keys.first
        last = keys.first + len(keys.pages)
        for group in range(keys.group, keys.group_end):
            end = last if is_fine else min(last, group + (not recent))
            entries.append(
                (
                    seq.row - seq.start,
                    seq.start,
                    seq.end,
                    group,
                    shift,
                    keys.first,
                    end,
                    not keys.again,
                )
            )
        stage += [(page, keys.first + i, seq.start) for i, page in enumerate(keys.pages)]
    return is_fine, np.array(stage, np.int32), np.array(entries, np.int32)


def _pinned(arrays: Sequence[Int32], device: torch.device) -> Tensor:
    """All arrays one after another, each from a multiple of 16 bytes on."""
    sizes = [-(-x.size // 4) * 4 for x in arrays]
    host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    flat, at = host.numpy(), 0
    for x, size in zip(arrays, sizes, strict=True):
        flat[at : at + x.size] = x.ravel()
        at += size
    return host


def _send(arrays: Sequence[Int32], device: torch.device) -> list[Tensor]:
    """One tensor on the device, then the arrays as views of it."""
    whole = _pinned(arrays, device).to(device, non_blocking=True)
    out, at = [whole], 0
    for x in arrays:
        out.append(whole[at : at + x.size].view(x.shape))
        at += -(-x.size // 4) * 4
    return out
