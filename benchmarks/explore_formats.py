"""Ways to store keys and values at few bits that were tried, the shipped ones among them.

    python benchmarks/explore_formats.py --text wiki.test.raw.gz

Queries, keys and values of one window are taken from the model once. Then only keys (or only
values) of all groups but the query's own and the first are replaced by what a way keeps of them:
mean KL divergence of attention and the relative error of its output, over layers and a sample of
queries. This ranks ways in a minute; the whole model decides (kvant eval fidelity). Bits are per
element at head_dim 64. Prints one JSON object; --output stores it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from record import record

from kvant import EngineConfig, pipeline
from kvant.eval.text import read_text
from kvant.formats import FORMATS, PAGE_TOKENS
from kvant.formats.hadamard import rotate, unrotate

A = NDArray[np.float32]
Way = Callable[[A], A]
"""From groups of vectors ``[H, groups, 64, D]`` to what is kept of them."""

TINY = np.float32(2.0**-24)


def f16(x: Any) -> A:
    return np.asarray(x, np.float16).astype(np.float32)


def shipped(name: str) -> Way:
    fmt = FORMATS[name]
    return lambda x: fmt.decode(fmt.encode(x), x.shape[-1])


def span(x: A, bits: int, axis: int, clip: float = 1) -> A:
    """Scale and zero along an axis, the range shrunk to ``clip``."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2 * clip
    zero, scale = f16(middle - half), np.maximum(f16(2 * half / (2**bits - 1)), TINY)
    out: A = np.rint((x - zero) / scale).clip(0, 2**bits - 1) * scale + zero
    return out


def clipped(bits: int) -> Way:
    """By channel, the range of least squared error among eight."""

    def keep(x: A) -> A:
        tried = np.stack(
            [span(x, bits, -2, clip) for clip in (1, 0.96, 0.92, 0.88, 0.84, 0.8, 0.7)]
        )
        best = np.square(tried - x).sum(-2, keepdims=True).argmin(0)
        return np.take_along_axis(tried, best[None], 0)[0]

    return keep


def grouped(bits: int, tokens: int) -> Way:
    """By channel, with another number of tokens than 64."""

    def keep(x: A) -> A:
        split = x.reshape(x.shape[0], -1, tokens, x.shape[-1])
        return span(split, bits, -2).reshape(x.shape)

    return keep


def centred(bits: int, power: float = 0) -> Way:
    """The mean of the page, and its standard deviations to a power, by channel; the rest rotated,
    with a scale per token and no zero."""
    token = shipped(f"int{bits}m")

    def keep(x: A) -> A:
        mean = f16(x.mean(-2, keepdims=True))
        scale = f16(np.maximum((x - mean).std(-2, keepdims=True), 1e-4) ** power)
        out: A = token((x - mean) / scale) * scale + mean
        return out

    return keep


def two_way(bits: int) -> Way:
    """A scale by channel and another by token, normalised by turns (KVarN, without rotation)."""

    def keep(x: A) -> A:
        mean = f16((x.min(-2, keepdims=True) + x.max(-2, keepdims=True)) / 2)
        y = x - mean
        token = np.ones_like(y[..., :1])
        for _ in range(4):
            channel = np.maximum(np.abs(y / token).max(-2, keepdims=True), 1e-6)
            token = np.sqrt(np.maximum(np.abs(y / channel).max(-1, keepdims=True), 1e-6))
        step = f16(2 * channel / 2**bits) * f16(token)
        half = 2 ** (bits - 1)
        out: A = (np.floor(y / step).clip(-half, half - 1) + 0.5) * step + mean
        return out

    return keep


def diffused(bits: int, share: float) -> Way:
    """A share of each token's error is added to the next token (rotated, scale per token)."""
    fmt, half = FORMATS[f"int{bits}m"], 2 ** (bits - 1)

    def keep(x: A) -> A:
        y = rotate(x)
        step = np.maximum(fmt.quantize(y)[0].astype(np.float32), TINY)[..., None]
        out, error = np.empty_like(y), np.zeros_like(y[..., 0, :])
        for t in range(y.shape[-2]):
            wanted, s = y[..., t, :] + np.float32(share) * error, step[..., t, :]
            out[..., t, :] = (np.floor(wanted / s).clip(-half, half - 1) + 0.5) * s
            error = (wanted - out[..., t, :]).clip(-s, s)
        return unrotate(out)

    return keep


