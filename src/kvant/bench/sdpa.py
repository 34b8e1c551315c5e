"""Attention over quantized pages against torch's scaled_dot_product_attention over contiguous keys
and values in bfloat16: one new token of each of some sequences, and a chunk of a prompt behind its
history. Torch has several ways; the fastest that computes the same is compared with.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvant.bench.attention import CHUNK, HISTORY, Heads, Plan, Pool, random
from kvant.bench.metrics import significant
from kvant.bench.throughput import Row
from kvant.bench.timing import Call, interleaved
from kvant.formats import PAGE_TOKENS

__all__ = ["measure_sdpa"]

_attention: Any = scaled_dot_product_attention


@torch.inference_mode()
def measure_sdpa(plan: Plan, shape: Heads, say: Callable[[str], None]) -> list[Row]:
    """Rows of decode steps and of a prompt's chunk, ours and torch's; ``say`` is told of ways of
    torch that do not work."""
    batch, context = max(plan.batches), HISTORY
    pools = plan.pools(shape, batch * context // PAGE_TOKENS)
    case: Row = {"what": "sdpa decode", "shape": str(shape), "batch": batch, "context": context}
    ours = {kv: pool.decode(batch, context, plan.cold) for kv, pool in pools.items()}
    theirs = _torch_decode(shape, batch, context, plan.cold)
    rows = _against_torch(case, ours, theirs, pools, plan.repeats)
    case = {"what": "sdpa prefill", "shape": str(shape), "chunk": CHUNK, "context": HISTORY + CHUNK}
    ours = {kv: pool.prefill() for kv, pool in pools.items()}
    return rows + _against_torch(case, ours, _torch_prefill(shape, say), pools, plan.repeats)


def _torch_decode(shape: Heads, batch: int, context: int, cold: int) -> dict[str, Call]:
    """torch's ways for a decode step over contiguous keys and values."""
    heads, kv_heads, dim = shape
    count = math.ceil(cold / (4 * batch * context * kv_heads * dim))
    pairs = cycle([[random(batch, kv_heads, context, dim) for _ in "kv"] for _ in range(count)])
    q = random(batch, heads, 1, dim)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    return {
        "enable_gqa": lambda: _attention(q, *next(pairs), enable_gqa=True),
        "heads as rows": lambda: _attention(grouped, *next(pairs)),
    }


def _torch_prefill(shape: Heads, say: Callable[[str], None]) -> dict[str, Call]:
    """torch's ways for a chunk, causal inside, behind a history."""
    heads, kv_heads, dim = shape
    total = HISTORY + CHUNK
    q, k, v = random(1, heads, CHUNK, dim), *(random(1, kv_heads, total, dim) for _ in "kv")
    seen = torch.ones(CHUNK, total, dtype=torch.bool).tril(HISTORY)
    added = torch.zeros(CHUNK, total).masked_fill(~seen, -math.inf).bfloat16()
    wide = [x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v)]
    calls: dict[str, Call] = {}
    for name, mask in (
        ("boolean mask", seen),
        ("additive mask", added),
        ("causal_lower_right", causal_lower_right(CHUNK, total)),
    ):
        calls[name] = partial(_attention, q, k, v, attn_mask=mask, enable_gqa=True)
        calls[f"{name}, heads repeated"] = partial(_attention, q, *wide, attn_mask=mask)
    truth = calls["boolean mask"]().float()
    return {name: call for name, call in calls.items() if _agrees(name, call, truth, say)}


def _agrees(name: str, call: Call, truth: torch.Tensor, say: Callable[[str], None]) -> bool:
    """Whether a way of torch works and computes the same."""
    try:
        right = torch.allclose(call().float(), truth, atol=0.02)
    except (RuntimeError, TypeError, ValueError) as error:
        say(f"torch, {name}: {error}")
        return False
    if not right:
        say(f"torch, {name}: other results")
    return right


def _against_torch(
    case: Row, ours: dict[str, Call], theirs: dict[str, Call], pools: dict[str, Pool], repeats: int
) -> list[Row]:
    times = interleaved(ours | {f"torch: {name}": call for name, call in theirs.items()}, repeats)
    for kv, pool in pools.items():
        times[kv] /= pool.layers
    best = min(
        (name for name in times if name not in ours), key=lambda name: np.median(times[name])
    )
    return [
        case
        | {
            "kv": name,
            "seconds": significant(statistics.median(took)),
            "speed_of_torch": significant(statistics.median(times[best] / took)),
        }
        for name, took in times.items()
    ]
