"""Many clients at once, some of which vanish or talk nonsense, and what the server makes of it.

    python benchmarks/server/load.py --output benchmarks/results/server-load-DATE.json
    python benchmarks/server/load.py --soak 30 --output benchmarks/results/server-soak-DATE.json

First each work (a prompt and how to ask) is done alone, one after another. Then ``--concurrency``
clients do ``--num-requests`` of them, in a pool of pages that is too small for bursts of long ones,
so that sequences are preempted. One in ten clients leaves before its answer is complete, one in
twenty sends what is no request. All others must get exactly the text of the work done alone.
``--soak`` repeats such loads for as many minutes and watches the server's memory. The exit code is
1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from process import Server
from wire import Answer, Connection, events, post

from kvant.formats import PAGE_TOKENS
from kvant.machine import machine

MODEL = "smollm2-135m"
WORDS = """
the a of and to in that it was for on with as his they at be this from have or by one
had not but what all were when we there can an your which their said if do will each about how up
out them then she many some so these would other into has more her two like him see time could no
make than first been its who now people my made over did down only way find use may water long
little very after called just where most know river house garden letter winter road light machine
number answer question story city music paper
"""
LONG = 1 / 4  # of works
BURST, BETWEEN_BURSTS = 40, 200  # requests
LEAVING = 0.10
NONSENSE = 0.05
PATIENCE = 300.0  # seconds that a client waits for a complete answer
IDLE_PATIENCE = 20.0  # seconds in which the server must have given back what clients left
SAMPLE_SECONDS = 10.0
WARM_UP = 300.0  # seconds of a soak that say nothing about growth
ROUND = 400  # requests of a round of a soak
MOST_GROWTH = 2.0  # percent

Texts = tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """A request that has one right answer: greedy, of a fixed length."""

    path: str
    body: dict[str, Any]

    @property
    def payload(self) -> bytes:
        return post(self.path, self.body)

    @property
    def is_streamed(self) -> bool:
        return bool(self.body["stream"])

    @property
    def is_long(self) -> bool:
        """Whether the answer may take several pages."""
        return bool(self.body["max_tokens"] > PAGE_TOKENS)


def works(count: int, rng: random.Random) -> list[Work]:
    """Prompts of about 20 to 300 tokens for chat and completions, two in five with one of three
    common beginnings, one in eight with two answers, half of them streamed. Answers have 8 to 48
    tokens, one in four 160 to 240, which are some pages."""

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS.split(), k=rng.randint(low, high)))

    prefixes = [text(140, 200) for _ in range(3)]
    found = []
    for number in range(count):
        begin = rng.choice(prefixes) if rng.random() < 0.4 else ""
        prompt = text(15, 60) if begin else text(15, 240)
        common = {
            "temperature": 0,
            "ignore_eos": True,
            "max_tokens": rng.randint(160, 240) if rng.random() < LONG else rng.randint(8, 48),
            "stream": number % 2 == 0,
            "n": 2 if number % 8 == 0 else 1,
        }
        if number % 4 < 2:
            system = [{"role": "system", "content": begin}] if begin else []
            messages = [*system, {"role": "user", "content": prompt}]
            found.append(Work("/v1/chat/completions", {"messages": messages, **common}))
        else:
            found.append(Work("/v1/completions", {"prompt": f"{begin} {prompt}", **common}))
    return found


def nonsense() -> list[tuple[bytes, int | None]]:
    """What is no request, and the status that it deserves; None: no answer is expected, as the
    client leaves in the middle."""
    path, good = "/v1/completions", {"prompt": "x", "max_tokens": 4}
    whole = post(path, good)
    return [
        (post(path, b'{"prompt": "x", '), 400),
        (post(path, b"\xff\xfe\x00{"), 400),
        (post(path, b'{"prompt": "\xc3\x28"}'), 400),
        (post(path, b""), 400),
        (post(path, b"[1, 2]"), 400),
        (post(path, {**good, "max_tokens": -1}), 400),
        (post(path, {**good, "temperature": "hot"}), 400),
        (post(path, {**good, "model": "another"}), 404),
        (post(path, {"prompt": "x " * 100_000}), 400),
        (post("/v1/chat/completions", {"messages": []}), 400),
        (post("/v1/chat/completions", {"messages": [{"role": "king", "content": "x"}]}), 400),
        (post("/v2/completions", good), 404),
        (b"GET /v1/completions HTTP/1.1\r\nhost: x\r\n\r\n", 405),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n", 413),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), 400),
        (b"\x00" * 1000, 400),
        (whole[:20], None),
        (whole[:-5], None),
    ]


def texts_of(work: Work, answer: Answer) -> Texts:
    """The texts of a complete answer, by index.

    Raises:
        ValueError: it is none; the message says what came.
    """
    if answer.status != 200 or not answer.complete:
        how = "" if answer.complete else ", cut"
        raise ValueError(f"status {answer.status}{how}: {answer.body[:200]!r}")
    found: list[list[str]] = [[] for _ in range(work.body["n"])]
    for event in events(answer.body) if work.is_streamed else [json.loads(answer.body)]:
        if "error" in event:
            raise ValueError(str(event["error"]))
        for choice in event["choices"]:
            part = choice.get("delta") or choice.get("message") or choice
            found[choice["index"]].append(part.get("content") or part.get("text") or "")
    if work.is_streamed and not answer.body.endswith(b"data: [DONE]\n\n"):
        raise ValueError("the stream has no end")
    return tuple("".join(parts) for parts in found)


@dataclass
class Findings:
    """What clients saw. ``wrong`` has a line for whatever was not as it must be."""

    equal: int = 0
    left: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    longest_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Load:
    """Clients that do works whose right texts are known."""

    def __init__(self, port: int, known: Sequence[tuple[Work, Texts]], rng: random.Random) -> None:
        self._port, self._rng = port, rng
        self._works = self._in_bursts(known)
        self._nonsense = itertools.cycle(nonsense())
        self.findings = Findings()

    async def run(self, count: int, concurrency: int) -> None:
        """Have ``count`` requests made, ``concurrency`` at a time."""
        kinds = ["leave"] * round(count * LEAVING) + ["talk nonsense"] * round(count * NONSENSE)
        kinds += ["stay"] * (count - len(kinds))
        self._rng.shuffle(kinds)
        queue = iter(kinds)
        await asyncio.gather(*(self._client(queue) for _ in range(concurrency)))

    def _in_bursts(self, known: Sequence[tuple[Work, Texts]]) -> Iterator[tuple[Work, Texts]]:
        """Short works at random, and now and then a burst of long ones: the scheduler keeps a page
        free for each sequence that runs, so only many that take several exhaust the pool."""
        long = [each for each in known if each[0].is_long]
        short = [each for each in known if not each[0].is_long]
        while True:
            yield from self._rng.choices(long, k=BURST)
            yield from self._rng.choices(short, k=BETWEEN_BURSTS - BURST)

    async def _client(self, kinds: Iterator[str]) -> None:
        connection = None
        for kind in kinds:
            start = time.perf_counter()
            try:
                async with asyncio.timeout(PATIENCE):
                    if connection is None or not connection.is_open:
                        connection = await Connection.open(self._port)
                    if kind == "stay":
                        await self._stay(connection)
                    elif kind == "leave":
                        await self._leave(connection)
                    else:
                        await self._talk_nonsense(connection)
            except (OSError, TimeoutError) as error:
                self.findings.wrong.append(f"{kind}: {type(error).__name__} {error}")
            took = time.perf_counter() - start
            self.findings.longest_s = max(self.findings.longest_s, took)
        if connection is not None:
            connection.close()

    async def _stay(self, connection: Connection) -> None:
        work, known = next(self._works)
        answer = await connection.ask(work.payload)
        try:
            texts = texts_of(work, answer)
        except ValueError as error:
            self.findings.wrong.append(str(error))
            return
        if texts != known:
            self.findings.wrong.append(f"{work.body} has {texts}, alone {known}")
            return
        self.findings.equal += 1
        self.findings.whole_s.append(answer.last - answer.sent)
        if work.is_streamed and work.path == "/v1/completions":  # chat sends the role at once
            self.findings.first_s.append(answer.first - answer.sent)

    async def _leave(self, connection: Connection) -> None:
        """Half leave after some reads, as late as that may be; half soon, which for most is while
        they wait in the queue."""
        work, _ = next(self._works)
        if work.is_streamed and self._rng.random() < 0.5:
            await connection.ask(work.payload, leave_after=self._rng.randint(1, 10))
        else:
            try:
                async with asyncio.timeout(self._rng.uniform(0, 1)):
                    await connection.ask(work.payload)
            except TimeoutError:
                pass
        connection.cut()
        self.findings.left += 1

    async def _talk_nonsense(self, connection: Connection) -> None:
        payload, status = next(self._nonsense)
        if status is None:
            try:
                async with asyncio.timeout(self._rng.uniform(0.01, 0.5)):
                    await connection.ask(payload)
            except TimeoutError:
                pass
            connection.cut()
            return
        answer = await connection.ask(payload)
        connection.cut()
        self.findings.refused[answer.status or 0] += 1
        if answer.status != status:
            got = f"{answer.status}: {answer.body[:200]!r}"
            self.findings.wrong.append(f"nonsense {payload[:150]!r} deserves {status}, got {got}")


async def alone(port: int, work: Iterable[Work]) -> list[tuple[Work, Texts]]:
    """Each work and its texts, one after another."""
    connection = await Connection.open(port)
    found = [(each, texts_of(each, await connection.ask(each.payload))) for each in work]
    connection.close()
    return found


async def wait_until_idle(server: Server) -> dict[str, Any]:
    """What /kv and /metrics say once nothing runs, or after 20 seconds."""
    end = time.monotonic() + IDLE_PATIENCE
    while True:
        kv = await asyncio.to_thread(server.get, "/kv")
        found = {"running": kv["running"], "waiting": kv["waiting"], "held": kv["pages"]["held"]}
        if not any(found.values()) or time.monotonic() > end:
            break
        await asyncio.sleep(0.3)
    metric = server.metric
    return found | {
        "metrics": {
            "running": metric("kvant:num_requests_running"),
            "waiting": metric("kvant:num_requests_waiting"),
            "held": metric("kvant:kv_pages", state="held"),
        }
    }


def is_idle(idle: dict[str, Any]) -> bool:
    return not any(idle[name] or idle["metrics"][name] for name in ("running", "waiting", "held"))


TOTALS = {
    "preemptions": "kvant:num_preemptions_total",
    "prompt_tokens": "kvant:prompt_tokens_total",
    "cached_tokens": "kvant:cached_tokens_total",
    "generated_tokens": "kvant:generation_tokens_total",
    "aborted": "kvant:requests_aborted_total",
}


def totals(server: Server) -> dict[str, float]:
    """What the server counts."""
    found = {name: server.metric(metric) for name, metric in TOTALS.items()}
    return found | {"http_5xx": server.metric("kvant:http_requests_total", status="5xx")}


def spread(values: Sequence[float]) -> dict[str, float]:
    names, points = ("p50", "p90", "p99", "max"), (50, 90, 99, 100)
    found = np.percentile(values, points) if values else [np.nan] * len(points)
    return {name: round(float(value), 3) for name, value in zip(names, found, strict=True)}


async def run_load(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Alone, all together, alone again."""
    rng = random.Random(args.seed)
    rss = {"start": server.rss_mib}
    known = await alone(server.port, works(args.works, rng))
    rss["alone"], before = server.rss_mib, totals(server)
    load = Load(server.port, known, rng)
    start, cpu, own = time.perf_counter(), server.cpu_seconds, time.process_time()
    await load.run(args.num_requests, args.concurrency)
    took = time.perf_counter() - start
    cpu, own = server.cpu_seconds - cpu, time.process_time() - own
    idle = await wait_until_idle(server)
    rss["load"] = server.rss_mib
    counted = {name: after - before[name] for name, after in totals(server).items()}
    again = await alone(server.port, (work for work, _ in known))
    rss["alone_again"] = server.rss_mib
    findings = load.findings
    wrong = [*findings.wrong, *verdict(idle, counted)]
    if again != known:
        wrong.append("a text alone after the load differs from that before")
    return {
        "server": server.command,
        "requests": args.num_requests,
        "concurrency": args.concurrency,
        "works": len(known),
        "equal": findings.equal,
        "left": findings.left,
        "refused": dict(sorted(findings.refused.items())),
        "duration_s": round(took, 1),
        "requests_per_s": round(args.num_requests / took, 2),
        "generated_tokens_per_s": round(counted["generated_tokens"] / took, 1),
        "first_token_s": spread(findings.first_s),
        "answer_s": spread(findings.whole_s),
        "longest_s": round(findings.longest_s, 1),
        "counted": counted,
        "after": idle,
        "cpu_s": {"server": round(cpu, 1), "clients": round(own, 1)},
        "rss_mib": rss,
        "wrong": wrong[:20],
        "passed": not wrong,
    }


