"""The contract between models and backends: a batch, and two verbs.

A backend is the only place where the bytes of pages and arithmetic meet. All backends agree on
every byte they write (the page layout of :mod:`kvant.formats.base`) and are judged by the
reference backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvant.cache.pool import BytePool, Pool
from kvant.formats import PAGE_TOKENS, KVShape, KVSpec

__all__ = ["Backend", "Batch", "BatchSequence", "KVMemory"]


@dataclass(frozen=True, slots=True)
class BatchSequence:
    """One sequence's share of a batch: rows ``[row, row + end - start)`` are its positions
    ``[start, end)``.

    ``pages`` are the base pages that hold positions ``[0, end)`` as far as these are in base
    pages (:mod:`kvant.cache.paged`); with a sink ``pages[0]`` is a page of the recent pool. With
    a recent part ``fine_pages[i]`` is the page, in the finer format, of group ``start // 64 + i``,
    for every group that the rows touch: a recent page (the sink's is ``pages[0]``), or a scratch
    page (``>= num_recent``) for a group that this step fills.
    """

    row: int
    start: int
    end: int
    pages: NDArray[np.int64]
    fine_pages: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """The arrays of one step. T rows in all, in no particular mix of prompt and decode; sequences
    in the order of their rows, without gaps.

    tokens     int64 [T], token ids
    positions  int64 [T], position of each row in its sequence
    logit_rows int64 [R], rows whose logits are wanted
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    sequences: tuple[BatchSequence, ...]
    logit_rows: NDArray[np.int64]


@dataclass(frozen=True)
class KVMemory:
    """All memory of a KV cache: base pages, recent pages and the scratch of one layer.

    Scratch pages hold the finer encoding of groups that a step fills; they live from a layer's
    ``write`` to its ``attend`` and every layer reuses them.
    """

    spec: KVSpec
    shape: KVShape
    base: Pool
    recent: Pool
    scratch: Pool

    @classmethod
    def allocate(
        cls,
        spec: KVSpec,
        shape: KVShape,
        num_pages: int,
        num_recent: int,
        max_step_tokens: int,
        *,
        pool: Callable[[int, int], Pool] = BytePool,
    ) -> KVMemory:
        """Reserve the pools. ``num_recent`` is 0 without a recent part; with one, a step of at
        most ``max_step_tokens`` rows fills one group for each 64 of them. ``pool`` makes one, of so
        many pages of so many bytes."""
        spec.check(shape)
        num_scratch = max_step_tokens // PAGE_TOKENS if num_recent else 0
        fine = spec.fine
        one_layer = max(layer.nbytes for layer in fine.layout(shape))
        return cls(
            spec,
            shape,
            pool(num_pages, spec.page_bytes(shape)),
            pool(num_recent, fine.page_bytes(shape)),
            pool(num_scratch, one_layer),
        )


class Backend(Protocol):
    """Attention over encoded pages. Arrays are those of the model (torch tensors or numpy).

    ``write`` then ``attend``, once per layer per step, in layer order. Neither knows about
    requests, sampling or models beyond the arguments.
    """

    name: str

    def write(self, layer: int, k: Any, v: Any, batch: Batch) -> None:
        """Encode keys and values ``[T, Hkv, D]`` (after RoPE) into the pages of the batch."""
        ...

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
        """Causal attention of queries ``q [T, H, D]`` to the *encoded* keys and values of their
        sequences, their own positions included; returns ``[T, H, D]`` like ``q``.

        Args:
            scale: multiplies the scores.
            window: a query at position t sees positions ``(t - window, t]`` only.
            softcap: a score s, after scaling, becomes ``softcap * tanh(s / softcap)`` (Gemma 2).
            sinks: ``[H]``, finite; the softmax of a head has one more entry with this logit and
                no value, so its weights add up to less than 1 (gpt-oss). Neither scaled nor
                capped.
        """
        ...
