"""Runs programs that a model wrote where they can do no harm (Linux; HumanEval needs it).

Each program gets an interpreter of its own, which ``jail.py`` locks up with namespaces, an empty
root folder, limits and a filter of system calls; what each of them refuses is said there. A machine
that does not permit it is an error: a program never runs unprotected.

Who judges. A program is handed to the sandbox with a random token, which the sandbox writes to a
pipe after the program's last statement; only whoever reads that token, and nothing else, from the
pipe and sees the process end by itself says "passed". A program that ends early by any way, prints
what it likes or writes to the pipe has not passed. What remains: candidate and test share an
interpreter, as in OpenAI's harness (Chen et al., 2021), so a program *can* deceive its own test
(objects that equal anything, a trace function that jumps over it, a search of the process's memory
for the token). That would be a wrong point for the model; it opens no way out of the sandbox.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from kvant.errors import ConfigError

__all__ = ["MEMORY", "SECONDS", "Verdict", "check_sandbox", "run_program", "run_programs"]

SECONDS = 10.0
"""Time that a program has, unless said otherwise."""
MEMORY = 512 << 20
"""Bytes of address space that a program has, unless said otherwise."""

_JAIL = Path(__file__).with_name("jail.py")
_STARTING = 60.0  # seconds that a busy machine may take to get a program started
_LONGEST = 1 << 16  # bytes of what a program's process left
_SAMPLE = "import collections, hashlib, heapq, math, re, typing"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a program: whether it ran to its end, and in one line why not."""

    passed: bool
    reason: str


def check_sandbox() -> None:
    """Raises ``ConfigError`` if this machine permits no sandbox."""
    verdict = run_program(_SAMPLE, seconds=_STARTING)
    if not verdict.passed:
        raise _refused(verdict.reason)


def run_program(source: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> Verdict:
    """Runs Python source text in a sandbox, with this interpreter's standard library.

    It has passed if its last statement was done within ``seconds`` and ``memory`` bytes. Raises
    ``ConfigError`` if this machine permits no sandbox.
    """
    return _run(source, seconds, memory, _Running())


def run_programs(
    sources: Sequence[str],
    *,
    workers: int | None = None,
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> list[Verdict]:
    """Runs programs ``workers`` at a time (None: as many as there are cores), verdicts in order.

    An exception, also Ctrl-C, ends all of them before it is passed on. Raises ``ConfigError`` if
    this machine permits no sandbox.
    """
    running = _Running()
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        futures = [pool.submit(_run, source, seconds, memory, running) for source in sources]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            running.stop()
            raise


class _Running:
    """The processes of one call, to end them all."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopped = Event()

    def add(self, process: subprocess.Popen[bytes]) -> None:
        self._processes.add(process)
        if self._stopped.is_set():
            process.terminate()

    def remove(self, process: subprocess.Popen[bytes]) -> None:
        self._processes.discard(process)

    def stop(self) -> None:
        self._stopped.set()
        for process in self._processes.copy():
            process.terminate()


def _run(source: str, seconds: float, memory: int, running: _Running) -> Verdict:
    """One program; raises ``ConfigError`` if the sandbox could not be made."""
    if not sys.platform.startswith("linux"):
        raise _refused(f"namespaces are Linux's, this is {sys.platform}")
    token = secrets.token_hex(32)
    ours, theirs = os.pipe()
    try:
        task = {
            "token": token,
            "seconds": seconds,
            "memory": memory,
            "result": theirs,
            "parent": os.getpid(),
        }
        text = json.dumps(task).encode() + b"\n" + source.encode("utf-8", "surrogatepass")
        try:
            process = _start(theirs)
        finally:
            os.close(theirs)
        running.add(process)
        try:
            facts = _facts(process, text, seconds)
        finally:
            running.remove(process)
        return _judge(facts, _left(ours), token, seconds)
    finally:
        os.close(ours)


def _start(result: int) -> subprocess.Popen[bytes]:
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(result,),
        env=kept,  # Python may need it to start; programs do not see it
        cwd="/",
        start_new_session=True,
    )


def _facts(process: subprocess.Popen[bytes], text: bytes, seconds: float) -> dict[str, Any]:
    """What the supervisor of a program says of its end; it holds no pipe that the program has."""
    try:
        said, wrong = process.communicate(text, timeout=seconds + _STARTING)
    except subprocess.TimeoutExpired:
        return {"in_time": False, "status": None}
    finally:
        _end(process)
    line = said.partition(b"\n")[0]
    if line:
        facts: dict[str, Any] = json.loads(line)
        return facts
    if process.returncode < 0:
        return {"in_time": True, "status": process.returncode}
    lines = wrong.decode(errors="replace").strip().splitlines()
    return {"error": lines[-1] if lines else f"its process ended with {process.returncode}"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a supervisor, and it its program, if it runs yet."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _left(pipe: int) -> str:
    """What there is in a pipe, up to a limit, without waiting for more."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, _LONGEST).decode(errors="replace")
    except BlockingIOError:
        return ""


def _judge(facts: dict[str, Any], left: str, token: str, seconds: float) -> Verdict:
    if error := facts.get("error"):
        raise _refused(error)
    if not facts["in_time"]:
        return Verdict(False, f"timed out after {seconds:g} s")
    status = facts["status"]
    if status < 0:
        return Verdict(False, f"killed: {_signal(-status)}")
    if left == token and status == 0:
        return Verdict(True, "passed")
    if token in left:
        return Verdict(False, "the program wrote to the pipe of its verdict")
    line = "".join(x if x.isprintable() else " " for x in left[:500]).strip()
    return Verdict(False, line or f"the process ended before the program, with status {status}")


def _signal(number: int) -> str:
    if number == signal.SIGKILL:
        return "memory or processor time"
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _refused(why: str) -> ConfigError:
    return ConfigError(
        f"this machine permits no sandbox for programs that a model wrote ({why}); run on Linux as "
        "root or where users may make namespaces (sysctl user.max_user_namespaces and "
        "kernel.apparmor_restrict_unprivileged_userns), a container with --cap-add SYS_ADMIN, "
        "or leave the task out."
    )
