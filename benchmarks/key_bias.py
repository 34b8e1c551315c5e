"""Keys with a large bias, as Qwen2's: what formats do to attention. Synthetic, no model needed.

    python benchmarks/key_bias.py

Qwen2.5-7B adds a bias of norm 605 (first layer) and 921 (last layer) to its keys before RoPE,
concentrated in few RoPE pairs, where the token's own part of a key has a norm of about 22. Plain
4-bit keys have steps larger than all that tokens differ in: models collapse. Here keys are
normal (standard deviation 2, D = 128) plus such a bias in eight pairs, then RoPE with Qwen2's base;
queries are normal and look at the biased pairs 20 times less, as trained queries must. For each
place of the pairs and format: mean KL divergence of the attention of late queries to 2048 keys,
each key as its page shows it (the query's own group and the first one in the finer format).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from record import record

from kvant import KVSpec
from kvant.formats import PAGE_TOKENS, KVFormat, KVShape

F32 = NDArray[np.float32]
DIM, KEYS, QUERIES, BASE = 128, 2048, 64, 1e6
PLACES = {
    "low": range(40, 48),
    "middle": range(20, 28),
    "high": range(8),
    "mixed": (0, 5, 12, 20, 28, 36, 44, 60),
}
NORMS = (605.0, 921.0)
SPECS = ("int8", "int4", "int4h", "int8h", "k8v8", "k8v4", "k5v4", "k4v4", "k4v3", "k3v3")


def _rope(x: NDArray[Any], positions: NDArray[Any]) -> NDArray[Any]:
    angles = positions[:, None] * BASE ** (-np.arange(0, DIM, 2) / DIM)
    cos, sin = np.cos(angles), np.sin(angles)
    one, two = x[:, : DIM // 2], x[:, DIM // 2 :]
    return np.concatenate((one * cos - two * sin, two * cos + one * sin), axis=1)


def case(place: str, norm: float, seed: int) -> tuple[F32, F32]:
    """Queries of the last group ``[64, 128]`` and keys ``[2048, 128]``, after RoPE."""
    rng = np.random.default_rng(seed)
    dims = np.array([pair + half for pair in PLACES[place] for half in (0, DIM // 2)])
    bias = np.zeros(DIM)
    bias[dims] = rng.standard_normal(len(dims))
    bias *= norm / np.linalg.norm(bias)
    keys = _rope(2 * rng.standard_normal((KEYS, DIM)) + bias, np.arange(KEYS))
    queries = rng.standard_normal((QUERIES, DIM))
    queries[:, dims] /= 20
    last = np.arange(KEYS - QUERIES, KEYS)
    return _rope(queries, last).astype(np.float32), keys.astype(np.float32)


def kept(spec: KVSpec, keys: F32) -> F32:
    """The keys as queries of the last group see them."""

    def through(fmt: KVFormat, x: F32) -> F32:
        return np.asarray(fmt.decode(fmt.encode(x), DIM))

    groups = keys.reshape(-1, PAGE_TOKENS, DIM)
    if spec.recent is None:
        return through(spec.k, groups).reshape(keys.shape)
    fine = through(spec.fine.k, groups)
    seen = through(spec.k, fine)
    for group in (0, -1) if spec.sink else (-1,):
        seen[group] = fine[group]
    return seen.reshape(keys.shape)


def attention_kl(spec: KVSpec, queries: F32, keys: F32) -> float:
    """Mean KL divergence, nats, of causal attention to the kept keys from that to the keys."""
    visible = np.arange(KEYS) <= np.arange(KEYS - QUERIES, KEYS)[:, None]

    def log_attention(x: F32) -> NDArray[np.float64]:
        scores = queries.astype(np.float64) @ x.T.astype(np.float64) / DIM**0.5
        scores = np.where(visible, scores, -np.inf)
        scores -= scores.max(axis=-1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))

    exact, found = log_attention(keys), log_attention(kept(spec, keys))
    p = np.exp(exact)
    difference = np.subtract(exact, found, where=visible, out=np.zeros_like(exact))
    return float((p * difference).sum(axis=-1).mean())


def measure(specs: tuple[str, ...] = SPECS) -> list[dict[str, Any]]:
    """A row for each format: attention KL by place and norm of the bias, means over five draws;
    the worst of these; and the worst draw."""
    shape = KVShape(num_layers=1, num_kv_heads=1, head_dim=DIM)
    rows = []
    for text in specs:
        spec = KVSpec.parse(text)
        found = {
            f"{place} {norm:.0f}": [attention_kl(spec, *case(place, norm, n)) for n in range(5)]
            for place in PLACES
            for norm in NORMS
        }
        means = {name: round(float(np.mean(draws)), 5) for name, draws in found.items()}
        bits = round(spec.bits_per_element(shape, 4096), 3)
        rows.append(
            {"kv": text, "bits_per_element": bits, "attention_kl": means}
            | {"worst": max(means.values())}
            | {"worst_draw": round(max(map(max, found.values())), 5)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    record(measure(), args.output)


if __name__ == "__main__":
    main()
