"""Static batches: requests of one length, all at once. LMDeploy's ``profile_generation``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from kvant.bench.metrics import median
from kvant.bench.throughput import Bench, Row, Run
from kvant.bench.workload import Random, Vocabulary, Work
from kvant.formats import KVSpec

__all__ = ["Case", "cases", "measure"]


class Case(NamedTuple):
    """``batch`` requests of ``prompt`` tokens, each continued by ``output`` tokens."""

    batch: int
    prompt: int
    output: int

    def work(self, vocabulary: Vocabulary, seed: int) -> list[Work]:
        """The requests."""
        lengths = Random(input_len=self.prompt, output_len=self.output)
        return lengths.draw(self.batch, vocabulary, seed)


def cases(batches: Sequence[int], prompts: Sequence[int], outputs: Sequence[int]) -> list[Case]:
    """All combinations."""
    return [Case(*case) for case in product(batches, prompts, outputs)]


def measure(
    bench: Bench, specs: Sequence[KVSpec], grid: Mapping[Case, Sequence[Work]], repeats: int
) -> list[Row]:
    """A row for every case and format: the case, :meth:`Bench.row`, and the rates of prefill and
    decode."""
    rows: list[Row] = []
    for case, work in grid.items():
        runs = bench.compare(specs, work, case.batch, repeats)
        rows += [
            {
                "concurrency": case.batch,
                "prompt_tokens": case.prompt,
                "completion_tokens": case.output,
                **bench.row(spec, each, runs[0]),
                "prefill_throughput": median(_prefill(run) for run in each),
                "decode_throughput": median(_decode(run) for run in each),
            }
            for spec, each in zip(specs, runs, strict=True)
        ]
    return rows


def _all_started(run: Run) -> float:
    """When the last prompt was done."""
    return max(line.arrivals[0] for line in run.timelines)


def _prefill(run: Run) -> float:
    """Prompt tokens per second until the last prompt is done."""
    return run.input_tokens / (_all_started(run) - run.start)


def _decode(run: Run) -> float | None:
    """Tokens per second after that."""
    start, end = _all_started(run), run.start + run.duration
    later = sum(at > start for line in run.timelines for at in line.arrivals)
    return later / (end - start) if later else None
