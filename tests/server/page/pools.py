"""Snapshots as GET /kv gives them, made up: any pool, and one of a busy server at any moment."""

from __future__ import annotations

from collections import Counter
from typing import Any

PAGE_TOKENS = 64

Ranges = list[list[int]]


def request(
    number: int, pages: Ranges, *, prompt: int = 100, generated: int = 0, hits: int = 0, **more: Any
) -> dict[str, Any]:
    """One entry of a snapshot's requests."""
    known = {"id": number, "status": "running", "prompt_tokens": prompt, "generated": generated}
    computed = prompt + generated
    return (
        known | {"cached_tokens": hits, "computed": computed, "pages": pages, "recent": []} | more
    )


def snapshot(
    total: int = 64,
    requests: tuple[dict[str, Any], ...] = (),
    cached: Ranges | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A snapshot whose counts agree with its ranges; ``more`` replaces any field."""
    cached = cached or []
    holders = Counter(
        page for r in requests for first, n in r["pages"] for page in range(first, first + n)
    )
    num_cached = sum(n for _, n in cached)
    running = sum(r["status"] == "running" for r in requests)
    return {
        "model": "fake",
        "state": "ready",
        "kv": {
            "label": "K int8, V int4",
            "bytes_per_token": 8640.0,
            "bytes_per_token_16bit": 23040.0,
            "page_tokens": PAGE_TOKENS,
        },
        "pages": {
            "total": total,
            "held": len(holders),
            "cached": num_cached,
            "free": total - len(holders) - num_cached,
        },
        "cached": cached,
        "running": running,
        "waiting": len(requests) - running,
        "max_running": 128,
        "tokens": {"prompt": 1000, "cached": 250, "generated": 0},
        "preemptions": 0,
        "uptime_s": 1.0,
        "requests": list(requests),
    } | more


def busy(total: int, moment: int, *, waiting: int = 2) -> dict[str, Any]:
    """A server with work at a moment (half seconds): eight requests that share a prefix of four
    pages with one another or have none, growing at their own pace until they end and their pages
    stay cached."""
    room = max(4, (total * 3 // 4 - 4) // 8)
    requests, cached = [], []
    for lane in range(8):
        life, age = divmod(moment * (lane + 3) + 17 * lane, room * 8)
        own = 1 + age // 8
        first = 4 + lane * room
        shares = lane % 2 == 0
        generated = age * 8
        requests.append(
            request(
                lane + 1 + 8 * life,
                ([[0, 4]] if shares else []) + [[first, own]],
                prompt=310 if shares else 57,
                generated=generated,
                hits=256 if shares else 0,
            )
        )
        if life and own < room:
            cached.append([first + own, room - own])
    held = 4 + 8 * room
    cached.append([held, min(total // 12, total - held)])
    queue = [request(900 + i, [], prompt=2000, status="waiting") for i in range(waiting)]
    return snapshot(
        total,
        (*requests, *queue),
        cached,
        tokens={
            "prompt": 9000 + 40 * moment,
            "cached": 3600 + 20 * moment,
            "generated": 24 * moment,
        },
        preemptions=moment // 40,
        uptime_s=moment / 2,
    )
