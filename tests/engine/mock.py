"""A model made of arithmetic: the next token is a hash of all tokens that it was *shown*.

It keeps what it saw in the engine's own pages: each position's token id is written into the bytes
of its page, and the next token is computed from what is read back through the page table. So a
lost page, a page shared wrongly, a missing copy-on-write or a wrong position changes the text.
"""

from __future__ import annotations

import numpy as np

from kvant.cache.pool import BytePool
from kvant.engine.engine import Engine
from kvant.formats import PAGE_TOKENS, KVShape, KVSpec
from kvant.kernels.backend import Backend, Batch, BatchSequence, KVMemory
from kvant.kernels.null import NullBackend
from kvant.models.logits import HostLogits

# A spec of every kind: by token, K and V apart, with a recent group, a sink, by page, by layer.
SPECS = [
    "bf16",
    "int8",
    "int4",
    "int4h",
    "k=int8h,v=int4h",
    "int4h+r64",
    "int4+r64:bf16",
    "int4h+s64r64",
    "k4v4",
    "k3v3;-1=int8h",
]
VOCAB = 97
_PRIME = 1_000_003
_POWERS = np.array([pow(31, exponent, _PRIME) for exponent in range(4096)])
SHAPE = KVShape(num_layers=1, num_kv_heads=1, head_dim=8)


class PageReadingModel:
    """See the module's docstring."""

    def __init__(self, memory: KVMemory) -> None:
        self.memory = memory

    def forward(self, batch: Batch, backend: Backend) -> HostLogits:
        """One-hot logits of the hash of all tokens up to each wanted row."""
        for seq in batch.sequences:
            self._write(batch, seq)
        rows = {int(row) for row in batch.logit_rows}
        logits = np.zeros((len(rows), VOCAB), np.float32)
        index = 0
        for seq in batch.sequences:
            for row in range(seq.row, seq.row + seq.end - seq.start):
                if row in rows:
                    seen = self._read(seq, seq.start + row - seq.row + 1)
                    logits[index, next_token(seen)] = 1
                    index += 1
        return HostLogits(logits)

    def _place(self, seq: BatchSequence, position: int) -> tuple[BytePool, int]:
        """Where a position's token is kept: a base, recent or scratch page."""
        group, recent = position // PAGE_TOKENS, self.memory.recent.num_pages
        if not recent or group < seq.start // PAGE_TOKENS:
            sink = self.memory.spec.sink and group == 0
            return self.memory.recent if sink else self.memory.base, int(seq.pages[group])
        page = int(seq.fine_pages[group - seq.start // PAGE_TOKENS])
        return (self.memory.recent, page) if page < recent else (self.memory.scratch, page - recent)

    def _write(self, batch: Batch, seq: BatchSequence) -> None:
        tokens = batch.tokens[seq.row : seq.row + seq.end - seq.start]
        for position, token in zip(range(seq.start, seq.end), tokens, strict=True):
            pool, page = self._place(seq, position)
            pool.pages[page, position % PAGE_TOKENS] = token
        if self.memory.recent.num_pages:  # a full group, but for the sink, moves to its base page
            sink = int(self.memory.spec.sink)
            for group in range(max(sink, seq.start // PAGE_TOKENS), seq.end // PAGE_TOKENS):
                pool, page = self._place(seq, group * PAGE_TOKENS + PAGE_TOKENS - 1)
                source = pool.pages[page, :PAGE_TOKENS]
                self.memory.base.pages[seq.pages[group], :PAGE_TOKENS] = source

    def _read(self, seq: BatchSequence, length: int) -> list[int]:
        out: list[int] = []
        for position in range(0, length, PAGE_TOKENS):
            pool, page = self._place(seq, position)
            out.extend(pool.pages[page, : min(PAGE_TOKENS, length - position)].tolist())
        return out


def next_token(tokens: list[int]) -> int:
    """The token that follows ``tokens``."""
    return int(_POWERS[: len(tokens)][::-1] @ (np.array(tokens) + 1) % _PRIME % VOCAB)


def continuation(prompt: list[int], count: int) -> list[int]:
    """The ``count`` tokens that must follow a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def make_engine(
    spec: str = "int8",
    *,
    num_pages: int = 8,
    num_recent: int = 4,
    max_batch_size: int = 8,
    max_step_tokens: int = 100,
    prefix_caching: bool = True,
    check: bool = True,
) -> Engine:
    """An engine over a :class:`PageReadingModel`."""
    parsed = KVSpec.parse(spec)
    recent = num_recent if parsed.recent else 0
    memory = KVMemory.allocate(parsed, SHAPE, num_pages, recent, max_step_tokens)
    return Engine(
        PageReadingModel(memory),
        NullBackend(memory),
        memory,
        vocab_size=VOCAB,
        session_len=num_pages * PAGE_TOKENS,
        max_batch_size=max_batch_size,
        max_step_tokens=max_step_tokens,
        prefix_caching=prefix_caching,
        check=check,
    )
