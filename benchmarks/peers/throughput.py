"""End to end: the same prompts through kvant and other engines, all rows taking turns.

    python benchmarks/peers/throughput.py --data DATA --envs ENVS --output RESULTS.json

Runs in kvant's environment. Each row (an engine with weights and a KV format, ``WEIGHTS/KV``) has a
process of its own that loads its model once (``throughput_worker.py``; kvant: one process for all
its rows); one works, the others sleep. Work is --requests prompts at once, each continued greedily
by --output-len tokens, with the same number of threads; --work names those that we compare.
Prompts are windows of WikiText-2 from starts that no other prompt has, so nothing is found in a
prefix cache, and these are off. A repeat is one run of every row with the same prompts; figures are
medians, ratios medians over repeats.

``speed_of_best_peer`` compares with the row of another engine whose median is best.
``same_first`` is the share of prompts whose first new token is that of the first row: a check that
an engine computes the same model. ``others_cpu`` is what sleeping processes took of a core.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import psutil
from common import windows
from numpy.typing import NDArray
from prepare import peer_weights

from kvant.machine import machine

PEERS = {  # environment, rows by default
    "openvino": ("openvino", "bf16/bf16,int8_sym/bf16,q4_1/bf16"),
    "vllm": ("vllm", "bf16/auto,int8/auto"),
    "llama_cpp": ("xllamacpp", "bf16/f16,q8_0/f16,q4_0/f16"),
}
WORKS = {  # requests, tokens of each prompt, new tokens
    "A": (16, 256, 128),
    "B": (8, 4096, 64),
    "C": (1, 128, 256),
}
HERE = Path(__file__).parent
WARM = 512
"""Tokens of the prompts that warm a row up."""


class Process:
    """A worker."""

    def __init__(self, engine: str, command: list[str], log: Path) -> None:
        self.engine, self._log = engine, log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.about = self._receive()

    def _receive(self) -> dict[str, Any]:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            raise SystemExit(f"{self.engine} ended:\n{self._log.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def run(self, row: str, prompts: NDArray[np.int64], new: int) -> dict[str, Any]:
        work = {"row": row, "prompts": prompts.tolist(), "new": new}
        print(json.dumps(work), file=self._pipe(self._process.stdin), flush=True)
        found = self._receive()
        lengths = [len(tokens) for tokens in found["tokens"]]
        assert lengths == [new] * len(prompts), f"{self.engine} {row} made {lengths} tokens"
        return found

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        return sum(psutil.Process(self._process.pid).cpu_times()[:2])

    def memory(self) -> int:
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def close(self) -> None:
        self._pipe(self._process.stdin).close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Row(NamedTuple):
    process: Process
    formats: str
    """Weights and KV."""
    seconds: list[float]
    firsts: list[int]

    @property
    def name(self) -> str:
        return f"{self.process.engine} {self.formats}"

    def speed_of(self, other: Row) -> float:
        ratios = [a / b for a, b in zip(other.seconds, self.seconds, strict=True)]
        return round(statistics.median(ratios), 3)


def start(args: argparse.Namespace, stack: ExitStack) -> list[Row]:
    """All workers, and the rows that they run."""
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    common = ["--data", str(args.data), "--threads", str(args.threads)]
    common += ["--requests", str(args.requests)]
    common += ["--tokens", str(max(args.input_len, WARM) + args.output_len)]
    rows: list[Row] = []

    def add(engine: str, python: str, options: list[str]) -> None:
        print(f"starting {engine} {' '.join(options)}", file=sys.stderr)
        command = [python, str(HERE / f"throughput_{engine}.py"), *common, *options]
        process = Process(engine, command, logs / f"{engine}-{len(rows)}")
        stack.callback(process.close)
        rows.extend(Row(process, formats, [], []) for formats in process.about.pop("rows"))

    if args.kvant:
        options = ["--rows", args.kvant, "--model", args.model, "--backend", args.backend]
        add("kvant", sys.executable, options)
    for engine, (env, _) in PEERS.items():
        for formats in filter(None, getattr(args, engine).split(",")):
            weights, kv = formats.split("/") if "/" in formats else ("bf16", formats)
            peer_weights(args.model, args.data, engine, weights)
            options = ["--weights", weights, "--kv", kv]
            options += getattr(args, f"{engine}_options").split()
            add(engine, str(args.envs / env / "bin" / "python"), options)
    return rows


def prompts(args: argparse.Namespace) -> list[NDArray[np.int64]]:
    """Of the warm-up and of each repeat: [requests, length]."""
    text = windows(args.data).reshape(-1)
    count = (args.repeats + 1) * args.requests
    starts = np.random.default_rng(0).choice(len(text), count, replace=False)
    where = starts[:, None] + np.arange(args.input_len)
    every = text[where % len(text)].reshape(-1, args.requests, args.input_len)
    return [every[0, :, :WARM], *every[1:]]


def measure(args: argparse.Namespace, rows: list[Row]) -> float:
    """Run all rows in turns; what sleeping processes took of a core, at most."""
    processes = list({id(row.process): row.process for row in rows}.values())
    warm, *repeats = prompts(args)
    for row in rows:
        row.process.run(row.formats, warm, 4)
    busiest = 0.0
    for number, work in enumerate(repeats):
        for row in rows:
            others = [process for process in processes if process is not row.process]
            before = sum(process.cpu() for process in others)
            found = row.process.run(row.formats, work, args.output_len)
            took = sum(process.cpu() for process in others) - before
            busiest = max(busiest, took / found["seconds"])
            row.seconds.append(found["seconds"])
            row.firsts.extend(tokens[0] for tokens in found["tokens"])
            print(f"{number} {row.name} {found['seconds']:.2f} s", file=sys.stderr)
    return busiest


def result(args: argparse.Namespace, row: Row, rows: list[Row]) -> dict[str, Any]:
    took = statistics.median(row.seconds)
    best = best_peer(rows)
    same = np.mean(np.equal(row.firsts, rows[0].firsts))
    weights, kv = row.formats.split("/")
    return {
        "engine": row.process.engine,
        "weights": weights,
        "kv": kv,
        **row.process.about,
        "requests": args.requests,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "seconds": round(took, 3),
        "requests_per_second": round(args.requests / took, 3),
        "output_tokens_per_second": round(args.requests * args.output_len / took, 1),
        "tokens_per_second": round(args.requests * (args.input_len + args.output_len) / took, 1),
        "speed_of_first": row.speed_of(rows[0]),
        "speed_of_best_peer": row.speed_of(best) if best else None,
        "same_first_percent": round(100 * float(same), 1),
        "gib": round(row.process.memory() / 2**30, 2),
        "all_seconds": [round(seconds, 3) for seconds in row.seconds],
    }


def best_peer(rows: list[Row]) -> Row | None:
    peers = [row for row in rows if row.process.engine != "kvant"]
    return min(peers, key=lambda row: statistics.median(row.seconds), default=None)


COLUMNS = {
    "engine": ("engine", "{}"),
    "weights": ("weights", "{}"),
    "kv": ("KV", "{}"),
    "seconds": ("seconds", "{:.2f}"),
    "requests_per_second": ("requests/s", "{:.2f}"),
    "output_tokens_per_second": ("output tokens/s", "{:.1f}"),
    "speed_of_best_peer": ("of the best peer", "{:.2f}"),
    "speed_of_first": ("of the first", "{:.2f}"),
    "same_first_percent": ("same first token", "{:.0f} %"),
    "gib": ("GiB", "{:.2f}"),
}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, figures to the right."""
    lines = [[title for title, _ in COLUMNS.values()]]
    for row in results:
        cells = [(row[key], form) for key, (_, form) in COLUMNS.items()]
        lines.append(["" if value is None else form.format(value) for value, form in cells])
    lines.insert(1, ["---"] * 3 + ["--:"] * (len(COLUMNS) - 3))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def report(args: argparse.Namespace, rows: list[Row], others: float) -> None:
    results = [result(args, row, rows) for row in rows]
    command = shlex.join(sys.argv).replace(str(args.data), "$DATA").replace(str(args.envs), "$ENVS")
    best = best_peer(rows)
    found = {"machine": machine(), "command": command, "work": args.work, "threads": args.threads}
    found |= {"best_peer": best.name if best else None}
    found |= {"others_cpu": round(others, 4), "results": results}
    text = json.dumps(found, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    print(table(results), file=sys.stdout if args.markdown else sys.stderr)
    if not args.markdown:
        print(text)


def sizes(args: argparse.Namespace) -> None:
    """What of the work's sizes is not given; another size is a work without a name."""
    names = ("requests", "input_len", "output_len")
    named = dict(zip(names, WORKS[args.work], strict=True))
    for name, size in named.items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    if any(getattr(args, name) != size for name, size in named.items()):
        args.work = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the folder prepare.py made")
    add("--envs", type=Path, required=True, help="the peers' environments")
    ours = "bf16/bf16,bf16/k4v4,int8/int8h,int4/int4h"
    add("--kvant", default=ours, help="WEIGHTS/KV,...; others are compared with the first")
    for engine, (_, theirs) in PEERS.items():
        name = engine.replace("_", "-")
        add(f"--{name}", default=theirs, help='WEIGHTS/KV,... or "" for none')
        add(f"--{name}-options", default="", help=f'of throughput_{engine}.py, as "--chunk 256"')
    add("--model", default="smollm2-135m", help="kvant's name of the model in --data")
    add("--backend", default="auto", help="kvant's")
    add("--work", choices=WORKS, default="B", help="A: many chats, B: long prompts, C: one stream")
    add("--requests", type=int)
    add("--input-len", type=int)
    add("--output-len", type=int)
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--output", type=Path, help="JSON file")
    add("--markdown", action="store_true", help="print a table for documents, not JSON")
    args = parser.parse_args()
    sizes(args)
    with ExitStack() as stack:
        rows = start(args, stack)
        others = measure(args, rows)
        report(args, rows, others)


if __name__ == "__main__":
    main()