KEYS: dict[str, tuple[float, Way]] = {
    "int4h: rotated, scale and zero by token": (4.5, shipped("int4h")),
    "int4m: rotated, scale by token": (4.25, shipped("int4m")),
    "int4c: scale and zero by channel, 64 tokens": (4.5, shipped("int4c")),
    "by channel, 32 tokens": (5.0, grouped(4, 32)),
    "by channel, 128 tokens": (4.25, grouped(4, 128)),
    "by channel, clip search": (4.5, clipped(4)),
    "mean of the page out, rotated, scale by token": (4.5, centred(4)),
    "the same, divided by sqrt(deviation) of channels": (4.75, centred(4, 0.5)),
    "the same, divided by deviation of channels": (4.75, centred(4, 1)),
    "scale by channel and by token": (4.75, two_way(4)),
    "int3c": (3.5, shipped("int3c")),
    "3 bits: mean of the page out, rotated": (3.5, centred(3)),
    "int5c": (5.5, shipped("int5c")),
    "int6c": (6.5, shipped("int6c")),
}
VALUES: dict[str, tuple[float, Way]] = {
    f"{bits} bits: {name}": (bits + more, way)
    for bits in (4, 3, 2)
    for name, more, way in (
        ("rotated, scale by token", 0.25, shipped(f"int{bits}m")),
        ("mean of the page out, rotated", 0.5, centred(bits)),
        ("by channel", 0.5, grouped(bits, 64)),
        ("by channel, clip search", 0.5, clipped(bits)),
        ("rotated, 0.2 of errors to the next token", 0.25, diffused(bits, 0.2)),
        ("rotated, 0.5 of errors to the next token", 0.25, diffused(bits, 0.5)),
    )
}


class Tap:
    """A backend that passes everything on and keeps queries, keys and values by layer."""

    def __init__(self, inner: Any) -> None:
        self.name, self._inner = inner.name, inner
        self.q: list[A] = []
        self.k: list[A] = []
        self.v: list[A] = []

    def write(self, layer: int, k: Any, v: Any, batch: Any) -> None:
        self.k.append(k.float().numpy().swapaxes(0, 1))
        self.v.append(v.float().numpy().swapaxes(0, 1))
        self._inner.write(layer, k, v, batch)

    def attend(self, layer: int, q: Any, batch: Any, **options: Any) -> Any:
        self.q.append(q.float().numpy().swapaxes(0, 1))
        return self._inner.attend(layer, q, batch, **options)


def taken(args: argparse.Namespace) -> Tap:
    config = EngineConfig(
        kv="f32", dtype="float32", kv_tokens=args.ctx + 64, max_prefill_token_num=args.ctx
    )
    with pipeline(args.model, config) as pipe:
        ids = pipe.tokenizer.encode(read_text(args.text).content[: 8 * args.ctx])[: args.ctx]
        engine = pipe.model.engine
        engine.backend = tap = Tap(engine.backend)
        pipe.run([pipe.score_request(ids, lambda *_: None)])
    return tap


def cost(tap: Tap, keys: Way | None, values: Way | None) -> tuple[float, float]:
    """Attention KL in nats and relative squared error of outputs, means over layers."""
    kls, errors = [], []
    for q, k, v in zip(tap.q, tap.k, tap.v, strict=True):
        heads, length, dim = k.shape
        rows = np.arange(PAGE_TOKENS + 6, length, 37)
        position = np.arange(length)
        seen = position <= rows[:, None]
        fine = (position // PAGE_TOKENS == (rows // PAGE_TOKENS)[:, None]) | (
            position < PAGE_TOKENS
        )

        def kept(x: A, way: Way | None) -> A:
            if way is None:
                return x
            return way(x.reshape(x.shape[0], -1, PAGE_TOKENS, x.shape[-1])).reshape(x.shape)

        share = q[:, rows].reshape(heads, -1, len(rows), dim)
        coarse_k, coarse_v = kept(k, keys), kept(v, values)
        exact = share @ k[:, None].swapaxes(-1, -2) / dim**0.5
        found = np.where(fine, exact, share @ coarse_k[:, None].swapaxes(-1, -2) / dim**0.5)
        logs = []
        for scores in (exact, found):
            masked = np.where(seen, scores, np.float32(-1e30))
            masked -= masked.max(-1, keepdims=True)
            logs.append(masked - np.log(np.exp(masked).sum(-1, keepdims=True)))
        p, other = np.exp(logs[0]), np.exp(logs[1])
        kls.append(float((p * (logs[0] - logs[1])).sum(-1).mean()))
        out = p @ v[:, None]
        new = (other * fine) @ v[:, None] + (other * ~fine) @ coarse_v[:, None]
        errors.append(float(np.square(new - out).sum() / np.square(out).sum()))
    return float(np.mean(kls)), float(np.mean(errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tap = taken(args)
    rows = []
    for side, ways in (("k", KEYS), ("v", VALUES)):
        for name, (bits, way) in ways.items():
            kl, error = cost(tap, way if side == "k" else None, way if side == "v" else None)
            rows.append(
                {"side": side, "way": name, "bits": bits}
                | {"attention_kl": float(f"{kl:.4g}"), "output_error": float(f"{error:.4g}")}
            )
    record(rows, args.output)


if __name__ == "__main__":
    main()
