"""End to end: the same prompts through kvant and other engines, all rows taking turns.

    python benchmarks/peers/throughput.py --data DATA --envs ENVS --output RESULTS.json

Runs in kvant's environment. Each row (an engine with a KV format) has a process of its own that
loads its model once (``throughput_worker.py``; kvant: one process for all its rows); one works, the
others sleep. Work is --requests prompts at once, each continued greedily by --output-len tokens,
with the same number of threads. Prompts are windows of WikiText-2 from starts that no other prompt
has, so nothing is found in a prefix cache, and these are off. A repeat is one run of every row with
the same prompts; figures are medians, ratios medians over repeats.

``same_first`` is the share of prompts whose first new token is that of the first row: a check that
an engine computes the same model. ``others_cpu`` is what sleeping processes took of a core.
"""

from __future__ import annotations

import argparse
import json
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
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from prepare import float_gguf

from kvant.cli.options import split_specs
from kvant.loading.resolve import resolve_model
from kvant.machine import machine

PEERS = {  # environment, rows by default, script
    "openvino": ("openvino", "bf16,u8,u4"),
    "vllm": ("vllm", "auto,fp8_e4m3"),
    "llama_cpp": ("xllamacpp", "f16,q8_0,q4_0"),
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

    def run(self, kv: str, prompts: NDArray[np.int64], new: int) -> dict[str, Any]:
        work = {"kv": kv, "prompts": prompts.tolist(), "new": new}
        print(json.dumps(work), file=self._pipe(self._process.stdin), flush=True)
        found = self._receive()
        lengths = [len(tokens) for tokens in found["tokens"]]
        assert lengths == [new] * len(prompts), f"{self.engine} {kv} made {lengths} tokens"
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
    kv: str
    seconds: list[float]
    firsts: list[int]

    @property
    def name(self) -> str:
        return f"{self.process.engine} {self.kv}"


def start(args: argparse.Namespace, stack: ExitStack) -> list[Row]:
    """All workers, and the rows that they run."""
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    common = ["--data", str(args.data), "--threads", str(args.threads)]
    common += ["--requests", str(args.requests)]
    common += ["--tokens", str(max(args.input_len, WARM) + args.output_len)]
    rows: list[Row] = []

    def add(engine: str, python: str, options: list[str], kvs: list[str]) -> None:
        print(f"starting {engine} {','.join(kvs)}", file=sys.stderr)
        command = [python, str(HERE / f"throughput_{engine}.py"), *common, *options]
        process = Process(engine, command, logs / f"{engine}-{len(rows)}")
        stack.callback(process.close)
        rows.extend(Row(process, kv, [], []) for kv in kvs)

    if args.kvant:
        options = ["--kv", args.kvant, "--model", args.model, "--backend", args.backend]
        add("kvant", sys.executable, options, [s.label for s in split_specs(args.kvant)])
    for engine, (env, _) in PEERS.items():
        for kv in filter(None, getattr(args, engine).split(",")):
            options = getattr(args, f"{engine}_options").split()
            add(engine, str(args.envs / env / "bin" / "python"), ["--kv", kv, *options], [kv])
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
        row.process.run(row.kv, warm, 4)
    busiest = 0.0
    for number, work in enumerate(repeats):
        for row in rows:
            others = [process for process in processes if process is not row.process]
            before = sum(process.cpu() for process in others)
            found = row.process.run(row.kv, work, args.output_len)
            took = sum(process.cpu() for process in others) - before
            busiest = max(busiest, took / found["seconds"])
            row.seconds.append(found["seconds"])
            row.firsts.extend(tokens[0] for tokens in found["tokens"])
            print(f"{number} {row.name} {found['seconds']:.2f} s", file=sys.stderr)
    return busiest


def result(args: argparse.Namespace, row: Row, first: Row) -> dict[str, Any]:
    took = statistics.median(row.seconds)
    ratios = [a / b for a, b in zip(first.seconds, row.seconds, strict=True)]
    same = np.mean(np.equal(row.firsts, first.firsts))
    return {
        "engine": row.process.engine,
        "kv": row.kv,
        **row.process.about,
        "requests": args.requests,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "seconds": round(took, 3),
        "tokens_per_second": round(args.requests * (args.input_len + args.output_len) / took, 1),
        "speed_of_first": round(statistics.median(ratios), 3),
        "same_first_percent": round(100 * float(same), 1),
        "gib": round(row.process.memory() / 2**30, 2),
        "all_seconds": [round(seconds, 3) for seconds in row.seconds],
    }


def report(args: argparse.Namespace, results: list[dict[str, Any]], others: float) -> None:
    for row in results:
        print(
            f"{row['engine']:>10} {row['kv']:>9} {row['seconds']:8.2f} s "
            f"{row['tokens_per_second']:8.1f} tokens/s {row['speed_of_first']:6.2f} of the first "
            f"{row['same_first_percent']:4.0f} % same  {row['gib']:5.2f} GiB  {row['about']}",
            file=sys.stderr,
        )
    command = " ".join(sys.argv).replace(str(args.data), "$DATA").replace(str(args.envs), "$ENVS")
    found = {"machine": machine(), "command": command, "threads": args.threads}
    found |= {"others_cpu": round(others, 4), "results": results}
    text = json.dumps(found, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the folder prepare.py made")
    add("--envs", type=Path, required=True, help="the peers' environments")
    kv = "bf16,int8,int8h,int4,int4h,k8v8,k8v4,k4v4"
    add("--kvant", default=kv, help="KV formats; the first is what others are compared with")
    for engine, (_, rows) in PEERS.items():
        name = engine.replace("_", "-")
        add(f"--{name}", default=rows, help='KV types, "" for none')
        add(f"--{name}-options", default="", help=f'of throughput_{engine}.py, as "--chunk 256"')
    add("--model", default="smollm2-135m", help="kvant's name of the model in --data")
    add("--backend", default="auto", help="kvant's")
    add("--requests", type=int, default=8)
    add("--input-len", type=int, default=4096)
    add("--output-len", type=int, default=64)
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--output", type=Path)
    args = parser.parse_args()
    for kind in (GGMLQuantizationType.BF16, GGMLQuantizationType.F16):
        path = args.data / f"model-{kind.name.lower()}.gguf"
        if not path.exists():
            float_gguf(resolve_model(args.model), path, kind)
    with ExitStack() as stack:
        rows = start(args, stack)
        others = measure(args, rows)
        report(args, [result(args, row, rows[0]) for row in rows], others)


if __name__ == "__main__":
    main()