def verdict(idle: dict[str, Any], counted: dict[str, float]) -> Iterator[str]:
    """What is wrong with the server's own numbers."""
    if not is_idle(idle):
        yield f"something is left: {idle}"
    if counted["http_5xx"]:
        yield f"{counted['http_5xx']:g} answers are 5xx"
    if not counted["preemptions"]:
        yield "nothing was preempted: the pool is too large to say anything"


async def run_soak(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of load for ``args.soak`` minutes, and the server's memory meanwhile."""
    rng = random.Random(args.seed)
    known = await alone(server.port, works(args.works, rng))
    load, rounds, wrong = Load(server.port, known, rng), [], []
    samples: list[tuple[float, float]] = []
    start = time.monotonic()
    sampler = asyncio.create_task(sample(server, start, samples))
    before = totals(server)
    while time.monotonic() - start < 60 * args.soak:
        await load.run(ROUND, args.concurrency)
        idle = await wait_until_idle(server)
        if not is_idle(idle):
            wrong.append(f"something is left: {idle}")
        now = round(time.monotonic() - start, 1)
        rounds.append({"s": now, "held": idle["held"], "rss_mib": server.rss_mib})
        print(rounds[-1], len(load.findings.wrong), file=sys.stderr)
    sampler.cancel()
    counted = {name: after - before[name] for name, after in totals(server).items()}
    warm = WARM_UP if args.soak > 2 * WARM_UP / 60 else 60 * args.soak / 3
    grown = growth([each for each in samples if each[0] >= warm])
    wrong += [*load.findings.wrong, *verdict(idle, counted)]
    if max(grown["fit_percent"], grown["last_vs_first_percent"]) >= MOST_GROWTH:
        wrong.append(f"the server grew by {grown}")
    return {
        "server": server.command,
        "minutes": args.soak,
        "warm_up_s": warm,
        "concurrency": args.concurrency,
        "requests": ROUND * len(rounds),
        "equal": load.findings.equal,
        "left": load.findings.left,
        "refused": dict(sorted(load.findings.refused.items())),
        "counted": counted,
        "rss_growth": grown,
        "rounds": rounds,
        "samples": samples,
        "wrong": wrong[:20],
        "passed": not wrong,
    }


async def sample(server: Server, start: float, samples: list[tuple[float, float]]) -> None:
    while True:
        samples.append((round(time.monotonic() - start, 1), server.rss_mib))
        await asyncio.sleep(SAMPLE_SECONDS)


def growth(samples: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of resident memory in percent of the first: by a line through all samples, and the mean of
    the last tenth against that of the first."""
    times, sizes = np.array(samples).T
    slope = np.polyfit(times, sizes, 1)[0] if len(times) > 1 else 0.0
    part = max(1, len(sizes) // 10)
    first, last = sizes[:part].mean(), sizes[-part:].mean()
    fit = slope * (times[-1] - times[0])
    return {
        "first_mib": round(float(first), 1),
        "last_mib": round(float(last), 1),
        "fit_percent": round(100 * float(fit / first), 2),
        "last_vs_first_percent": round(100 * float(last / first - 1), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default=MODEL)
    add("--kv", default="k4v4")
    add("--kv-tokens", default="5120", help="of the pool: too few for bursts")
    add("--max-batch-size", default="32", help="of the server: memory follows the most that ran")
    add("--num-requests", type=int, default=2000)
    add("--concurrency", type=int, default=256)
    add("--works", type=int, default=64, help="different requests")
    add("--soak", type=float, help="minutes to go on, in rounds")
    add("--seed", type=int, default=0)
    add("--output", type=Path)
    args = parser.parse_args()
    run = run_load if args.soak is None else run_soak
    words = [args.model, "--kv", args.kv, "--kv-tokens", args.kv_tokens]
    with Server([*words, "--max-batch-size", args.max_batch_size]) as server:
        result = uvloop.run(run(server, args))
    found = {"machine": machine(), "command": " ".join(sys.argv), "results": [result]}
    text = json.dumps(found, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
