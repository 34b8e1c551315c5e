"""Where the time of a decode step goes, with what the machine could do at most beside it.

    python benchmarks/step_profile.py MODEL --weights auto,int8,int4 --kv int8 --output RESULTS.json

Each case (batch x context) runs steps in two ways, which take turns: as the engine does, all blocks
in one native call (``step``, ``blocks``, ``head``; ``rest`` is Python: scheduling, sampling, text),
and block by block in Python, where each part is timed. Medians over steps. The limit of a part is
the longer of its bytes at the bandwidth and its operations at the arithmetic ceiling, both measured
in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from kvant import EngineConfig, GenerationConfig
from kvant.bench.timing import Ceilings, interleaved
from kvant.engine.load import LoadedModel, open_model, start_model
from kvant.request import Request

LINEARS = ("qkv", "output", "gate_up", "down")
STEPS = 24
WEIGHT_BITS = {"auto": 16, "int8": 8.2, "int4": 5}
"""Of an element with its scales; int4 is a GGUF's Q4_1."""


class Watch:
    """Adds up what calls take, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def __call__(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            out = call(*args, **options)
            self.spent[name] += time.perf_counter() - start
            return out

        return timed

    def take(self) -> dict[str, float]:
        found, self.spent = dict(self.spent), defaultdict(float)
        return found


class WatchedBackend:
    """A backend that is timed, and no native decoder knows."""

    def __init__(self, inner: Any, watch: Watch) -> None:
        self.name = inner.name
        self.write, self.attend = watch("write", inner.write), watch("attend", inner.attend)


def profile(model: LoadedModel, batch: int, context: int) -> dict[str, float]:
    """Seconds of each part of a step."""
    engine, watch = model.engine, Watch()
    decoder: Any = engine._model
    rng = np.random.default_rng(0)
    for number in range(batch):
        tokens = rng.integers(0, engine.vocab_size, context).tolist()
        gen = GenerationConfig(max_new_tokens=2 * STEPS + 8 * batch, ignore_eos=True)
        engine.submit(
            Request(number, tokens, context, gen, context + 3 * STEPS + context * batch // 256)
        )
    while any(r.computed < r.num_prompt for r in engine.scheduler.running) or (
        engine.scheduler.waiting
    ):
        engine.step()

    whole, parts = (decoder.weights, decoder._fused, decoder._ops, engine.backend), []
    weights, fused, ops, backend = whole
    watched = replace(
        weights,
        head=watch("head", weights.head),
        layers=tuple(
            replace(x, **{name: watch(name, getattr(x, name)) for name in LINEARS})
            for x in weights.layers
        ),
    )

    class Rotating:
        rope = staticmethod(watch("rope", ops.rope))

    for _ in range(STEPS):
        decoder.weights = replace(weights, head=watch("head", weights.head))
        decoder._fused = watch("blocks", fused)
        start = time.perf_counter()
        engine.step()
        found = {"step": time.perf_counter() - start, **watch.take()}
        found["rest"] = found["step"] - found["blocks"] - found["head"]
        decoder.weights, decoder._fused, decoder._ops = watched, None, Rotating()
        engine.backend = WatchedBackend(backend, watch)
        engine.step()
        found |= {k: v for k, v in watch.take().items() if k != "head"}
        decoder.weights, decoder._fused, decoder._ops, engine.backend = whole
        parts.append(found)
    engine.abort_all()
    return {name: statistics.median(p[name] for p in parts) for name in parts[0]}


def needs(
    model: LoadedModel, weights: str, batch: int, context: int
) -> dict[str, tuple[float, float]]:
    """Bytes to read and operations of each part that has a limit worth the name."""
    c, bits = model.config, WEIGHT_BITS[weights]
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    elements = {
        "qkv": heads * c.hidden_size,
        "output": c.num_heads * c.head_dim * c.hidden_size,
        "gate_up": 2 * c.intermediate_size * c.hidden_size,
        "down": c.intermediate_size * c.hidden_size,
    }
    found = {
        name: (c.num_layers * n * bits / 8, 2.0 * batch * c.num_layers * n)
        for name, n in elements.items()
    }
    head = c.vocab_size * c.hidden_size
    found["head"] = head * (16 if weights == "auto" else 8.2) / 8, 2.0 * batch * head
    cached = batch * context * model.kv_spec.bytes_per_token(c.kv_shape)
    found["attend"] = cached, 4.0 * batch * context * c.num_heads * c.head_dim * c.num_layers
    found["blocks"] = tuple(np.sum([found[x] for x in (*LINEARS, "attend")], 0))
    found["step"] = tuple(np.sum([found[x] for x in ("blocks", "head")], 0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("model")
    add("--weights", default="auto,int8,int4")
    add("--kv", default="int8")
    add("--batch", default="1,16")
    add("--context", default="256,4096")
    add("--threads", type=int, default=2)
    add("--output", type=Path)
    args = parser.parse_args()
    results = []
    ceilings = Ceilings(args.threads, arithmetic=True)
    for weights in args.weights.split(","):
        config = EngineConfig(
            kv=args.kv,
            weight_dtype=weights,
            num_threads=args.threads,
            enable_prefix_caching=False,
            max_batch_size=16,
            kv_tokens=16 * 8192,
        )
        opened = open_model(args.model, config)
        model = start_model(opened, opened.weights(config), config)
        for context in map(int, args.context.split(",")):
            for batch in map(int, args.batch.split(",")):
                found = profile(model, batch, context)
                times = interleaved(ceilings.calls, 5)
                bandwidth = float(np.median(ceilings.bandwidth(times)))
                kind = "bfloat16" if weights == "auto" else "codes"
                peak = float(np.median(ceilings.arithmetic(times, kind)))
                limits = {
                    name: max(size / bandwidth, operations / peak)
                    for name, (size, operations) in needs(model, weights, batch, context).items()
                }
                row = {
                    "weights": weights,
                    "kv": args.kv,
                    "batch": batch,
                    "context": context,
                    "bandwidth_gb_s": round(bandwidth / 1e9, 1),
                    "peak_gflop_s": round(peak / 1e9),
                    "ms": {name: round(1e3 * took, 3) for name, took in found.items()},
                    "limit_ms": {name: round(1e3 * took, 3) for name, took in limits.items()},
                }
                results.append(row)
                print(row, file=sys.stderr)
    record(results, args.output)


if __name__ == "__main__":
    main()
