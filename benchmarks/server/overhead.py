"""What the server costs: the same work through it and through ``kvant.Pipeline``.

    python benchmarks/server/overhead.py --output benchmarks/results/server-overhead-DATE.json

A closed loop of streaming chat requests, greedy, all of the same length. The pipeline does it in
this process, with ``stream_infer_async``; the server is a process of its own, and its client is
this one, which then does nothing else: it reads bytes and notes the time, and parses them when the
clock has stopped. Client and server share the cores, so the server pays for its client. Turns of
both alternate; figures are medians over turns.

``delay_ms`` is the time from the engine's handing over a piece of text to its reader's having all
of it: for the server (stamped.py notes when) that is its work, a trip through the kernel to the
client, and waiting for a core; for the pipeline, waking up an ``async for``. ``gap_ms`` are the
times between pieces, as readers see them. ``added_ms`` is what the server has more, of medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from load import WORDS
from process import Server
from wire import Answer, Connection, post

from kvant import EngineConfig, GenerationConfig, Pipeline, pipeline
from kvant.engine.worker import Stream
from kvant.machine import machine
from kvant.request import Output

WARM_UP_TOKENS = 8
TARGET_RATIO, TARGET_MS = 0.95, 1.0


@dataclass(frozen=True)
class Turn:
    """One pass over some prompts: the texts, what it took, and when which characters came."""

    texts: list[str]
    wall_s: float
    cpu_s: dict[str, float]
    arrivals: dict[int, list[tuple[float, int]]] = field(repr=False)
    """By seed: (seconds, characters so far) of every piece."""


def prompts(count: int, rng: random.Random) -> list[list[dict[str, str]]]:
    """Conversations of about 100 tokens that nobody had before."""
    words = WORDS.split()
    return [[{"role": "user", "content": " ".join(rng.choices(words, k=90))}] for _ in range(count)]


async def closed_loop(count: int, concurrency: int, one: Callable[[int], Awaitable[None]]) -> float:
    """Do 0 to ``count - 1``, ``concurrency`` at a time; seconds that it took."""
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await one(number)

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return time.perf_counter() - start


class Bench:
    """Both sides, and what happened so far."""

    def __init__(self, pipe: Pipeline, server: Server, kept: list[Connection]) -> None:
        self._pipe, self._server, self._kept = pipe, server, kept
        self.delivered: dict[int, list[tuple[float, int]]] = {}
        """Of the pipeline: when the engine handed over how many characters, by seed."""

    async def through_pipeline(
        self, work: Sequence[Any], first_seed: int, tokens: int, concurrency: int
    ) -> Turn:
        texts = [""] * len(work)
        arrivals: dict[int, list[tuple[float, int]]] = {}

        async def one(number: int) -> None:
            seed = first_seed + number
            gen = GenerationConfig(
                max_new_tokens=tokens, do_sample=False, ignore_eos=True, random_seed=seed
            )
            seen = arrivals.setdefault(seed, [])
            async for piece in self._pipe.stream_infer_async(work[number], gen):
                texts[number] += piece.text
                seen.append((time.perf_counter(), len(texts[number])))

        cpu = time.process_time()
        wall = await closed_loop(len(work), concurrency, one)
        return Turn(texts, wall, {"pipeline": time.process_time() - cpu}, arrivals)

    async def through_server(
        self, work: Sequence[Any], first_seed: int, tokens: int, concurrency: int
    ) -> Turn:
        answers: list[Answer] = [Answer(0.0)] * len(work)
        payloads = [
            post(
                "/v1/chat/completions",
                {
                    "messages": messages,
                    "max_tokens": tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "seed": first_seed + number,
                    "stream": True,
                },
            )
            for number, messages in enumerate(work)
        ]
        while len(self._kept) < concurrency:
            self._kept.append(await Connection.open(self._server.port))
        free = self._kept[:concurrency]

        async def one(number: int) -> None:
            connection = free.pop()
            answers[number] = await connection.ask(payloads[number])
            free.append(connection)

        own, servers = time.process_time(), self._server.cpu_seconds
        wall = await closed_loop(len(work), concurrency, one)
        cpu = {
            "client": time.process_time() - own,
            "server": self._server.cpu_seconds - servers,
        }
        found = [arrivals_of(answer) for answer in answers]
        return Turn(
            [text for text, _ in found],
            wall,
            cpu,
            {first_seed + number: seen for number, (_, seen) in enumerate(found)},
        )

    def note_pipelines_deliveries(self) -> None:
        """As stamped.py does for the server."""
        plain: Any = Stream._deliver
        delivered = self.delivered

        def deliver(stream: Stream, output: Output) -> None:
            seen = delivered.setdefault(stream.request.seed, [(0.0, 0)])
            seen.append((time.perf_counter(), seen[-1][1] + len(output.text)))
            plain(stream, output)

        Stream._deliver = deliver  # type: ignore[method-assign]


_EVENT = re.compile(rb"data: (\{.*?\})\n\n")


def arrivals_of(answer: Answer) -> tuple[str, list[tuple[float, int]]]:
    """The text of a stream, and when how many characters of it had come."""
    assert answer.status == 200, answer.body
    assert answer.complete, "the stream was cut"
    ends = list(accumulate(len(data) for _, data in answer.reads))
    text, seen = "", []
    for match in _EVENT.finditer(b"".join(data for _, data in answer.reads)):
        event = json.loads(match[1])
        assert "error" not in event, event
        if piece := event["choices"][0]["delta"].get("content"):
            text += piece
            seen.append((answer.reads[bisect_left(ends, match.end())][0], len(text)))
    return text, seen


def delays_ms(
    delivered: Sequence[tuple[float, int]], arrived: Sequence[tuple[float, int]]
) -> list[float]:
    """For each piece of text that was handed over, how long until all of it had come."""
    sizes = [size for _, size in arrived]
    found, before = [], 0
    for when, size in delivered:
        if size > before:
            found.append(1e3 * (arrived[bisect_left(sizes, size)][0] - when))
        before = size
    return found


def gaps_ms(turns: Sequence[Turn]) -> list[float]:
    """Times between pieces."""
    return [
        1e3 * (after - before)
        for turn in turns
        for seen in turn.arrivals.values()
        for (before, _), (after, _) in pairwise(seen)
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    points = np.percentile(values, (50, 90, 99)) if values else [np.nan] * 3
    return {f"p{p}": round(float(v), 3) for p, v in zip((50, 90, 99), points, strict=True)}


def delays_of(
    delivered: dict[int, list[tuple[float, int]]], turns: Sequence[Turn]
) -> dict[str, float]:
    return spread(
        [
            late
            for turn in turns
            for seed, seen in turn.arrivals.items()
            for late in delays_ms(delivered[seed], seen)
        ]
    )


def read_stamps(path: Path) -> dict[int, list[tuple[float, int]]]:
    """What stamped.py wrote, by seed, with characters so far."""
    found: dict[int, list[tuple[float, int]]] = {}
    for seed, when, size in json.loads(path.read_text()):
        seen = found.setdefault(seed, [])
        seen.append((when, size + (seen[-1][1] if seen else 0)))
    return found


Turns = dict[str, list[Turn]]


async def measure(bench: Bench, args: argparse.Namespace) -> dict[int, Turns]:
    """Turns of both sides, by concurrency; who begins alternates."""
    rng, seed = random.Random(0), 1
    found: dict[int, Turns] = {}
    sides = {"pipeline": bench.through_pipeline, "server": bench.through_server}
    for concurrency, requests in ((args.concurrency, args.requests), (1, args.requests_alone)):
        turns: Turns = {name: [] for name in sides}
        for repeat in range(-1, args.repeats):
            tokens = args.tokens if repeat >= 0 else WARM_UP_TOKENS
            work = prompts(requests, rng)
            for name in sorted(sides, reverse=repeat % 2 == 0):
                turn = await sides[name](work, seed, tokens, concurrency)
                if repeat >= 0:
                    turns[name].append(turn)
                    rate = requests * tokens / turn.wall_s
                    print(concurrency, repeat, name, round(rate, 1), turn.cpu_s, file=sys.stderr)
            seed += requests
        found[concurrency] = turns
    return found


def result(
    concurrency: int,
    turns: Turns,
    stamps: dict[int, list[tuple[float, int]]],
    delivered: dict[int, list[tuple[float, int]]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    requests = args.requests if concurrency > 1 else args.requests_alone
    rates = {
        name: [round(requests * args.tokens / turn.wall_s, 1) for turn in each]
        for name, each in turns.items()
    }
    ratios = [s / p for s, p in zip(rates["server"], rates["pipeline"], strict=True)]
    same = all(a.texts == b.texts for a, b in zip(turns["pipeline"], turns["server"], strict=True))
    delays = {
        "pipeline": delays_of(delivered, turns["pipeline"]),
        "server": delays_of(stamps, turns["server"]),
    }
    gaps = {name: spread(gaps_ms(each)) for name, each in turns.items()}
    more = {
        name: round(found["server"]["p50"] - found["pipeline"]["p50"], 3)
        for name, found in (("delay", delays), ("gap", gaps))
    }
    return {
        "concurrency": concurrency,
        "requests": requests,
        "tokens": args.tokens,
        "tokens_per_s": rates,
        "median": {name: statistics.median(each) for name, each in rates.items()},
        "ratio": round(statistics.median(ratios), 4),
        "delay_ms": delays,
        "gap_ms": gaps,
        "added_ms": more,
        "cpu_s": {
            name: round(statistics.median(turn.cpu_s[name] for turn in turns[side]), 2)
            for side, name in (
                ("pipeline", "pipeline"),
                ("server", "server"),
                ("server", "client"),
            )
        },
        "same_texts": same,
        "targets_met": {
            "ratio": statistics.median(ratios) >= TARGET_RATIO,
            "added_ms": max(more.values()) < TARGET_MS,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add("--kv", default="int8")
    add("--kv-tokens", type=int, default=65536)
    add("--concurrency", type=int, default=16)
    add("--requests", type=int, default=48, help="of a turn")
    add("--requests-alone", type=int, default=4, help="of a turn of one at a time")
    add("--tokens", type=int, default=96, help="of an answer")
    add("--repeats", type=int, default=5)
    add("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stamps = os.environ["KVANT_STAMPS"] = str(Path(folder) / "stamps.json")
        words = [args.model, "--kv", args.kv, "--kv-tokens", str(args.kv_tokens)]
        program = (sys.executable, str(Path(__file__).with_name("stamped.py")))
        config = EngineConfig(kv=args.kv, kv_tokens=args.kv_tokens)
        with Server(words, program) as server, pipeline(args.model, config) as pipe:
            bench = Bench(pipe, server, [])
            bench.note_pipelines_deliveries()
            turns = uvloop.run(measure(bench, args))
            command = server.command
        noted = read_stamps(Path(stamps))
    results = [result(c, each, noted, bench.delivered, args) for c, each in turns.items()]
    found = {
        "machine": machine(),
        "command": " ".join(sys.argv),
        "server": command,
        "about": "client and server share the cores; medians of alternating turns",
        "results": results,
    }
    text = json.dumps(found, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
