"""Results as kvant stores them, made up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]

# Formats with bits per element and bytes per token.
SIZES = {
    "f32": (32.0, 46080.0),
    "bf16": (16.0, 23040.0),
    "int8": (8.5, 12240.0),
    "int4": (4.5, 6480.0),
    "k=int8c,v=int4m+s64r64": (6.56, 9180.0),
    "k=int4c,v=int4m+s64r64": (4.62, 6300.0),
}
K4V4 = "k=int4c,v=int4m+s64r64"
K8V4 = "k=int8c,v=int4m+s64r64"


def machine(day: str = "2026-01-02") -> Json:
    return {
        "cpu": "A processor",
        "cores": 2,
        "isa": ["avx2"],
        "python": "3.11.7",
        "versions": {"kvant": "0.1.0", "torch": None},
        "date": day,
    }


def fidelity(
    klds: Mapping[str, float], *, day: str = "2026-01-02", ppl: float = 20.0, **about: Any
) -> Json:
    """Of ``kvant eval fidelity``; the first of ``klds`` is the baseline."""
    base = next(iter(klds))
    rows = [
        {
            "kv_spec": spec, "ctx": 512, "windows": 2, "positions": 1024,
            "bits_per_element": SIZES[spec][0], "bytes_per_token": SIZES[spec][1],
            "ppl": ppl + kld, "dppl_percent": 100 * kld / ppl, "kld": kld, "kld_stderr": kld / 9,
            "kld_p99": 9 * kld, "kld_p999": 20 * kld, "top1_percent": 99.0, "greedy": None,
        }
        for spec, kld in klds.items()
    ]  # fmt: skip
    found = {
        "machine": machine(day),
        "command": "kvant eval fidelity model --kv ...",
        "model": "model",
        "text": {"source": "some/text.txt", "characters": 9, "sha256": "ab"},
        "dtype": "float32",
        "baseline": base,
        "results": rows,
    }
    return found | about


def tasks(
    scores: Mapping[str, Mapping[str, float]],
    *,
    chance: float | None = 0.25,
    p_value: float = 0.5,
    stderr: float = 0.001,
    day: str = "2026-01-02",
    **about: Any,
) -> Json:
    """Of ``kvant eval tasks``: the share that is right by data set and format, the first format
    being the baseline."""
    rows, comparisons = [], []
    for task, by_format in scores.items():
        base = next(iter(by_format))
        for spec, value in by_format.items():
            rows.append({
                "kv_spec": spec, "kv": spec, "bits_per_element": SIZES[spec][0],
                "bytes_per_token": SIZES[spec][1], "task": task, "num_fewshot": 5,
                "metric": "acc", "value": value, "stderr": 0.01, "chance": chance, "items": 400,
                "of": 1200, "outcomes": "01", "items_sha256": task, "lengths": None,
                "metrics": {"acc": {"value": value, "stderr": 0.01}},
            })  # fmt: skip
            if spec != base:
                comparisons.append({
                    "kv_spec": spec, "kv": spec, "task": task, "baseline": base,
                    "difference": value - by_format[base], "stderr": stderr, "gained": 3,
                    "lost": 5, "p_value": p_value, "test": "McNemar, exact",
                })  # fmt: skip
    found = {
        "machine": machine(day),
        "command": "kvant eval tasks model --tasks ...",
        "model": "model",
        "dtype": "bfloat16",
        "weight_dtype": "auto",
        "data": "local",
        "harness": {"lm_eval": "0.4.13"},
        "limit": {"mmlu": 400},
        "baseline": base,
        "results": rows,
        "comparisons": comparisons,
    }
    return found | about


def speed(spec: str, rate: float, **more: Any) -> Json:
    return {
        "kv": spec, "kv_spec": spec, "kv_bytes_per_token": SIZES[spec][1], "kv_tokens": 4096,
        "weight_dtype": "int8", "completed": 10, "total_input_tokens": 100,
        "total_output_tokens": 50, "duration_s": 1.0, "request_throughput": rate,
        "output_throughput": 5 * rate, "median_ttft_ms": 1000.0, "p99_ttft_ms": 2000.0,
        "median_tpot_ms": None, "p99_tpot_ms": None, "mean_concurrency": 3.0,
        "num_preemptions": 1, **more,
    }  # fmt: skip


def throughput(rates: Mapping[str, float], **about: Any) -> Json:
    found = {
        "machine": machine(),
        "command": "kvant bench throughput model",
        "model": "model",
        "dtype": "auto",
        "workload": {"dataset": "trace", "dataset_path": "a/b.csv", "concurrency": 16},
        "results": [speed(spec, rate, num_steps=9) for spec, rate in rates.items()],
    }
    return found | about


def latency(prompts: Sequence[int], batches: Sequence[int], *, day: str = "2026-01-02") -> Json:
    return {
        "machine": machine(day),
        "command": "kvant bench latency model",
        "model": "model",
        "dtype": "auto",
        "workload": {"repeats": 1, "seed": 0},
        "results": [
            speed(
                spec, 8.0, prompt_tokens=prompt, concurrency=batch, completion_tokens=32,
                median_tpot_ms=7.0,
            )
            for prompt in prompts
            for batch in batches
            for spec in ("bf16", "int8")
        ],
    }  # fmt: skip


def tune() -> Json:
    return {
        "machine": machine(), "command": "kvant eval tune model", "model": "model",
        "text": {"source": "t", "sha256": "ab"}, "dtype": "float32", "budget_bits": 4.5,
        "kv": f"{K4V4};0=int8", "bits_per_element": 4.4, "kld": 0.001, "uniform_kv": K4V4,
        "uniform_bits_per_element": 4.6, "uniform_kld": 0.002,
    }  # fmt: skip


def attention() -> Json:
    rows = [
        {"what": "bandwidth", "bytes_per_second": {"numpy": 1}},
        {"what": "decode", "shape": "9/3/64", "batch": 1, "context": 64, "note": "left out"},
        *(
            {"what": "decode", "shape": "9/3/64", "batch": 1, "context": context, "kv": kv,
             "seconds": 0.002, "times_first": times}
            for context in (64, 4096)
            for kv, times in (("bf16", 1.0), ("int8", 0.55))
        ),
    ]  # fmt: skip
    return {"machine": machine(), "command": "kvant bench attention", "results": rows}


def linear() -> Json:
    rows = [
        {"kind": kind, "shape": "64x64", "rows": 1, "seconds": seconds,
         "operations_per_second": 1e9}
        for kind, seconds in (("torch bfloat16", 0.002), ("kvant codes", 0.001))
    ]  # fmt: skip
    return {"machine": machine(), "command": "kvant bench linear", "model": None, "results": rows}


def serving() -> Json:
    row = {
        "request_rate": 2, "completed": 9, "failed": 1, "request_throughput": 1.5,
        "output_throughput": 90.0, "median_ttft_ms": 10.0, "p99_ttft_ms": 20.0,
        "median_itl_ms": 3.0, "p99_itl_ms": 4.0,
    }  # fmt: skip
    return {
        "machine": machine(), "command": "kvant bench serving", "model": "model",
        "url": "http://127.0.0.1:1", "workload": {"dataset": "random"}, "results": [row],
    }  # fmt: skip


EVERY = {
    "attention": attention(),
    "fidelity": fidelity({"f32": 0.0, "int8": 0.0003, "int4": 0.1, K4V4: 0.005}),
    "latency": latency((512, 2048), (1, 4)),
    "linear": linear(),
    "serving": serving(),
    "tasks": tasks(
        {
            "mmlu": {"bf16": 0.26, "int8": 0.26, "int4": 0.25, K4V4: 0.26},
            "piqa": {"bf16": 0.68, "int8": 0.68, "int4": 0.6, K4V4: 0.679},
        }
    ),
    "throughput": throughput({"int8": 3.0, "bf16": 2.0}),
    "tune": tune(),
}


def write(folder: Path, **results: Any) -> Path:
    """Write each as a file with its name."""
    for name, found in results.items():
        (folder / f"{name}.json").write_text(json.dumps(found))
    return folder
