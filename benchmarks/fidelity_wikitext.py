"""What a KV format costs on WikiText-2, teacher-forced through the real engine and cache.

    python benchmarks/fidelity_wikitext.py --text wiki.test.raw.gz --kv int8,int8h,int4,int4h

For each format, against the f32 cache on the same weights and windows: mean KL divergence of the
next-token distribution KL(f32 || format), share of positions with the same most likely token,
change of perplexity. Prints one JSON object; --output stores it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from record import record

from kvant import EngineConfig, pipeline

F32 = NDArray[np.float32]


def log_softmax(logits: F32) -> F32:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    out: F32 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64))
    return out.astype(np.float32)


class Comparison:
    """Collects one format's figures against stored reference log-probabilities."""

    def __init__(self) -> None:
        self.nll: list[NDArray[Any]] = []
        self.kld: list[NDArray[Any]] = []
        self.same_top: list[NDArray[Any]] = []

    def add(self, ids: NDArray[np.int64], start: int, logp: F32, reference: F32) -> None:
        rows = slice(start, start + len(logp))
        self.kld.append(
            (np.exp(reference[rows]) * (reference[rows] - logp)).sum(axis=-1, dtype=np.float64)
        )
        self.same_top.append(reference[rows].argmax(axis=-1) == logp.argmax(axis=-1))
        right = ids[start + 1 : start + 1 + len(logp)]
        self.nll.append(-logp[np.arange(len(right)), right].astype(np.float64))

    def row(self, spec: str, head_dim: int, reference_ppl: float | None) -> dict[str, Any]:
        from kvant import KVSpec

        kld = np.concatenate(self.kld)
        ppl = float(np.exp(np.concatenate(self.nll).mean()))
        return {
            "kv_spec": spec,
            "bits_per_element": KVSpec.parse(spec).bits_per_element(head_dim),
            "ppl": round(ppl, 4),
            "dppl_percent": round(100 * (ppl / (reference_ppl or ppl) - 1), 3),
            "kld": float(f"{kld.mean():.4g}"),
            "kld_p99": float(f"{np.quantile(kld, 0.99):.4g}"),
            "top1_percent": round(100 * float(np.concatenate(self.same_top).mean()), 2),
            "positions": len(kld),
        }


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    text = gzip.decompress(Path(args.text).read_bytes()).decode()
    rows = []
    reference_path = Path(args.scratch)
    reference_path.mkdir(parents=True, exist_ok=True)
    reference_ppl = None
    for spec in ["f32", *args.kv.split(",")]:
        began = time.perf_counter()
        config = EngineConfig(
            dtype=args.dtype, kv=spec, kv_tokens=args.ctx + 64, max_prefill_token_num=args.chunk
        )
        with pipeline(args.model, config) as pipe:
            ids = np.array(pipe.tokenizer.encode(text[: args.ctx * args.windows * 8]))
            comparison = Comparison()
            for window in range(args.windows):
                part = ids[window * args.ctx : (window + 1) * args.ctx]
                file = reference_path / f"window{window}.npy"
                if spec == "f32":
                    shape = (args.ctx, pipe.model.config.vocab_size)
                    stored = np.lib.format.open_memmap(file, "w+", np.float32, shape)
                else:
                    stored = np.load(file, mmap_mode="r")

                def sink(
                    start: int,
                    logits: F32,
                    part: NDArray[np.int64] = part,
                    stored: Any = stored,
                    spec: str = spec,
                    comparison: Comparison = comparison,
                ) -> None:
                    logp = log_softmax(logits)
                    if spec == "f32":
                        stored[start : start + len(logp)] = logp
                    comparison.add(part, start, logp, stored)

                pipe.run([pipe.score_request(part.tolist(), sink)])
            row = comparison.row(spec, pipe.model.config.head_dim, reference_ppl)
        row["seconds"] = round(time.perf_counter() - began, 1)
        reference_ppl = reference_ppl or row["ppl"]
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True, help="WikiText-2 raw test set, gzip")
    parser.add_argument("--kv", default="int8,int8h,int4,int4h")
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scratch", default="/tmp/kvant-fidelity", help="reference logits")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    record(run(args), args.output)


if __name__ == "__main__":
    main()
