"""What the rows of all peers share: windows, reference, metrics and the results file. Only numpy.

The folder that ``prepare.py`` makes holds

    ids.npy              int64 [windows, 2048], WikiText-2 as kvant's tokenizer reads it
    reference/0.npy ...  float32 [2048, vocabulary], log-probabilities with kvant's f32 cache
    hf/                  the model as a transformers folder, float32
    model-f32.gguf       the same weights as GGUF, float32
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
AMORTISED = 4096
"""Tokens over which bits per element count what does not grow with the sequence."""


def log_softmax(logits: F32) -> F32:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    out: F32 = (shifted - np.log(total)).astype(np.float32)
    return out


def divergence(reference: F32, logp: F32) -> F64:
    """KL(reference || logp) of each row, in nats."""
    out: F64 = (np.exp(reference) * (reference - logp)).sum(axis=-1, dtype=np.float64)
    return out


def windows(data: Path) -> NDArray[np.int64]:
    """Token ids [windows, 2048]."""
    ids: NDArray[np.int64] = np.load(data / "ids.npy")
    return ids


def amortised_bits(bits: float, recent_tokens: float = 0, recent_bits: float = 0) -> float:
    """Bits per cached element at 4096 tokens of which the last few are in another format."""
    return (bits * (AMORTISED - recent_tokens) + recent_bits * recent_tokens) / AMORTISED


class Row:
    """One engine with one KV format: collects logits, gives the row of the results file.

    Args:
        data: the folder of ``prepare.py``.
        baseline: a folder with the same engine's log-probabilities without KV quantization. With
            ``write`` this row is that baseline and fills the folder.
    """

    def __init__(self, data: Path, baseline: Path | None = None, write: bool = False) -> None:
        self.data, self.baseline, self.write = data, baseline, write
        self.ids = windows(data)
        self.began = time.perf_counter()
        self.parts: dict[str, list[NDArray[Any]]] = {}

    def _keep(self, **arrays: NDArray[Any]) -> None:
        for name, array in arrays.items():
            self.parts.setdefault(name, []).append(array)

    def add(self, window: int, start: int, logits: F32) -> None:
        """Logits [n, vocabulary] (or log-probabilities) of positions start .. start + n."""
        rows = slice(start, start + len(logits))
        logp = log_softmax(np.asarray(logits, np.float32))
        reference: F32 = np.load(self.data / f"reference/{window}.npy", mmap_mode="r")[rows]
        top = logp.argmax(axis=-1)
        right = self.ids[window, start + 1 : start + 1 + len(logp)]
        at = (np.arange(len(right)), right)
        self._keep(
            window=np.full(len(logp), window),
            kld=divergence(reference, logp),
            same_top=reference.argmax(axis=-1) == top,
            nll=-logp[at].astype(np.float64),
            reference_nll=-reference[at].astype(np.float64),
        )
        if self.baseline is None:
            return
        file = self.baseline / f"{window}.npy"
        if not self.write:
            own: F32 = np.load(file, mmap_mode="r")[rows]
            self._keep(own_kld=divergence(own, logp), own_top=own.argmax(axis=-1) == top)
            return
        self.baseline.mkdir(parents=True, exist_ok=True)
        shape = (self.ids.shape[1], logp.shape[1])
        mode = "r+" if start else "w+"
        np.lib.format.open_memmap(file, mode, np.float32, None if start else shape)[rows] = logp

    def result(self, engine: str, version: str, kv: str, bits: float, note: str) -> dict[str, Any]:
        """The row. ``bits``: per cached element, all bytes, see ``amortised_bits``."""
        found = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        ppl, reference = (float(np.exp(found[k].mean())) for k in ("nll", "reference_nll"))
        row = {
            "engine": engine,
            "version": version,
            "kv": kv,
            "ppl": round(ppl, 4),
            "dppl_percent": round(100 * (ppl / reference - 1), 3),
            "kld": float(f"{found['kld'].mean():.4g}"),
            "kld_p99": float(f"{np.quantile(found['kld'], 0.99):.4g}"),
            "top1_percent": round(100 * float(found["same_top"].mean()), 2),
            "bits_per_element": round(bits, 3),
        }
        by_window = [
            float(f"{found['kld'][found['window'] == window].mean():.4g}")
            for window in np.unique(found["window"])
        ]
        if "own_kld" in found:
            row["kld_to_own_baseline"] = float(f"{found['own_kld'].mean():.4g}")
            row["top1_to_own_baseline_percent"] = round(100 * float(found["own_top"].mean()), 2)
        return row | {
            "windows": len(by_window),
            "kld_by_window": by_window,
            "positions": len(found["kld"]),
            "seconds": round(time.perf_counter() - self.began, 1),
            "command": " ".join(sys.argv).replace(str(self.data), "$DATA"),
            "note": note,
        }


def store(row: dict[str, Any], output: Path | None) -> None:
    """Print a row and put it into the results file, in place of an earlier one of its name."""
    print(json.dumps(row), file=sys.stderr, flush=True)
    if output is None:
        return
    found = json.loads(output.read_text()) if output.exists() else {"results": []}
    others = [r for r in found["results"] if (r["engine"], r["kv"]) != (row["engine"], row["kv"])]
    text = Path("/proc/cpuinfo").read_text()
    cpu = next(line for line in text.splitlines() if line.startswith("model name"))
    machine = {
        "cpu": cpu.split(":")[1].strip(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    output.write_text(json.dumps({"machine": machine, "results": [*others, row]}, indent=2) + "\n")


def parser(description: str | None, kv: str) -> argparse.ArgumentParser:
    """The options of every peer's script; ``kv``: its rows by default."""
    out = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    out.add_argument("--data", type=Path, required=True, help="the folder prepare.py made")
    out.add_argument("--kv", default=kv, help="rows, in order; the first is the engine's baseline")
    out.add_argument("--windows", type=int, default=6)
    out.add_argument("--chunk", type=int, default=64, help="tokens fed at a time")
    out.add_argument("--threads", type=int, default=2)
    out.add_argument("--output", type=Path, help="results file to put rows into")
    return out
