"""How torch's products and the cpu backend's attention share threads: a decode step under several
waiting policies of OpenMP, on an idle machine and beside a process that keeps one core busy.

    python benchmarks/threads.py --output RESULTS.json

Each run is a process of its own: 8 sequences of 512 tokens decode 32 more; the figure is the median
step. ``os_threads`` is how many threads the process has then: with one pool, as many as with the
null backend, where only torch computes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import record

POLICIES = {
    "passive (kvant's default)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 10000": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
}
SEQUENCES, PROMPT, NEW = 8, 512, 32


def steps(model: str, backend: str) -> dict[str, Any]:
    """Run the engine, in this process."""
    from kvant import EngineConfig
    from kvant.api import Pipeline
    from kvant.config import GenerationConfig
    from kvant.engine.load import load_model

    loaded = load_model(model, EngineConfig(kv="int8", kv_tokens=8192, backend=backend))
    pipe = Pipeline(loaded)
    times: list[float] = []
    forward = loaded.engine._model.forward  # the engine tells nobody how long a step took

    def timed(batch: Any, backend: Any) -> Any:
        start = time.perf_counter()
        out = forward(batch, backend)
        if len(batch.tokens) == SEQUENCES:
            times.append(time.perf_counter() - start)
        return out

    loaded.engine._model.forward = timed
    gen = GenerationConfig(max_new_tokens=NEW, ignore_eos=True)
    prompts = [[seed * 100 + i for i in range(PROMPT)] for seed in range(1, SEQUENCES + 1)]
    pipe.run([r for ids in prompts for r in pipe.generate_requests(ids, gen)])
    threads = len(list(Path("/proc/self/task").iterdir()))
    pipe.close()
    return {"step_ms": statistics.median(times) * 1e3, "os_threads": threads}


def run(model: str, backend: str, env: dict[str, str], busy: bool) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--worker", backend, "--model", model]
    hog = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        done = subprocess.run(
            command, env=os.environ | env, capture_output=True, text=True, check=True
        )
    finally:
        if hog:
            hog.kill()
    out: dict[str, Any] = json.loads(done.stdout)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(steps(args.model, args.worker)))
        return
    rows: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        for busy in (False, True):
            for name, env in POLICIES.items():
                found = run(args.model, "cpu", env, busy)
                rows.setdefault(("cpu", name, busy), []).append(found)
    name, env = next(iter(POLICIES.items()))
    rows["null", name, False] = [run(args.model, "null", env, busy=False)]
    results = [
        {
            "backend": backend,
            "policy": name,
            "busy_neighbour": busy,
            "step_ms": round(statistics.median(each["step_ms"] for each in runs), 2),
            "all_step_ms": [round(each["step_ms"], 2) for each in runs],
            "os_threads": runs[0]["os_threads"],
        }
        for (backend, name, busy), runs in rows.items()
    ]
    record(results, args.output)


if __name__ == "__main__":
    main()
