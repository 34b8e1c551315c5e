"""Decode steps by buckets: which batches, of what size, loaded into what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from kvant.kernels.backend import Batch, BatchSequence
from kvant.models.graphs import ROWS, DecodeSteps


@dataclass
class Plan:
    """Remembers what was loaded into it."""

    rows: int
    pages: int
    loaded: list[Batch] = field(default_factory=list)

    def load(self, batch: Batch) -> None:
        assert len(batch.sequences) <= self.rows
        assert max(len(each.pages) for each in batch.sequences) <= self.pages
        self.loaded.append(batch)


class Steps:
    """Decode steps whose hidden states are tokens, counted."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.computed = self.captured = 0
        self.hidden = torch.full((ROWS[-1], 2), -7.0)
        self.steps = DecodeSteps(self, self.compute, self.hidden, self.capture)

    def decode_plan(self, num_sequences: int, num_pages: int) -> Plan:
        self.plans.append(Plan(num_sequences, num_pages))
        return self.plans[-1]

    def compute(self, plan: Plan) -> torch.Tensor:
        self.computed += 1
        out = torch.full((plan.rows, 2), float("nan"))  # what padding comes to is no matter
        tokens = torch.from_numpy(plan.loaded[-1].tokens)
        out[: len(tokens)] = tokens[:, None].float()
        return out

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        work()
        return work


def decodes(pages: Sequence[int], first: int = 0) -> Batch:
    """One row of sequences that hold so many pages each; tokens count from ``first``."""
    count = len(pages)
    ends = 64 * np.array(pages)
    sequences = tuple(
        BatchSequence(row, end - 1, end, np.arange(end // 64), np.arange(0))
        for row, end in enumerate(ends.tolist())
    )
    return Batch(np.arange(first, first + count), ends - 1, sequences, np.arange(count))


@pytest.mark.parametrize(
    ("pages", "size"),
    [
        ([1], (1, 8)),
        ([1, 9, 3], (4, 16)),
        ([8] * 5, (8, 8)),
        ([16] * 8, (8, 16)),
        ([17] + [1] * 8, (16, 32)),
        ([1] * 256, (256, 8)),
    ],
)
def test_sizes_are_rounded_up(pages: list[int], size: tuple[int, int]) -> None:
    steps = Steps()
    found = steps.steps.run(decodes(pages))
    assert found is not None and found[:, 0].tolist() == list(range(len(pages)))
    assert steps.steps.captured == [size]


def test_a_size_is_captured_once() -> None:
    steps = Steps()
    for first, pages in enumerate(([1, 2, 3], [3, 2, 1, 8], [5, 5, 5], [9, 1, 1])):
        found = steps.steps.run(decodes(pages, first))
        assert found is not None
        assert found.tolist() == [[first + i] * 2 for i in range(len(pages))]
    assert steps.steps.captured == [(4, 8), (4, 16)]
    assert (steps.captured, steps.computed) == (2, 6)
    assert [len(plan.loaded) for plan in steps.plans] == [3, 1]


def test_others_are_left_alone() -> None:
    """Prompts, rows whose logits nobody wants, and more than the largest size."""
    prompt = BatchSequence(0, 0, 3, np.arange(1), np.arange(0))
    batches = [
        Batch(np.arange(3), np.arange(3), (prompt,), np.array([2])),
        Batch(np.arange(3), np.arange(3), (prompt,), np.arange(3)),
        Batch(*[np.arange(2)] * 2, decodes([1, 1]).sequences, np.array([0])),
        decodes([1] * 257),
    ]
    steps = Steps()
    assert [steps.steps.run(batch) for batch in batches] == [None] * 4
    assert not steps.plans and (steps.hidden == -7).all()
