"""From how many rows on does a linear layer give a row the same bits, however many there are?

    python benchmarks/row_invariance.py --output benchmarks/results/row-invariance-DATE.json

For each dtype: the numbers M of rows for which some row of F.linear, computed M at a time, differs
from the same row computed with 8192. kvant.models.ops.TorchLinear pads small batches accordingly.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from record import record
from torch.nn import functional

SHAPES = ((576, 960), (1536, 576), (576, 3072), (64, 128), (100, 60))  # inputs, outputs
ROWS = (*range(1, 140), 256, 512, 2048, 4096)


def differing(dtype: torch.dtype) -> list[int]:
    """The numbers of rows that change a bit, for any of the shapes."""
    torch.manual_seed(0)
    found = set()
    for inputs, outputs in SHAPES:
        weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(8192, inputs).to(dtype)
        whole = functional.linear(x, weight)
        for rows in ROWS:
            starts = range(0, max(300, 2 * rows), rows)
            parts = torch.cat([functional.linear(x[i : i + rows], weight) for i in starts])
            if not torch.equal(parts, whole[: len(parts)]):
                found.add(rows)
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results = [
        {"dtype": str(dtype), "rows_that_differ": differing(dtype)}
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    record(results, args.output)


if __name__ == "__main__":
    main()
